"""Maps of attention: their weights are those that the blocks use, and they lie where the keys lie in the picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from maskfeat.analysis.attention import Attention, attention_map, attentions, components, rollout, spread
from maskfeat.analysis.maps import encoded, heat, map_rows
from maskfeat.analysis.model import Model
from maskfeat.analysis.visualize import main
from maskfeat.build import build_objective
from maskfeat.checkpoint.files import save_checkpoint
from maskfeat.checkpoint.weights import LoadReport
from maskfeat.config import dump_config, load_config
from maskfeat.errors import UserError
from tests.small import MFM_PT, MFM_RECIPES, MVIT_FT, MVIT_PT, R50_FT, RECIPES, VIT_FT, VIT_PT

VIT, MVIT = RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", RECIPES / "k400_MVITv2_S_16x4_FT.yaml"
WITHOUT_CLASS = ["MVIT.CLS_EMBED_ON", "False"]


def model(recipe: Path, opts: list[str]) -> Model:
    cfg = load_config(recipe, opts)
    objective = build_objective(cfg)
    for parameter in objective.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    kind = "classifier" if objective.classifies else "pre-trained"
    return Model(objective, cfg, "some.pyth", kind, LoadReport())


def outputs_of(layer: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], Tensor]:
    """The arguments that a layer is given, and what it returns."""
    found: list[Any] = []
    hook = layer.register_forward_hook(lambda _layer, given, out: found.append((given, out)))
    run()
    hook.remove()
    return found[0]


@pytest.mark.parametrize("opts", [[], WITHOUT_CLASS])
@torch.no_grad()
def test_the_weights_are_those_that_a_vit_uses(opts: list[str]) -> None:
    network, x = model(VIT, [*VIT_FT, *opts]), torch.randn(2, 3, 32, 32)
    (found,) = attentions(network, x, [1])
    layer: Any = network.backbone.repeated_blocks()[1].attn
    (given, *_), out = outputs_of(layer, lambda: network.tokens(x))
    values = layer.qkv(given)[..., 2 * 24 :].unflatten(-1, (2, 12)).transpose(1, 2)  # (B, G, N, C)
    torch.testing.assert_close(layer.proj((found.weights @ values).transpose(1, 2).flatten(2)), out)
    assert found.prefix == (0 if opts else 1) and found.key_grid == (2, 2)
    torch.testing.assert_close(found.weights.sum(dim=-1), torch.ones(2, 2, 4 + found.prefix))


@pytest.mark.parametrize("number", [0, 1])
@torch.no_grad()
def test_the_weights_are_those_that_an_mvit_uses(number: int) -> None:
    network = model(MVIT, MVIT_FT)
    x = torch.randn(2, 3, *network.backbone.clip_size)
    (found,) = attentions(network, x, [number])
    layer: Any = network.backbone.repeated_blocks()[number].attn
    given, out = outputs_of(layer, lambda: network.tokens(x))
    q, _, v = layer.pooled(layer.project(*given))
    mixed = (found.weights @ v.transpose(1, 2)).transpose(1, 2)
    mixed[:, 1:] += q[:, 1:]
    torch.testing.assert_close(layer.proj(mixed.flatten(2)), out, rtol=1e-4, atol=1e-4)
    assert found.key_grid == layer.kv_grid


def test_the_map_is_of_the_class_token_or_of_all() -> None:
    weights = torch.zeros(1, 2, 5, 5)
    weights[0, :, 0] = torch.tensor([[0.6, 0.0, 0.4, 0.0, 0.0], [0.6, 0.0, 0.0, 0.0, 0.4]])
    weights[0, :, 1:, 2] = 1
    torch.testing.assert_close(
        attention_map(Attention(weights, (2, 2), 1)), torch.tensor([[[0.0, 0.5], [0.0, 0.5]]]), msg="of the class token"
    )
    plain = torch.tensor([[[0.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]])[None]
    torch.testing.assert_close(attention_map(Attention(plain, (2, 2), 0)), torch.tensor([[[0.0, 0.75], [0.0, 0.25]]]))


def test_rollout_is_the_product_of_half_attention_and_half_identity() -> None:
    layers = [Attention(torch.rand(2, 3, 5, 5).softmax(dim=-1), (2, 2), 1) for _ in range(3)]
    for sample in range(2):
        product = np.eye(5)
        for layer in layers:
            product = (0.5 * layer.weights[sample].mean(dim=0).numpy() + 0.5 * np.eye(5)) @ product
        row = product[0, 1:] / product[0, 1:].sum()
        np.testing.assert_allclose(rollout(layers)[sample].flatten(), row, rtol=1e-5)
    with pytest.raises(UserError, match="MViTv2 pools"):
        rollout([Attention(torch.rand(1, 1, 9, 3), (2,), 1)])


def test_pooled_keys_lie_where_they_were_pooled_from() -> None:
    keys = torch.arange(2 * 2 * 4.0).reshape(1, 1, 2, 2, 4)  # of a clip of 4 frames of 16 x 32 pixels
    pixels = spread(keys, (4, 16, 32))[0, 0]
    for frame, row, column in ((0, 0, 0), (1, 7, 8), (2, 8, 31), (3, 15, 15)):
        assert pixels[frame, row, column] == keys[0, 0, frame // 2, row // 8, column // 8]


def test_components_separate_two_kinds_of_tokens() -> None:
    kinds = torch.tensor([0, 0, 1, 1, 0, 1])
    tokens = torch.randn(2, 8)[kinds][None] + 0.01 * torch.randn(1, 6, 8)
    first = components(tokens)[0, :, 0]
    assert (first - first[0]).abs()[kinds == 0].max() < 0.1 < 0.9 < (first - first[0]).abs()[kinds == 1].min()
    torch.testing.assert_close(components(tokens), components(tokens * 3 + 1), rtol=1e-3, atol=1e-3)


def test_a_map_is_bright_where_the_network_looks() -> None:
    network, x = model(VIT, VIT_FT), torch.randn(3, 32, 32)
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    (row,) = map_rows(network, x, "attention", "a.jpg", pixels, block=0)
    looked = attention_map(attentions(network, x[None], [0])[0])[0]
    colours = heat((looked / looked.max()).numpy())
    assert (row.colours[::16, ::16] == colours).all() and (row.colours[15::16, 15::16] == colours).all()
    assert tuple(heat(np.array(1.0))) == (252, 255, 164) and tuple(heat(np.array(0.0))) == (0, 0, 4)


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_clips_of_pictures(suffix: str, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (33, 20), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(encoded(pictures, suffix))
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [int(frame[5, 5].argmax()) for frame in frames] == [0, 1, 2]


def saved(path: Path, recipe: Path, opts: list[str]) -> str:
    network = model(recipe, opts)
    save_checkpoint(path, {"model_state": network.objective.released_state(), "cfg": dump_config(network.cfg)})
    return str(path)


def first_video(folder: Path) -> str:
    return str(next(path for path in sorted(folder.rglob("*")) if path.suffix in (".mp4", ".avi", ".mkv")))


def pictures(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*.*g"))[:2]]


CASES = {
    "attention.png": (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", VIT_PT),
    "rollout.png": (VIT, VIT_FT),
    "hog.png": (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", VIT_PT),
    "spectrum.png": (MFM_RECIPES / "in1k_R50_MFM_PT.yaml", MFM_PT),
    "pca.png": (MFM_RECIPES / "in1k_R50_MFM_FT.yaml", R50_FT),
    "attention.mp4": (RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", MVIT_PT),
    "hog.gif": (RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", MVIT_PT),
    "pca.gif": (MVIT, MVIT_FT),
}
QUICK = ("attention.png", "attention.mp4")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES])
def test_pictures_of_files(name: str, image_data: Path, clip_data: Path, tmp_path: Path) -> None:
    recipe, opts = CASES[name]
    inputs = [first_video(clip_data)] * 2 if recipe.name.startswith("k400") else pictures(image_data)
    output, file = tmp_path / "out" / name, saved(tmp_path / "x.pyth", recipe, opts)
    assert main(["--checkpoint", file, "--what", output.stem, "--output", str(output), "--input", *inputs]) == 0
    if output.suffix == ".mp4":
        with av.open(str(output)) as film:
            frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert len(frames) == 4 and all(frame.std() > 10 for frame in frames)
    else:
        with Image.open(output) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10
            frames = {"hog.gif": 2, "pca.gif": 4}.get(name, 1)
            assert getattr(picture, "n_frames", 1) == frames


@pytest.mark.slow
def test_errors(image_data: Path, clip_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image, video, output = pictures(image_data)[0], first_video(clip_data), str(tmp_path / "x.png")
    vit, mvit, r10 = (saved(tmp_path / f"{n}.pyth", *CASES[n]) for n in ("hog.png", "hog.gif", "pca.png"))
    for given, text in (
        ([], "give --checkpoint and --input, or --cfg"),
        (["--checkpoint", vit], "belong together"),
        (["--checkpoint", vit, "--input", str(tmp_path / "none.jpg"), "--output", output], "none.jpg cannot be read"),
        (["--checkpoint", vit, "--input", image, "--output", f"{output}.webp"], "--output must end with .png"),
        (["--checkpoint", vit, "--input", image, "--output", str(tmp_path / "x.gif")], "takes images"),
        (["--checkpoint", vit, "--input", image, "--block", "7", "--output", output], "--block must be from -2 to 1"),
        (["--checkpoint", vit, "--input", image, "--what", "spectrum", "--output", output], "pre-trained by MFM"),
        (["--checkpoint", mvit, "--input", video, "--what", "rollout", "--output", output], "MViTv2 pools"),
        (["--checkpoint", r10, "--input", image, "--output", output], "has no attention"),
        (["--checkpoint", vit, "--input", image, "--output", f"{vit}/x.png"], "cannot be written"),
    ):
        caplog.clear()
        assert main(given) == 2 and text in caplog.text
