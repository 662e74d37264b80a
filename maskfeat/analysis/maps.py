"""Pictures of what a network sees in an image or a clip, and clips of such pictures.

Shape legend: T frames, H x W pixels.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskfeat.analysis.attention import attention_map, attentions, components, rollout, spread
from maskfeat.analysis.model import Model
from maskfeat.masking import MaskSampler
from maskfeat.models.base import Tokens
from maskfeat.pictures import MIN_TILE, Floats, Pixels, tile_grid

FPS = 8
"""Pictures a second in GIF and MP4 files."""
_COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float32)
"""From low to high: dark, violet, red, orange, pale yellow."""
HEADERS = {
    "attention": (
        "Input",
        "Attention\nof the class token or, without one, of all tokens on average; mean over heads",
        "On the input",
    ),
    "rollout": (
        "Input",
        "Attention rollout\nhow much of each place reaches the class token or, without one, the tokens on average",
        "On the input",
    ),
    "pca": ("Input", "Tokens\nfirst three principal components as red, green and blue", "On the input"),
}


@dataclass(frozen=True)
class MapRow:
    """One row of `map_figure`.

    Attributes:
        image: (H, W, 3) uint8, the input.
        colours: (H, W, 3) uint8, the map.
        caption: a line above the row.
    """

    image: Pixels
    colours: Pixels
    caption: str = ""


def heat(values: Floats) -> Pixels:
    """Colour values from 0 (dark) to 1 (pale yellow): (...) -> (..., 3) uint8."""
    place = np.clip(values, 0, 1) * (len(_COLOURS) - 1)
    low = np.minimum(place.astype(int), len(_COLOURS) - 2)
    share = (place - low)[..., None]
    return (_COLOURS[low] * (1 - share) + _COLOURS[low + 1] * share).round().astype(np.uint8)


def map_figure(rows: Sequence[MapRow], what: str, title: str = "") -> Image.Image:
    """Return a labelled picture with a row for each image or frame; `what` is a key of `HEADERS`."""
    tiles = []
    for row in rows:
        grey = row.image.mean(axis=2, keepdims=True)
        mixed = (0.45 * grey + 0.55 * row.colours).round().astype(np.uint8)
        height, width = row.image.shape[:2]
        times = max(1, -(-MIN_TILE // max(height, width)))
        tiles.append([np.repeat(np.repeat(tile, times, 0), times, 1) for tile in (row.image, row.colours, mixed)])
    return tile_grid(tiles, HEADERS[what], [row.caption for row in rows], title)


def _values(model: Model, x: Tensor, what: str, block: int) -> Tensor:
    """Return the map of one input on its grid of tokens or keys: (1, C, *grid), of 1 or 3 values from 0 to 1."""
    if what == "pca":
        tokens: Tokens = model.tokens(x)
        return components(tokens.patches).transpose(1, 2).unflatten(2, tokens.grid)
    if what == "rollout":
        found = rollout(attentions(model, x, range(model.backbone.num_blocks)))
    else:
        found = attention_map(attentions(model, x, [block])[0])
    return (found / found.max()).unsqueeze(1)


def map_rows(model: Model, x: Tensor, what: str, caption: str, pixels: Pixels, block: int = -1) -> list[MapRow]:
    """Return a row for each frame of an input; an image has one.

    Args:
        model: with its weights.
        x: (3, [T,] H, W) float32, see `Model.transform`.
        what: a key of `HEADERS`.
        caption: names the input.
        pixels: (T, H, W, 3) uint8, the input as the network is shown it.
        block: whose attention is drawn.

    Raises:
        UserError: the network has no such map.
    """
    values = spread(_values(model, x.unsqueeze(0), what, block).float().cpu(), x.shape[1:])[0]
    if values.dim() == 3:
        values = values.unsqueeze(1)
    places = values.movedim(0, -1).numpy()  # (T, H, W, C)
    colours = heat(places[..., 0]) if places.shape[-1] == 1 else (255 * places).round().astype(np.uint8)
    clip = len(pixels) > 1
    return [
        MapRow(image, colour, f"{caption}, frame {number}" if clip else caption)
        for number, (image, colour) in enumerate(zip(pixels, colours, strict=True))
    ]


def encoded(pictures: Sequence[Image.Image], suffix: str) -> bytes:
    """Return a file of pictures of one size: ".png" of the first one, ".gif" or ".mp4" (H.264) of all in turn."""
    file = io.BytesIO()
    if suffix != ".mp4":
        more = {"save_all": True, "append_images": pictures[1:], "duration": 1000 // FPS, "loop": 0}
        pictures[0].save(file, format=suffix[1:], **(more if suffix == ".gif" else {}))
        return file.getvalue()
    width, height = (side + side % 2 for side in pictures[0].size)  # H.264 halves the colours
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            canvas = Image.new("RGB", (width, height), "white")
            canvas.paste(picture)
            container.mux(stream.encode(av.VideoFrame.from_image(canvas)))
        container.mux(stream.encode())
    return file.getvalue()


def chosen(rows: Sequence[object], number: int) -> list[int]:
    """Return the numbers of at most `number` rows, spread evenly."""
    return np.unique(np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(int)).tolist()


def random_mask(sampler: MaskSampler, seed: int = 0) -> Tensor:
    """Return a mask (1, *mask grid) bool, the same for the same seed."""
    return torch.from_numpy(sampler(np.random.default_rng(seed))).unsqueeze(0)
