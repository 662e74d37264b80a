"""Parts that check results on the GPU: against the golden values, against the CPU, and against themselves."""

from benchmarks.gpu.parts import Part

PARTS: tuple[Part, ...] = ()
