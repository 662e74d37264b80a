"""Shapes of the parameters in a file, by their names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from maskfeat.checkpoint.names import bare
from maskfeat.checkpoint.reading import model_state


class Unlike(Exception):
    """The shapes are not those of the network that was looked for."""


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of the tensors in a file by their bare names."""

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        """Return a shape that must be there, with so many axes, none of length 0.

        Raises:
            Unlike: it is not there, or another one.
        """
        shape = self.get(name, ())
        if len(shape) != axes or not all(shape):
            raise Unlike
        return shape

    def have(self, *starts: str) -> bool:
        """Return whether a name begins with one of these."""
        return any(name.startswith(starts) for name in self)


def shapes_in(content: Mapping[str, Any]) -> Shapes:
    """Return the shapes of the parameters in a file."""
    state = model_state(content)
    return Shapes((bare(str(name)), tuple(value.shape)) for name, value in state.items() if isinstance(value, Tensor))
