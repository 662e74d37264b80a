"""Two processes: flags that either raises, and the gradient of both, which is that of one process."""

import json
from typing import Any

import pytest

from maskfeat.distributed.launch import launch
from maskfeat.distributed.world import World
from tests.distributed.collectives_worker import all_cases, gradients


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("collectives")
    assert launch(all_cases, (str(folder),), processes=2) == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_one_rank_raises_a_flag_for_all(found: list[dict[str, Any]]) -> None:
    """Both ranks see a flag one step after it was raised, by whichever rank."""
    for rank in found:
        assert rank["flags"] == [[False, False], [False, False], [True, False], [False, True], [False, False]]


def test_gradients_of_two_ranks_are_those_of_one(found: list[dict[str, Any]]) -> None:
    """Ranks with three samples and one, and with different numbers of hidden patches: the mean over all terms."""
    whole = gradients(World(), slice(0, 4))
    assert max(norm for norm, _ in whole.values()) > 1e-3
    for rank in found:
        assert rank["gradients"].keys() == whole.keys()
        for name, values in whole.items():
            assert rank["gradients"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
