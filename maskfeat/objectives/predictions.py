"""Rows of pictures that show what an objective predicts, see `maskfeat.pictures`.

Shape legend: B samples, T frames, H x W pixels, grid = output tokens ([T',] H', W'), F values per token.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from maskfeat.batch import Batch
from maskfeat.objectives.spectrum import inverse_spectrum, spectrum
from maskfeat.pictures import HogRow, SpectrumRow, grey_out, tokens_to_cells

if TYPE_CHECKING:
    from maskfeat.objectives.maskfeat import MaskFeat
    from maskfeat.objectives.mfm import MFM

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the grey image."""


def to_pixels(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Convert a normalised clip (3, [T,] H, W) to pixels (T, H, W, 3) uint8; an image has one frame."""
    frames = clip.cpu() if clip.dim() == 4 else clip.cpu().unsqueeze(1)
    shape = (3, 1, 1, 1)
    unit = frames * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)
    return (unit.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()


@torch.no_grad()
def hog_rows(
    objective: "MaskFeat", batch: Batch, mean: Sequence[float], std: Sequence[float], frames: int = 2
) -> list[HogRow]:
    """Return the rows of `hog_figure` for a batch: one per image, `frames` (at most T') per clip.

    Args:
        objective, batch: on one device; batch with masks, clips normalised by `mean` and `std`.
        mean, std: of each colour channel.
        frames: output frames to draw of each clip, spread evenly.
    """
    objective.eval()
    hidden = objective.hidden_tokens(batch)
    prediction, _ = objective.predict_hidden(batch)
    target = objective.target(batch.clip)
    predicted = torch.zeros_like(target)
    predicted[hidden] = prediction.float()
    target, predicted, hidden = target.cpu(), predicted.cpu(), hidden.cpu()
    grid = objective.backbone.grid
    on_grid = (len(batch), *((1,) * (3 - len(grid))), *grid)
    rows = []
    for sample in range(len(batch)):
        pixels = to_pixels(batch.clip[sample], mean, std)
        steps = np.unique(np.linspace(0, on_grid[1] - 1, min(frames, on_grid[1])).round().astype(int))
        for step in steps:
            real, guess = (
                tokens_to_cells(tokens.reshape(*on_grid, -1)[sample, step].numpy(), objective.bins, objective.cells)
                for tokens in (target, predicted)
            )
            mask = hidden.reshape(on_grid)[sample, step].numpy()
            frame = int(step) * objective.backbone.frame_stride
            index = int(batch.index[sample]) if batch.index is not None else sample
            caption = f"sample {index}" + (f", frame {frame}" if len(grid) == 3 else "")
            rows.append(HogRow(pixels[frame], grey_out(pixels[frame], mask), real, guess, mask, caption))
    return rows


@torch.no_grad()
def spectrum_rows(objective: "MFM", batch: Batch, mean: Sequence[float], std: Sequence[float]) -> list[SpectrumRow]:
    """Return the rows of `spectrum_figure` for a batch of images; spectra are averaged over colours.

    Args:
        objective, batch: on one device; batch normalised by `mean` and `std`; where it has no masks, they are sampled.
        mean, std: of each colour channel.
    """
    objective.eval()
    batch = objective.prepare(batch)
    removed, seen, target = objective.inputs(batch)
    prediction = objective.predict_image(seen).float()
    masks, real, guess = removed.whole(), spectrum(target), spectrum(prediction)
    together = inverse_spectrum(torch.where(masks, guess, real)).real
    if objective.target_channels == 1:  # undo the normalisation of the grey image
        luma, scale = torch.tensor(LUMA), torch.tensor(std)
        grey_std = 1 / float((luma / scale).sum())
        grey_mean = float((luma * torch.tensor(mean) / scale).sum()) * grey_std
        target_scale: tuple[Sequence[float], Sequence[float]] = (grey_mean,) * 3, (grey_std,) * 3
        prediction, together = prediction.expand(-1, 3, -1, -1), together.expand(-1, 3, -1, -1)
    else:
        target_scale = mean, std
    rows = []
    for i in range(len(batch)):
        image, filtered = (to_pixels(clip[i], mean, std)[0] for clip in (batch.clip, seen))
        guessed, whole = (to_pixels(clip[i], *target_scale)[0] for clip in (prediction, together))
        magnitudes = [values[i].abs().mean(dim=0).cpu().numpy() for values in (real, guess)]
        index = int(batch.index[i]) if batch.index is not None else i
        mask = masks[i, 0].cpu().numpy()
        rows.append(SpectrumRow(image, filtered, magnitudes[0], mask, guessed, magnitudes[1], whole, f"sample {index}"))
    return rows
