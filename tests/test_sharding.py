"""Parameters in pieces (TRAIN.PARALLEL fsdp) train as whole ones do, hold half of the bytes, and become whole again."""

import json
from typing import Any

import pytest

from maskfeat.config import load_config
from maskfeat.distributed import World, launch
from maskfeat.parallel import distribute
from tests.sharding_worker import CASES, CLASSIFIER, CPU, VIT, Trainer, all_cases

Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What came out of each case, by rank."""
    folder = tmp_path_factory.mktemp("sharding")
    assert launch(all_cases, (str(folder),), processes=2) == 0
    names = {path.name.split(".")[0] for path in folder.glob("*.json")}
    return {name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)] for name in names}


def of(found: Found, name: str) -> list[dict[str, Any]]:
    for result in found[name]:
        assert "error" not in result, result["error"]
    return found[name]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_whole_parameters(found: Found, name: str) -> None:
    # One rounding to 16 bits is a step of 1e-3; a norm of five million float32 is itself known to 1e-6.
    limit = 1e-3 if "TRAIN.MIXED_PRECISION" in CASES[name][1] else 1e-5 if name == "resnet" else 1e-6
    for result in of(found, name):
        assert result["cut"] and result["names"] and result["moved"] > 0.1
        for what, value in result["logged"].items():
            assert value <= limit, (what, value)
        assert result["weights"] <= limit
        assert result["clipped"] == float(CASES[name][0] is not CLASSIFIER and "value" not in name)


@pytest.mark.parametrize("name", ["vit", "mvit"])
def test_half_of_the_bytes_on_each_of_two(found: Found, name: str) -> None:
    held = [result["held"] for result in of(found, name)]
    assert all(0.49 < share < 0.52 for share in held) and sum(held) < 1.02


@pytest.mark.parametrize("name", ["spoiled", "spoiled in fp16"])
def test_a_lost_step_changes_no_bit_on_any_rank(found: Found, name: str) -> None:
    for result in of(found, name):
        assert result["skipped"] == 1 and result["same"]
        assert result["lost"] == 0 and result["moved"], "the next step is made"


def test_whole_states_go_both_ways(found: Found) -> None:
    for rank, result in enumerate(of(found, "handed over")):
        assert result["equal"] and result["count"] > 200
        first, *others = result["losses"]
        assert others == pytest.approx([first] * 2, rel=1e-6)
        assert result["nothing"] == 0
        assert (result["alone"] > 0) == (rank == 0)


def test_one_process_keeps_the_whole() -> None:
    trainer = Trainer(load_config(*VIT), World(), sharded=True)
    assert type(trainer.objective).__name__ == "MaskFeat" and trainer.model is trainer.objective
    assert distribute(trainer.objective, World()) is trainer.objective
    assert {p.device for p in trainer.objective.parameters()} == {CPU}
    assert trainer.step(0)["skipped"] == 0
