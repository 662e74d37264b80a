"""All parts of the check, in the order in which they run: the most valuable first."""

from benchmarks.gpu import correctness, learning, speed
from benchmarks.gpu.parts import Part

PARTS: tuple[Part, ...] = (*correctness.PARTS, *speed.FIRST, *correctness.LAST, *speed.PARTS, *learning.PARTS)
