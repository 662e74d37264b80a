"""`maskfeat.load_model`: inputs, tokens, features, blocks and predictions."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import maskfeat
from maskfeat.analysis import model as model_module
from maskfeat.analysis import published
from maskfeat.analysis.attention import attentions
from maskfeat.analysis.model import Model
from maskfeat.build import build_loader, build_objective
from maskfeat.checkpoint import download
from maskfeat.checkpoint.files import AVERAGE, save_checkpoint
from maskfeat.checkpoint.reading import CLASSES
from maskfeat.checkpoint.sharded import save_sharded
from maskfeat.config import dump_config, load_config
from maskfeat.errors import UserError
from tests.analysis.upstream import mae_file, resnet_state, timm_vit, training_script
from tests.small import MFM_RECIPES, MVIT_FT, R50_FT, RECIPES, VIT_FT, VIT_PT, clips, images

CLASSES_4 = ["circle", "cross", "ring", "square"]


def checkpoint(path: Path, recipe: Path, opts: list[str], **more: Any) -> Path:
    """A checkpoint of this project, as a run writes it."""
    cfg = load_config(recipe, opts)
    objective = build_objective(cfg)
    content = {"epoch": 1, "model_state": objective.released_state(), "cfg": dump_config(cfg), **more}
    save_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("vit") / "ft.pyth"
    torch.manual_seed(1)
    more = {CLASSES: CLASSES_4}
    opts = [*VIT_FT, "MVIT.HEAD_INIT_SCALE", "1.0", "DATA_LOADER.IMAGE_BACKEND", "pil"]
    return maskfeat.load_model(checkpoint(path, RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", opts, **more), device="cpu")


def picture(seed: int, height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_inputs_are_those_of_validation(vit: Model, image_data: Path) -> None:
    """A file, a Pillow image and an array give what the loader gives; a list is a batch."""
    cfg = load_config(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", [*VIT_FT, *images(image_data)])
    loader = build_loader(cfg, "val")
    clip = torch.cat([batch.clip for batch in loader.iter_samples([0, 5])])
    paths = [loader.dataset.path(index) for index in (0, 5)]
    assert torch.equal(vit.transform(paths), clip)
    assert torch.equal(vit.transform(Path(paths[1])), clip[1])
    pixels = Image.open(paths[0]).convert("RGB")
    for given in (pixels, np.array(pixels), torch.from_numpy(np.array(pixels))):
        assert torch.equal(vit.transform(given), clip[0])
    assert vit.transform(pixels.convert("L")).shape == (3, 32, 32)


def test_features_and_blocks(vit: Model) -> None:
    x = vit.transform([picture(0), picture(1)])
    tokens = vit.tokens(x)
    assert tokens.x.shape == (2, 5, 24) and tokens.grid == (2, 2) and not tokens.x.requires_grad
    raw = vit.backbone.forward_tokens(x)
    assert vit.mean_pooling and torch.equal(tokens.x, raw.x), "the norm is of the mean"
    assert torch.equal(vit.features(x), vit.objective.norm(raw.patches.mean(dim=1)))
    assert torch.equal(vit.features(x, "cls"), raw.x[:, 0]) and torch.equal(vit(x), vit.features(x))
    logits = vit.objective.head(vit.features(x))
    assert torch.allclose(logits, vit.objective.logits(x), atol=1e-6), "what the classifier sees"
    first, last = vit.blocks(x, [0, -1])
    assert torch.equal(last.x, raw.x) and first.grid == (2, 2) and not torch.equal(first.x, last.x)
    assert torch.equal(vit.blocks(x, [1])[0].x, last.x) and len(vit.blocks(x, [0, 0])) == 2
    assert not any(block._forward_hooks for block in vit.backbone.repeated_blocks())
    assert vit.tokens(x[0]).x.shape == (1, 5, 24), "one input is a batch of one"
    for numbers in ([2], [-3], []):
        with pytest.raises(UserError, match="blocks are numbers from -2 to 1"):
            vit.blocks(x, numbers)
    with pytest.raises(UserError, match="pool must be one of mean, cls; given 'max'"):
        vit.features(x, "max")


def test_predictions(vit: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture(0)).save(path)
    scores = vit.objective.predict(model_module.Batch(clip=vit.transform([path])))[0]
    (found,) = vit.predict(path, top=2)
    order = scores.argsort(descending=True).tolist()
    assert found.path == str(path) and [name for name, _ in found.classes] == [CLASSES_4[i] for i in order[:2]]
    assert [score for _, score in found.classes] == pytest.approx(scores[order[:2]].tolist())
    assert found.numbers == order[:2]
    x = vit.transform([path])
    assert vit.num_classes == 4 and torch.equal(vit.probabilities(x)[0], scores)
    assert torch.equal(vit.logits(x[0]).softmax(dim=1)[0], scores) and not vit.logits(x).requires_grad
    many = vit.predict([picture(i) for i in range(3)], batch_size=2, top=99)
    assert [one.path for one in many] == ["input 0", "input 1", "input 2"]
    assert all(len(one.classes) == 4 and sum(s for _, s in one.classes) == pytest.approx(1) for one in many)
    alone = vit.predict(picture(2))[0].classes
    assert [name for name, _ in many[2].classes] == [name for name, _ in alone]
    for name, value in (("top", 0), ("top", 2.0), ("top", True), ("batch_size", 0), ("batch_size", -1)):
        with pytest.raises(UserError, match=f"{name} must be a whole number of at least 1; given {value}"):
            vit.predict(path, **{name: value})
    assert len(vit.predict(path, top=np.int64(2))[0].classes) == 2


@pytest.mark.parametrize(
    "given, said",
    [
        ("nothing.jpg", "nothing.jpg cannot be read as an image: no such file"),
        (__file__, "cannot be read as an image: not a JPEG"),
        (np.zeros((4, 8, 8, 3), np.uint8), r"takes an image: .* given uint8 of shape \(4, 8, 8, 3\)"),
        (np.zeros((8, 8, 3), np.float32), "given float32 of shape"),
        (np.zeros((8, 8), np.uint8), r"of shape \(H, W, 3\); given"),
        ([], "the list is empty"),
    ],
)
def test_inputs_that_it_cannot_take(vit: Model, given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        vit.transform(given)


@pytest.mark.parametrize(
    "given, said",
    [
        (["a.jpg"], "given a list"),
        (np.zeros((1, 3, 32, 32), np.float32), "given a ndarray"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"given torch.uint8 of shape \(1, 3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"given torch.float32 of shape \(1, 1, 32, 32\)"),
        (torch.zeros(1, 32, 32, 3), "as `transform` returns it"),
        (torch.zeros(32, 32), "takes a tensor of floats of shape"),
    ],
)
def test_tensors_that_it_cannot_take(vit: Model, given: Any, said: str) -> None:
    for method in (vit.features, vit.tokens, lambda x: vit.blocks(x, [0])):
        with pytest.raises(UserError, match=said):
            method(given)


def test_outputs_that_training_or_other_numbers_would_change_are_refused(vit: Model) -> None:
    """A network in training mode drops paths at random, and a batch norm would learn from what it is shown."""
    own = copy.deepcopy(vit)
    x = own.transform([picture(0)])
    before = own.features(x)
    for start in (own.objective.train, own.backbone.train):
        start()
        for use in (own.features, own.logits, lambda x: own.blocks(x, [0]), lambda x: own.predict(picture(0))):
            with pytest.raises(UserError, match=r"the network is in training mode, .* call eval\(\)"):
                use(x)
        assert torch.equal(own.eval().features(x), before)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(UserError, match=f"the parameters are {dtype}: .* precision="):
            copy.deepcopy(vit).to(dtype).features(x)


def test_data_workers_take_no_weights_along(vit: Model) -> None:
    packed = pickle.dumps(vit.transform)
    assert len(packed) < 50_000 < len(pickle.dumps(vit)), "with the config, and without the network"
    assert torch.equal(pickle.loads(packed)(picture(0)), vit.transform(picture(0)))


def test_a_backbone_is_a_module_that_others_call(vit: Model) -> None:
    x = vit.transform([picture(0)])
    assert torch.equal(vit.backbone(x).x, vit.backbone.forward_tokens(x).x)  # type: ignore[operator]


@pytest.mark.parametrize("what", [None, {1}, iter([]), b"bytes", io.BytesIO(b"x")])
def test_what_is_no_input_is_named(what: Any, vit: Model) -> None:
    with pytest.raises(UserError, match=f"given (a )?({type(what).__name__}|\\|S5)"):
        vit.transform(what)


def test_a_pillow_image_is_read_as_its_file_is(vit: Model, tmp_path: Path) -> None:
    """Sixteen bits are scaled, an orientation is heeded, and what has no range is refused."""
    grey, turned, wide = tmp_path / "grey.png", tmp_path / "turned.jpg", tmp_path / "wide.tif"
    Image.fromarray(picture(0)[..., 0].astype(np.uint16) * 257).save(grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(1)).save(turned, exif=exif)
    for path in (grey, turned):
        with Image.open(path) as image:
            assert torch.equal(vit.transform(image), vit.transform(path)), path.name
    Image.fromarray(picture(2)[..., 0].astype(np.float32)).save(wide)
    with pytest.raises(UserError, match="no known range"):
        vit.transform(Image.fromarray(np.full((40, 40), 200, np.int32)))
    with Image.open(wide) as image, pytest.raises(UserError, match="no known range"):
        vit.transform(image)
    with pytest.raises(UserError, match="Pillow image cannot be read"):
        vit.transform(image)  # closed


def test_threads_do_not_see_each_others_blocks(vit: Model) -> None:
    clips = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    alone = [[tokens.x for tokens in vit.blocks(x, [0, 1])] for x in clips]
    weights = [attentions(vit, x, [0])[0].weights for x in clips]
    with ThreadPoolExecutor(4) as pool:
        blocks = list(pool.map(lambda i: [tokens.x for tokens in vit.blocks(clips[i % 4], [0, 1])], range(40)))
        looked = list(pool.map(lambda i: attentions(vit, clips[i % 4], [0])[0].weights, range(40)))
    for i in range(40):
        torch.testing.assert_close(blocks[i], alone[i % 4])
        torch.testing.assert_close(looked[i], weights[i % 4])


def test_it_stays_in_evaluation_as_a_part_of_what_is_trained(vit: Model) -> None:
    whole = torch.nn.Sequential(vit, torch.nn.Dropout(0.5)).train()
    assert whole.training and whole[1].training
    assert not any(module.training for module in vit.modules())


def test_what_is_said_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"
    path = checkpoint(tmp_path / "ft.pyth", recipe, [*VIT_FT, "SOLVER.MAX_EPOCH", "3", "SOLVER.BASE_LR", "0.02"])
    said = maskfeat.load_model(path, device="cpu").trained
    assert said == "classification (`MODEL.MODEL_NAME MViT`), 2 of 3 epochs, adamw, base learning rate 0.02"
    state = written(tmp_path, torch.load(path, weights_only=True)["model_state"])
    assert maskfeat.load_model(state, load_config(recipe, VIT_FT), device="cpu").trained == ""
    named = published.Published("own", "x", "masked_ssl/in1k_VIT_B_MaskFeat_FT", "a ViT, trained", "", tuple(VIT_FT))
    monkeypatch.setitem(published.PUBLISHED, "own", named)
    monkeypatch.setattr(published.Published, "path", lambda entry: str(state))
    assert maskfeat.load_model("own", device="cpu").trained == "a ViT, trained"


def test_what_torch_saved_of_a_model_is_loaded(vit: Model, tmp_path: Path) -> None:
    """The names of its own state begin with `objective.`."""
    again = maskfeat.load_model(written(tmp_path, vit.state_dict()), vit.cfg, device="cpu")
    x = vit.transform(picture(0))
    assert torch.equal(again.features(x), vit.features(x))


def test_devices_by_number(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "ft.pyth", RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", VIT_FT)
    if not torch.cuda.is_available():
        for number in (0, 1):
            with pytest.raises(UserError, match=f"device cuda:{number}: this machine has 0 GPUs"):
                maskfeat.load_model(path, device=number)
    with pytest.raises(UserError, match="device"):
        maskfeat.load_model(path, device="")
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="device mps cannot be used"):
            maskfeat.load_model(path, device="mps")


def test_clips(tmp_path: Path, clip_data: Path) -> None:
    path = checkpoint(tmp_path / "clips.pyth", RECIPES / "k400_MVITv2_S_16x4_FT.yaml", MVIT_FT)
    model = maskfeat.load_model(path, device="cpu")
    cfg = load_config(RECIPES / "k400_MVITv2_S_16x4_FT.yaml", [*MVIT_FT, *clips(clip_data)])
    loader = build_loader(cfg, "val")
    (batch,) = list(loader.iter_samples([1]))
    assert model.media == "video" and torch.equal(model.transform(loader.dataset.path(1)), batch.clip[0])
    frames = np.stack([np.full((40, 48, 3), 10 * i, np.uint8) for i in range(10)])
    x = model.transform(frames)
    assert x.shape == (3, 4, 32, 32)
    shown = (x[0, :, 0, 0] * cfg.DATA.STD[0] + cfg.DATA.MEAN[0]) * 255
    assert shown.tolist() == pytest.approx([0, 30, 60, 90], abs=1e-2), "frames spread over the clip"
    grids = [tokens.grid for tokens in model.blocks(x, [0, 1])]
    assert grids == [(2, 8, 8), (2, 4, 4)] and model.tokens(x).grid == (2, 4, 4)
    assert len(model.predict([loader.dataset.path(0)])[0].classes) == 4 and model.class_name(3) == "3"
    with pytest.raises(UserError, match="takes a video: a path or uint8 of shape"):
        model.transform(frames[0])


# --- files of other programs ---


def written(tmp_path: Path, content: Any) -> Path:
    torch.save(content, tmp_path / "file.pth")
    return tmp_path / "file.pth"


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("classes", [7, 0])
def test_features_of_timm(tmp_path: Path, pool: str, classes: int) -> None:
    """Tokens, pooled features and logits are timm's."""
    theirs = timm_vit(global_pool=pool, num_classes=classes)
    ours = maskfeat.load_model(written(tmp_path, theirs.state_dict()), device="cpu")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = theirs.forward_features(x)
        assert torch.allclose(ours.tokens(x).x, tokens, atol=1e-5)
        pooled = theirs.forward_head(tokens, pre_logits=True)
        assert torch.allclose(ours.features(x, "cls" if pool == "token" else "mean"), pooled, atol=1e-5)
        if classes:
            assert torch.allclose(ours.objective.logits(x), theirs(x), atol=1e-5)
    assert ours.kind == ("classifier" if classes else "backbone") and not ours.report.fresh + ours.report.dropped


@pytest.mark.slow
@pytest.mark.full_size
def test_features_of_timm_at_full_size(tmp_path: Path) -> None:
    theirs = timm_vit(img_size=224, embed_dim=768, depth=12, num_heads=12, num_classes=1000)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    ours = maskfeat.load_model(tmp_path / "vit.safetensors", device="cpu")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(ours.tokens(x).x, theirs.forward_features(x), atol=1e-5)
    assert ours.classes is not None and ours.classes[0] == "tench"


def test_features_of_mae(tmp_path: Path) -> None:
    """The norm of the encoder is applied, and nothing of the decoder loaded."""
    content = mae_file()
    ours = maskfeat.load_model(written(tmp_path, content), device="cpu")
    theirs = timm_vit(num_classes=0)
    theirs.load_state_dict({k: v for k, v in content["model"].items() if k in theirs.state_dict()})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours.tokens(x).x, theirs.forward_features(x), atol=1e-5)
    assert all(name.startswith(("decoder", "mask_token")) for name in ours.report.dropped) and not ours.report.fresh
    with pytest.raises(UserError, match="does not classify .it is a backbone file"):
        ours.predict([picture(0)])


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 50])
def test_features_of_torchvision(tmp_path: Path, depth: int) -> None:
    import torchvision

    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=9).eval()
    theirs.load_state_dict(resnet_state(depth, 9))
    ours = maskfeat.load_model(written(tmp_path, theirs.state_dict()), device="cpu")
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = torch.nn.Sequential(*list(theirs.children())[:-2])(x)
        assert torch.allclose(ours.features(x), theirs.avgpool(maps).flatten(1), atol=1e-6)
        assert torch.allclose(ours.objective.logits(x), theirs(x), atol=1e-6)
        tokens = ours.tokens(x)
        assert tokens.grid == (2, 3) and torch.equal(ours.blocks(x, [-1])[0].x, tokens.x)
    with pytest.raises(UserError, match="has no class token"):
        ours.features(x, "cls")
    assert ours.cfg.DATA.TEST_SHORT_SIDE == 256 and ours.cfg.DATA.TEST_INTERPOLATION == "bilinear"


def test_mfm_pretraining(tmp_path: Path) -> None:
    ours = maskfeat.load_model(written(tmp_path, training_script(resnet_state(18, None, 1))), device="cpu")
    assert ours.kind == "pre-trained" and type(ours.objective).__name__ == "MFM" and not ours.report.fresh


# --- files and names ---


def test_pretrained_files(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "pt.pyth", RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", VIT_PT)
    model = maskfeat.load_model(path, device="cpu")
    x = model.transform(picture(0))
    expected = model.objective.pred_head.transforms[0](model.backbone.forward_tokens(x[None]).x)
    assert torch.equal(model.tokens(x).x, expected) and model.kind == "pre-trained"
    with pytest.raises(UserError, match="does not classify .it is a pre-trained file.: fine-tune it first"):
        model.predict([picture(0)])
    with pytest.raises(UserError, match="has no classifier of this model"):
        maskfeat.load_model(path, load_config(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", VIT_FT), device="cpu")


def test_a_given_config(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "r.pyth", MFM_RECIPES / "in1k_R50_MFM_FT.yaml", R50_FT)
    cfg = load_config(MFM_RECIPES / "in1k_R50_MFM_FT.yaml", [*R50_FT, "DATA.MEAN", "[0.1, 0.2, 0.3]"])
    model = maskfeat.load_model(path, cfg, device="cpu")
    assert model.cfg == cfg and model.kind == "classifier"
    more = load_config(MFM_RECIPES / "in1k_R50_MFM_FT.yaml", [*R50_FT, "MODEL.NUM_CLASSES", "5"])
    with pytest.raises(UserError, match="cannot be evaluated: .*MODEL.NUM_CLASSES was 4 and is 5"):
        maskfeat.load_model(path, more, device="cpu")
    with pytest.raises(UserError, match="no recipe has this name"):
        maskfeat.load_model(path, "in1k_nothing", device="cpu")


def test_averaged_weights_and_other_formats(tmp_path: Path) -> None:
    recipe = RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"
    average = build_objective(load_config(recipe, VIT_FT)).released_state()
    path = checkpoint(tmp_path / "a.pyth", recipe, VIT_FT, **{AVERAGE: average})
    model = maskfeat.load_model(path, device="cpu", averaged=True)
    assert torch.equal(model.objective.released_state()["head.projection.weight"], average["head.projection.weight"])
    weights = maskfeat.load_model(path, device="cpu").objective.released_state()
    assert not torch.equal(weights["patch_embed.proj.weight"], average["patch_embed.proj.weight"])
    texts = {"cfg": dump_config(load_config(recipe, VIT_FT)), CLASSES: json.dumps(CLASSES_4)}
    save_file(average, tmp_path / "a.safetensors", metadata=texts)
    again = maskfeat.load_model(tmp_path / "a.safetensors", device="cpu")
    assert again.cfg == model.cfg and again.classes == CLASSES_4, "its config, which a ViT 24 wide needs"
    plain = {"epoch": 1, "cfg": texts["cfg"], CLASSES: CLASSES_4}
    save_sharded(tmp_path / "a.dcp", {f"model.{name}": value for name, value in average.items()}, plain).wait()
    sharded = maskfeat.load_model(tmp_path / "a.dcp", device="cpu")
    assert sharded.cfg == model.cfg and sharded.classes == CLASSES_4
    with pytest.raises(UserError, match="has no average"):
        maskfeat.load_model(tmp_path / "a.safetensors", device="cpu", averaged=True)


def test_the_folder_of_a_run_names_its_newest_file(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / f"checkpoint_epoch_0000{number}.pyth").write_bytes(bytes(number))
        os.utime(tmp_path / "checkpoints" / f"checkpoint_epoch_0000{number}.pyth", (number, number))
    with pytest.raises(UserError, match=r"is a folder, .*the newest in it is .*checkpoint_epoch_00002\.pyth"):
        maskfeat.load_model(tmp_path)
    truncated = tmp_path / "cut.pyth"
    torch.save({"a": torch.zeros(1000)}, truncated)
    truncated.write_bytes(truncated.read_bytes()[:2000])
    with pytest.raises(UserError, match="an incomplete copy or download: fetch it again"):
        maskfeat.load_model(truncated)


@pytest.mark.parametrize(
    "source, options, said",
    [
        ("runs/nothing.pyth", {}, "there is no file runs/nothing.pyth"),
        ("maskfeat_vit_bas", {}, "nothing is published under this name; the nearest is 'maskfeat_vit_base_in1k'"),
        ("x", {"device": "gpu"}, "there is no device 'gpu'"),
        ("x", {"device": "cuda:99"}, "device cuda:99: this machine has"),
        ("x", {"precision": "half"}, "precision must be one of off, bf16, fp16"),
    ],
)
def test_names_that_are_nothing(source: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        maskfeat.load_model(source, **options)


@pytest.mark.slow
def test_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a recipe; a fetched file is loaded with it, and an address that does not answer is named."""
    entries = maskfeat.list_models()
    kinds = [("maskfeat_", 4), ("mfm_", 3), ("torchvision_", 2)]
    assert [sum(entry.name.startswith(kind) for entry in entries) for kind, _ in kinds] == [n for _, n in kinds]
    for entry in entries:
        assert entry.address.startswith("https://") and entry.accuracy and entry.about
        assert entry.config().DATA.TRAIN_CROP_SIZE in (160, 224)
    path = written(tmp_path, resnet_state(50, 1000))
    monkeypatch.setattr(published, "fetch", lambda *known: path)
    model = maskfeat.load_model("torchvision_resnet50_v2", device="cpu")
    assert model.source == "torchvision_resnet50_v2" and model.cfg.DATA.TEST_SHORT_SIDE == 232
    assert model.class_name(1) == "goldfish"

    def offline(url: str, _: object) -> Path:
        raise UserError(f"{url} could not be fetched: no network")

    monkeypatch.undo()
    monkeypatch.setattr(download, "download", offline)
    with pytest.raises(UserError, match="saved_model_15.pth could not be fetched: no network.*fetch https"):
        maskfeat.load_model("mfm_resnet50_in1k")


def test_torch_hub(tmp_path: Path, repo: Path) -> None:
    path = checkpoint(tmp_path / "pt.pyth", RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", VIT_PT)
    model = torch.hub.load(str(repo), "maskfeat", str(path), source="local", device="cpu")
    assert isinstance(model, Model) and model.kind == "pre-trained"


@pytest.mark.slow
def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, maskfeat; assert 'torch' not in sys.modules; maskfeat.load_model; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        maskfeat.nothing_of_this_name  # noqa: B018
