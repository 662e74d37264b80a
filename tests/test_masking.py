"""Masks: number of hidden patches, shapes of the hidden regions, and resizing to other grids."""

import math

import numpy as np
import pytest
import torch

from maskfeat import masking
from maskfeat.masking import _uniform, block_mask, cube_mask, frame_mask, mask_sampler, resize_mask, tube_mask


def draws(number: int = 200) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in range(number)]


def test_image_blocks_aim_at_78_of_196() -> None:
    sampler = mask_sampler((14, 14), 0.4)
    counts = np.array([sampler(rng).sum() for rng in draws()])
    assert counts.max() <= 78
    assert counts.mean() > 70, "blocks should come close to their aim"
    share = np.mean([sampler(rng) for rng in draws()], axis=0)
    assert share.min() > 0.01 and share.max() < 0.8, "every place is hidden sometimes and seen sometimes"


def test_first_block_has_the_published_size_and_aspect() -> None:
    """To hide as many patches as the smallest block has, one rectangle of about 15 patches is hidden."""
    for rng in draws():
        hidden = block_mask((14, 14), 18, rng, min_block=15)
        rows, columns = np.where(hidden.any(1))[0], np.where(hidden.any(0))[0]
        if not hidden.any():
            continue
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        if hidden.sum() == height * width:
            assert 9 <= hidden.sum() <= 18
            assert 0.2 <= height / width <= 5.0


def test_no_block_adds_more_than_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides are rounded, so that a rectangle may have more patches than the area that was drawn for it."""
    for side, count in ((5, 0), (4, 16)):
        monkeypatch.setattr(masking, "_rectangle", lambda *_, side=side: (side, side))
        hidden = block_mask((14, 14), 16, np.random.default_rng(0), max_block=16)
        assert hidden.sum() == count
        few = block_mask((14, 14), 25, np.random.default_rng(0), max_block=16)
        assert few.sum() <= 25 and (few.sum() == 0) == (side == 5)


def test_clip_cubes_aim_at_157_of_392() -> None:
    sampler = mask_sampler((8, 7, 7), 0.4)
    masks = [sampler(rng) for rng in draws()]
    counts = np.array([mask.sum() for mask in masks])
    assert masks[0].shape == (8, 7, 7) and masks[0].dtype == bool
    assert counts.max() <= 157
    assert counts.mean() > 154 and counts.min() > 130
    differing = [not (mask == mask[:1]).all() for mask in masks]
    assert np.mean(differing) > 0.9, "cubes begin and end in time"


def test_a_cube_never_fills_a_frame() -> None:
    for rng in draws():
        hidden = cube_mask((8, 7, 7), 60, rng, min_area=40)
        assert hidden.sum() <= 60
        assert hidden.sum(axis=(1, 2)).max() <= 6 * 6


def test_no_cube_fits_a_frame_of_one_patch() -> None:
    assert not cube_mask((2, 1, 1), 1, np.random.default_rng(0)).any()


def test_tubes_are_the_same_in_every_frame() -> None:
    sampler = mask_sampler((8, 14, 14), 0.4, tube=True)
    for rng in draws(50):
        hidden = sampler(rng)
        assert (hidden == hidden[:1]).all()
        assert 0 < hidden.sum() <= 0.4 * hidden.size
    assert tube_mask((8, 7, 7), 20, np.random.default_rng(0)).sum() <= 160


@pytest.mark.parametrize(("ratio", "most"), [(0.4, 160), (0.6, 232), (0.75, 296), (0.9, 352)])
def test_tubes_aim_at_the_share_of_a_frame(ratio: float, most: int) -> None:
    """Each frame of 7 x 7 loses round(ratio x 49) patches: 20 at 0.4, and not the 19 that 157 leaves to each of 8."""
    sampler = mask_sampler((8, 7, 7), ratio, tube=True)
    counts = np.array([sampler(rng).sum() for rng in draws(100)])
    assert counts.max() == most and counts.mean() > 0.97 * most


@pytest.mark.parametrize(
    ("grid", "ratio", "smallest", "largest"),
    [
        ((4, 4), 0.4, 1, 6),
        ((14, 14), 0.4, 15, 78),
        ((14, 14), 0.6, 23, 118),
        ((14, 14), 0.75, 29, 147),
        ((24, 24), 0.4, 46, 230),
        ((8, 7, 7), 0.4, 9, 49),
        ((8, 7, 7), 0.9, 9, 49),
        ((4, 14, 14), 0.4, 39, 196),
    ],
)
def test_areas_of_blocks_and_cubes(
    grid: tuple[int, ...], ratio: float, smallest: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published: a block has a fifth to all of the patches to hide, a cube in space a fifth to all of a frame."""
    asked = []

    def uniform(low: float, high: float, rng: np.random.Generator) -> float:
        asked.append((low, high))
        return _uniform(low, high, rng)

    monkeypatch.setattr(masking, "_uniform", uniform)
    mask_sampler(grid, ratio)(np.random.default_rng(0))
    areas = [bounds for bounds in asked if bounds[0] > 0]  # the others are logarithms of aspect ratios
    assert areas[0] == (smallest, largest) and {low for low, _ in areas} == {smallest}


@pytest.mark.parametrize(("ratio", "smallest"), [(0.4, 15), (0.6, 23), (0.75, 29)])
def test_masks_hold_a_block_of_the_smallest_size(ratio: float, smallest: int) -> None:
    """Rounded to whole patches, no first block is much smaller: such a rectangle fits into what is hidden."""
    for rng in draws(50):
        hidden = mask_sampler((14, 14), ratio)(rng)
        corners = np.pad(hidden.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        full = (
            h * w
            for h in range(1, 14)
            for w in range(1, 14)
            if (corners[h:, w:] - corners[:-h, w:] - corners[h:, :-w] + corners[:-h, :-w] == h * w).any()
        )
        assert max(full) >= 0.8 * smallest


def test_frames_are_hidden_whole() -> None:
    hidden = frame_mask((8, 7, 7), 3, np.random.default_rng(0))
    assert hidden.all(axis=(1, 2)).sum() == 3 == hidden.any(axis=(1, 2)).sum()
    assert mask_sampler((8, 7, 7), 0.4, frames=True)(np.random.default_rng(0)).sum() == hidden.sum()
    rng = np.random.default_rng(0)
    draws = [frame_mask((8, 7, 7), 3, rng)[:, 0, 0] for _ in range(60)]
    assert np.any(draws, axis=0).all() and not np.all(draws, axis=0).any(), "every frame is hidden at times"


def test_a_draw_is_a_function_of_its_generator() -> None:
    for sampler in (mask_sampler((14, 14), 0.4), mask_sampler((8, 7, 7), 0.4)):
        assert (sampler(np.random.default_rng(5)) == sampler(np.random.default_rng(5))).all()
        assert (sampler(np.random.default_rng(5)) != sampler(np.random.default_rng(6))).any()


def test_uniform_draws_are_numpys() -> None:
    for low, high in ((9, 49), (math.log(0.3), -math.log(0.3)), (15, 7), (0.1, 0.7)):
        ours, numpys = np.random.default_rng(3), np.random.default_rng(3)
        for _ in range(300):
            drawn = numpys.uniform(low, high) if low < high else low + (high - low) * numpys.random()
            assert math.isclose(_uniform(low, high, ours), drawn, rel_tol=1e-15, abs_tol=1e-15)


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1])
def test_ratio_must_leave_something(ratio: float) -> None:
    with pytest.raises(ValueError, match="AUG.MASK_RATIO"):
        mask_sampler((14, 14), ratio)


@pytest.mark.parametrize("grid", [(14, 14), (8, 7, 7)])
@pytest.mark.parametrize("how", [{}, {"tube": True}, {"frames": True}, {"max_block": 20}])
def test_ratio_0_hides_nothing(grid: tuple[int, ...], how: dict) -> None:
    sampler = mask_sampler(grid, 0.0, **how)
    for rng in draws(20):
        hidden = sampler(rng)
        assert hidden.shape == grid and hidden.dtype == bool and not hidden.any()
    first, second = sampler(rng), sampler(rng)
    first[:] = True
    assert not second.any() and not sampler(rng).any(), "masks share no memory"


def test_resize_mask() -> None:
    hidden = torch.rand(2, 2, 2, 3) > 0.5
    up = resize_mask(hidden, (4, 8, 3))
    assert up.shape == (2, 4, 8, 3)
    expected = torch.nn.functional.interpolate(hidden[:, None].float(), size=(4, 8, 3), mode="nearest")[:, 0].bool()
    assert (up == expected).all()
    assert (resize_mask(up, (2, 2, 3)) == hidden).all()
    for grid in ((4, 8), (2, 4, 8, 3)):
        with pytest.raises(ValueError, match="grid"):
            resize_mask(hidden, grid)


def test_blocks_and_cubes_lie_and_stand() -> None:
    """The aspect ratio is as often above 1 as below it."""
    for first in (
        lambda rng: block_mask((14, 14), 18, rng, min_block=15),
        lambda rng: cube_mask((1, 14, 14), 18, rng, min_area=15, max_area=18)[0],
    ):
        taller, wider = 0, 0
        for rng in draws(300):
            hidden = first(rng)
            height, width = hidden.any(1).sum(), hidden.any(0).sum()
            if hidden.sum() == height * width:  # one block alone
                taller, wider = taller + (height > width), wider + (width > height)
        assert taller > 50 and wider > 50 and 0.6 < taller / wider < 1.6, (taller, wider)


def test_cubes_lie_everywhere_alike() -> None:
    rng, sampler = np.random.default_rng(0), mask_sampler((8, 7, 7), 0.4)
    share = np.mean([sampler(rng) for _ in range(80)], axis=0)
    for axis in range(3):
        along = share.mean(axis=tuple({0, 1, 2} - {axis}))
        assert np.abs(along - along[::-1]).max() < 0.1 < along.min()


def test_cubes_last_from_one_frame_to_all() -> None:
    """How long the first cube lasts: as often one frame, two, three and all four."""
    lasting = []
    for rng in draws(400):
        hidden = cube_mask((4, 9, 9), 9 * 4, rng, min_area=9, max_area=9, min_aspect=1.0)
        columns = hidden.reshape(4, -1)
        lasting.append(int(columns.all(axis=0).sum()))
    # A cube of 3 x 3 that lasts for all four frames hides all 36 patches; shorter ones are spread over the grid.
    assert 60 < sum(count == 9 for count in lasting) < 140
