"""The figures of docs/deviations.md that no other test gives: what differs from the published code on purpose."""

import math
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import DropPath
from timm.scheduler import CosineLRScheduler

from maskfeat.config import load_config
from maskfeat.data.video.decoder import open_video
from maskfeat.engine.rng import seed_everything
from maskfeat.masking import band_sampler, mask_sampler
from maskfeat.objectives.hog import hog
from maskfeat.objectives.mixup import Mixup
from maskfeat.optim.schedule import lr_at_epoch
from tests.small import REPO

RANKS = 8


def test_every_process_draws_its_own_mixup_and_drop_path() -> None:
    """Published: one ratio, one choice of mixup or cutmix and the same dropped paths on all of them."""
    mixup = Mixup(alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, smoothing=0.0, num_classes=2)
    clip = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    ratios, cut, dropped = set(), set(), set()
    for rank in range(RANKS):
        seed_everything(0, 7, rank)
        mixed, target = mixup(clip, torch.tensor([0, 1]))
        ratios.add(float(target[0, 0]))
        cut.add(set(mixed.unique().tolist()) <= {0.0, 1.0})
        dropped.add(tuple(DropPath(0.5).train()(torch.ones(16, 1)).flatten().tolist()))
    assert len(ratios) == len(dropped) == RANKS and cut == {True, False}


@pytest.mark.parametrize(("grid", "samples", "share"), [((14, 14), 32, 0.0024), ((8, 7, 7), 4, 0.0042)])
def test_share_of_a_process_in_the_loss_of_a_step(grid: tuple[int, ...], samples: int, share: float) -> None:
    """A masked loss is a mean over the step; published, the mean of those of the processes."""
    sampler = mask_sampler(grid, 0.4)
    hidden = [sum(int(sampler(np.random.default_rng([r, i])).sum()) for i in range(samples)) for r in range(RANKS)]
    assert np.abs(np.array(hidden) / np.mean(hidden) - 1).max() == pytest.approx(share, abs=1e-4)


@pytest.mark.slow
def test_how_many_images_of_a_batch_keep_low_frequencies() -> None:
    """Each draws for itself; published, in the ResNet-50 recipe, half of a batch: 128 of 256 and not 128 +- 8."""
    sampler = band_sampler(0.5)
    kept = [sum(not sampler(np.random.default_rng([b, i])).item() for i in range(256)) for b in range(200)]
    assert np.mean(kept) == pytest.approx(128, abs=1.5) and np.std(kept) == pytest.approx(8, rel=0.2)


def _clip(path: Path, colours: np.ndarray, red: float, blue: float, tag: int) -> None:
    """Write colours (H, W, 3) uint8 as H.264 with a matrix of luma weights, and the tag of a matrix."""
    r, g, b = np.moveaxis(colours / 255, 2, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - luma) / (2 * (1 - blue)), (r - luma) / (2 * (1 - red))
    planes = [16 + 219 * luma, (128 + 224 * cb)[::2, ::2], (128 + 224 * cr)[::2, ::2]]
    pixels = np.concatenate([plane.round().astype(np.uint8).ravel() for plane in planes])
    height, width = luma.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.colorspace = tag
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(pixels.reshape(height * 3 // 2, width), format="yuv420p")
            frame.pts, frame.colorspace = number, tag
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("short_side", [None, 32, 33])
def test_the_colour_matrix_of_a_clip_is_the_one_that_it_names(short_side: int | None, tmp_path: Path) -> None:
    """BT.601 (tag 6) and BT.709 (tag 1), also of frames scaled while they are decoded; published: every clip is
    taken as BT.601, and these colours change by 8.5."""
    colours = np.repeat([[(200, 50, 50), (50, 200, 50), (50, 50, 200), (180, 180, 60)]], 64, axis=0)
    colours = np.repeat(colours, 16, axis=1).astype(np.uint8)
    found = {}
    for name, red, blue, tag in (("601", 0.299, 0.114, 6), ("709", 0.2126, 0.0722, 1), ("mistaken", 0.2126, 0.0722, 6)):
        path = tmp_path / f"{name}.mp4"
        _clip(path, colours, red, blue, tag)
        with open_video(path, short_side) as video:
            frame = video.frames([1])[0].astype(int)
        middle = [frame.shape[1] * (2 * stripe + 1) // 8 for stripe in range(4)]  # of each colour, away from the others
        found[name] = float(np.abs(frame[:, middle] - colours[0, 8::16]).mean())
    assert found["601"] < 3 and found["709"] < 3
    assert found["mistaken"] == pytest.approx(8.5, abs=0.5), "as the published reader sees a clip of BT.709"


def test_one_standard_deviation_leaves_0108() -> None:
    """The first weights of MVIT.INIT beit: the variance of a normal distribution cut at one standard deviation."""
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    assert 0.02 * math.sqrt(1 - 2 * density / math.erf(1 / math.sqrt(2))) == pytest.approx(0.0108, abs=5e-5)


@pytest.mark.slow
def test_colours_of_real_clips(shared: Path) -> None:
    """First frames of the sample videos, converted by both matrices."""
    levels, targets, tags = [], [], []
    for path in sorted((shared / "data" / "kinetics_samples" / "videos").rglob("*.*")):
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            tags.append(int(frame.colorspace))
            both = [frame.to_ndarray(format="rgb24", src_colorspace=name).astype(int) for name in ("ITU601", "ITU709")]
        levels.append(np.abs(both[0] - both[1]).mean())
        height, width = (side // 16 * 16 for side in both[0].shape[:2])
        images = torch.from_numpy(np.stack(both)[:, :height, :width]).permute(0, 3, 1, 2).float() / 255
        published, ours = hog((images - 0.45) / 0.225)
        error = (published - published.mean(dim=(0, 2, 3), keepdim=False)[None, :, None, None]).square().mean()
        targets.append(float((published - ours).square().mean() / error))
    assert (len(tags), tags.count(1)) == (11, 4)
    assert np.mean(levels) == pytest.approx(1.8, abs=0.1) and np.mean(targets) == pytest.approx(0.07, abs=0.01)


def test_how_many_photographs_are_turned(shared: Path) -> None:
    files = sorted((shared / "data" / "imagenet_samples" / "train").rglob("*.JPEG"))
    turned = 0
    for path in files:
        with Image.open(path) as image:
            turned += image.getexif().get(0x0112, 1) > 1
    assert (len(files), turned) == (160, 1)


def test_what_the_page_names_exists() -> None:
    """Every test that docs/deviations.md gives for a figure."""
    page = (REPO / "docs" / "deviations.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 20
    for file, test in named:
        assert not test or f"def {test}(" in (REPO / file).read_text(encoding="utf-8"), (file, test)
        assert (REPO / file).is_file(), file


def test_rates_of_the_layers_in_mfms_fine_tuning() -> None:
    """timm has one first and one last rate for all layers; here both are multiplied by the layer's factor."""
    cfg = load_config("mfm/in1k_VIT_B_MFM_FT")
    steps = cfg.SOLVER.MAX_EPOCH * 25
    ours = np.array([lr_at_epoch(cfg, step / 25) for step in range(steps)])
    for layer, first, last, whole in ((0, 0.055, 0.0875, 0.9976), (6, 0.210, 0.302, 0.9995), (13, 1.0, 1.0, 1.0)):
        factor = cfg.SOLVER.LAYER_DECAY ** (13 - layer)
        timms = CosineLRScheduler(
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR * factor),
            t_initial=steps,
            lr_min=2.5e-7,
            warmup_t=int(cfg.SOLVER.WARMUP_EPOCHS * 25),
            warmup_lr_init=2.5e-7,
            t_in_epochs=False,
        )
        published = np.array([timms._get_lr(step)[0] for step in range(steps)])
        ratio = ours * factor / published
        assert ratio[0] == pytest.approx(first, abs=1e-3)
        assert ratio[-25:].mean() == pytest.approx(last, abs=5e-3)
        assert (ours * factor).sum() / published.sum() == pytest.approx(whole, abs=1e-4)
