"""Render the synthetic data sets: textured shapes on textured backgrounds, still or in motion.

The class of an image is its shape, the class of a clip its motion. Nothing else depends on the class: colour, texture,
position, size and clutter are sampled from the same distributions. The height of a shape in a clip wraps around (it
leaves at the top and enters at the bottom) and so does its size. Therefore *every single frame* has the same
distribution in every class, and only the order of frames tells one motion from another.

A horizontal flip, which training applies at random by default (`DATA.RANDOM_FLIP`), does not change the class.

Shape legend: T frames, H x W pixels, P points of a polygon.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SHAPES = ("crescent", "cross", "disc", "heart", "ring", "square", "star", "triangle")
MOTIONS = ("bob", "fall", "grow", "rise", "shrink", "sway")
TEXTURES = ("mixed", "stripes")
"""Textures of backgrounds: faint stripes, checks, noise and blobs, as those of shapes; or vivid stripes, which run on
behind whatever hides them, so that a small model soon learns to predict their HOG.
"""
VIVID = 150.0
"""Contrast of vivid stripes, at most."""

SUPERSAMPLE = 4  # subpixels along each side of a pixel, to anti-alias polygons
TILE_EXTENT = 1.6  # half the side of a shape's texture, in units where the area of the shape is 1

Float = NDArray[np.float64]
Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, width, height


# --------------------------------------------------------------------------- shapes


def contour(shape: str) -> Float:
    """Return the outline of one of `SHAPES`: a polygon (P, 2) of area 1 around the origin, in (x, y).

    Areas are equal so that the amount of foreground colour does not reveal the class. The ring is one polygon that runs
    around the outside and back around the hole.

    Raises:
        ValueError: there is no such shape.
    """
    turn = np.linspace(0.0, 2 * np.pi, 73)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "disc":
        points = circle
    elif shape == "ring":
        points = np.concatenate([circle, 0.6 * circle[::-1]])
    elif shape == "crescent":  # a disc less a disc of radius 0.8 that is shifted by 0.5; they meet at `tip`
        tip = math.acos((1 + 0.5**2 - 0.8**2) / (2 * 0.5))
        outer = np.linspace(tip, 2 * np.pi - tip, 48)
        far = math.atan2(math.sin(tip), math.cos(tip) - 0.5)
        inner = np.linspace(2 * np.pi - far, far, 48)
        points = np.concatenate(
            [
                np.stack([np.cos(outer), np.sin(outer)], axis=1),
                np.stack([0.5 + 0.8 * np.cos(inner), 0.8 * np.sin(inner)], axis=1),
            ]
        )
    elif shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = np.stack([x, -y], axis=1)
    elif shape == "cross":
        a, b = 0.33, 1.0
        quarter = np.array([[a, a], [a, b], [-a, b]])
        points = np.concatenate([_rotated(quarter, k * np.pi / 2) for k in range(4)])
    elif shape == "star":
        points = _radial(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    elif shape == "triangle":
        points = _radial(3)
    elif shape == "square":
        points = _rotated(_radial(4), np.pi / 4)
    else:
        raise ValueError(f"unknown shape {shape!r}: the shapes are {', '.join(SHAPES)}")
    return _unit_area(points)


def _radial(count: int) -> Float:
    turn = np.arange(count) * 2 * np.pi / count - np.pi / 2  # the first point is at the top
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _rotated(points: Float, angle: float) -> Float:
    c, s = math.cos(angle), math.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def _unit_area(points: Float) -> Float:
    """Move the centroid of a polygon to the origin and scale it to area 1 (shoelace formula)."""
    x, y = points.T
    nx, ny = np.roll(points, -1, axis=0).T
    wedge = x * ny - nx * y
    area = wedge.sum() / 2
    centroid = np.array([((x + nx) * wedge).sum(), ((y + ny) * wedge).sum()]) / (6 * area)
    return np.asarray((points - centroid) / math.sqrt(abs(area)))


# --------------------------------------------------------------------------- textures and scenes


def _rng(seed: int, *names: object) -> np.random.Generator:
    """Return a generator that depends on (seed, names) alone, not on the order of calls."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _texture(
    rng: np.random.Generator, height: int, width: int, base: Float, contrast: float, texture: str
) -> Image.Image:
    """Render stripes, checks, noise or blobs of random frequency and orientation around a colour (3,), 0 to 255."""
    kind = int(rng.integers(4))
    if texture == "stripes":
        kind = 0
    cycles, angle = rng.uniform(2.5, 8.0), rng.uniform(0.0, np.pi)
    phase = rng.uniform(0.0, 2 * np.pi, size=2)
    sharp = rng.uniform(0.6, 4.0)
    cells = rng.random((32, 32), dtype=np.float32)  # sampled for every kind: all use as many random numbers
    side = min(height, width)
    if kind < 2:
        y, x = np.mgrid[0:height, 0:width] * (2 * np.pi * cycles / side)
        wave = np.sin(x * math.cos(angle) + y * math.sin(angle) + phase[0])
        if kind == 1:
            wave = wave * np.sin(y * math.cos(angle) - x * math.sin(angle) + phase[1])
    else:
        grid = 2 + int(cycles * (2 if kind == 2 else 1))
        coarse = Image.fromarray(cells[:grid, :grid])
        wave = 3.0 * (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) - 0.5)
        sharp = sharp if kind == 2 else 8.0
    pattern = np.tanh(sharp * wave) / math.tanh(sharp)
    swing = rng.normal(size=3)
    swing *= contrast / np.linalg.norm(swing)
    pixels = base + pattern[..., None] * swing
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def _two_colours(rng: np.random.Generator, difficulty: float) -> tuple[Float, Float]:
    """Sample the colours of a background and of the shape on it, each (3,), 0 to 255 and of any hue.

    They differ in brightness. At difficulty 0 the shape is always the brighter one, so that a small model can
    learn from few images; at 1 it is the brighter one in half of the images.
    """
    hues = rng.uniform(-40.0, 40.0, size=(2, 3))
    hues -= hues.mean(axis=1, keepdims=True)
    dark, light = rng.uniform((50.0, 150.0), (100.0, 210.0))
    levels = (light, dark) if rng.random() < difficulty / 2 else (dark, light)
    return levels[0] + hues[0], levels[1] + hues[1]


@dataclass(frozen=True)
class Bar:
    """A straight piece of clutter: its corners (4, 2) in pixels and its colour."""

    points: Float
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Pose:
    """Where a shape is: centre in pixels, side of its unit area in pixels, angle in radians."""

    x: float
    y: float
    scale: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """The fixed parts of a scene: background with clutter, the shape and its texture, clutter in front of it."""

    background: Image.Image
    outline: Float
    tile: Image.Image
    front: tuple[Bar, ...]


def _scene(rng: np.random.Generator, shape: str, height: int, width: int, difficulty: float, texture: str) -> Scene:
    side = min(height, width)
    ground, body = _two_colours(rng, difficulty)
    faint = 8.0 + 42.0 * difficulty
    contrasts = rng.uniform(0.4, 1.0, size=2) * (VIVID if texture == "stripes" else faint, faint)
    background = _texture(rng, height, width, ground, contrasts[0], texture)
    tile = _texture(rng, side, side, body, contrasts[1], "mixed")
    bars = []
    for _ in range(rng.integers(0, 1 + round(8 * difficulty))):
        length, thick = rng.uniform(0.15, 0.5) * side, rng.uniform(0.015, 0.04) * side
        corners = np.array([[-length, -thick], [length, -thick], [length, thick], [-length, thick]]) / 2
        centre = rng.uniform(0.0, 1.0, size=2) * (width, height)
        points = _rotated(corners, rng.uniform(0.0, np.pi)) + centre
        r, g, b = (int(v) for v in rng.integers(20, 236, size=3))
        bars.append(Bar(points, (r, g, b)))
    behind = len(bars) * 2 // 3  # the rest lies in front and hides a little of the shape
    for bar in bars[:behind]:
        _paste_polygon(background, bar.points, partial(_flat, bar.colour))
    return Scene(background, contour(shape), tile, tuple(bars[behind:]))


# --------------------------------------------------------------------------- drawing


def _paste_polygon(canvas: Image.Image, points: Float, paint: Callable[[Box], Image.Image]) -> None:
    """Draw the anti-aliased polygon `points` (P, 2), in pixels, onto `canvas`; `paint(box)` returns its pixels."""
    low = np.maximum(np.floor(points.min(axis=0)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 1, canvas.size)
    width, height = (int(v) for v in high - low)
    if width <= 0 or height <= 0:
        return
    fine = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    corners = (points - low) * SUPERSAMPLE - 0.5  # from pixel edges to the centres of subpixels
    ImageDraw.Draw(fine).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    left, top = (int(v) for v in low)
    canvas.paste(paint((left, top, width, height)), (left, top), fine.reduce(SUPERSAMPLE))


def _flat(colour: tuple[int, int, int], box: Box) -> Image.Image:
    return Image.new("RGB", box[2:], colour)


def _worn(tile: Image.Image, pose: Pose, box: Box) -> Image.Image:
    """Return the part of a shape's texture that covers `box`; the texture moves, rotates and scales with the shape."""
    c, s = math.cos(pose.angle) / pose.scale, math.sin(pose.angle) / pose.scale
    unit = tile.width / (2 * TILE_EXTENT)
    dx, dy = box[0] - pose.x, box[1] - pose.y
    middle = tile.width / 2
    matrix = (
        (c * unit, s * unit, (c * dx + s * dy) * unit + middle)
        + (-s * unit, c * unit, (c * dy - s * dx) * unit + middle)
    )  # fmt: skip
    return tile.transform(box[2:], Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _draw(scene: Scene, pose: Pose, wrap: bool) -> Pixels:
    """Render one frame (H, W, 3) uint8. With `wrap`, a shape that leaves at the top enters at the bottom."""
    canvas = scene.background.copy()
    outline = _rotated(scene.outline, pose.angle) * pose.scale
    for lift in (-canvas.height, 0, canvas.height) if wrap else (0,):
        copy = Pose(pose.x, pose.y + lift, pose.scale, pose.angle)
        _paste_polygon(canvas, outline + (copy.x, copy.y), partial(_worn, scene.tile, copy))
    for bar in scene.front:
        _paste_polygon(canvas, bar.points, partial(_flat, bar.colour))
    return np.array(canvas)


def _turn(rng: np.random.Generator, difficulty: float) -> float:
    """Sample an angle in radians: within 10 degrees of upright at difficulty 0, any angle at 1."""
    return math.radians(float(rng.uniform(-1.0, 1.0)) * (10.0 + 170.0 * difficulty))


def render_image(
    shape: str,
    split: str,
    number: int,
    size: tuple[int, int] = (96, 96),
    seed: int = 0,
    difficulty: float = 0.1,
    texture: str = "mixed",
) -> Pixels:
    """Render one image (H, W, 3) uint8, RGB: a pure function of the arguments."""
    rng = _rng(seed, "image", split, shape, number)
    height, width = size
    scene = _scene(rng, shape, height, width, difficulty, texture)
    x, y = rng.uniform(0.36, 0.64, size=2) * (width, height)
    pose = Pose(x, y, rng.uniform(0.34, 0.52) * min(size), _turn(rng, difficulty))
    return _draw(scene, pose, wrap=False)


def motion_track(motion: str, rng: np.random.Generator, num_frames: int, fps: float) -> Float:
    """Return the path of the shape in a clip: (T, 3), x and y as fractions of the frame, and the size in [0, 1).

    The first frame is the same for every motion, given the same generator. In every frame of every motion, y and size
    are uniform over their range, and x is the position of a swing of random phase (constant except for `sway`), so that
    only the order of frames tells the class. `bob` swings up and down, `sway` from side to side, both at 1.1 to
    1.6 swings a second; `rise`, `fall`, `grow` and `shrink` cover 0.7 to 1.1 of their range in a second. A view
    should therefore span about a second.

    Raises:
        ValueError: there is no such motion.
    """
    x, y, size = rng.uniform((0.44, 0.0, 0.0), (0.56, 1.0, 1.0))
    rate, swings, reach, phase = rng.uniform((0.7, 1.1, 0.18, 0.0), (1.1, 1.6, 0.28, 2 * np.pi))
    start = (x + reach * math.sin(phase), y, size)
    seconds = np.arange(num_frames) / fps
    swing = reach * (np.sin(phase + 2 * np.pi * swings * seconds) - math.sin(phase))
    still = np.zeros(num_frames)
    moves = {
        "bob": (still, swing, still),
        "sway": (swing, still, still),
        "rise": (still, -rate * seconds, still),
        "fall": (still, rate * seconds, still),
        "grow": (still, still, rate * seconds),
        "shrink": (still, still, -rate * seconds),
    }
    if motion not in moves:
        raise ValueError(f"unknown motion {motion!r}: the motions are {', '.join(MOTIONS)}")
    return np.asarray((start + np.stack(moves[motion], axis=1)) % 1.0)


def render_clip(
    motion: str,
    split: str,
    number: int,
    num_frames: int = 32,
    fps: int = 30,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
    difficulty: float = 0.1,
    texture: str = "mixed",
) -> Pixels:
    """Render one clip (T, H, W, 3) uint8, RGB, of a random shape of `SHAPES`: a pure function of the arguments."""
    rng = _rng(seed, "clip", split, motion, number)
    height, width = size
    scene = _scene(rng, SHAPES[rng.integers(len(SHAPES))], height, width, difficulty, texture)
    angle = _turn(rng, difficulty)
    track = motion_track(motion, rng, num_frames, fps)
    # sizes are on a log scale, on which equal steps look like steady growth
    scales = min(size) * 0.25 * (0.6 / 0.25) ** track[:, 2]
    return np.stack(
        [
            _draw(scene, Pose(x * width, y * height, scale, angle), wrap=True)
            for (x, y, _), scale in zip(track, scales, strict=True)
        ]
    )
