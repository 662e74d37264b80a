"""How fast a recipe's samples are read here, and what a GPU would need."""

import time
from typing import NamedTuple

import numpy as np
from yacs.config import CfgNode

from maskfeat.batch import SampleKey
from maskfeat.build import build_mask_sampler
from maskfeat.data.bad_samples import UnreadableSample
from maskfeat.data.datasets.base import DatasetRequest
from maskfeat.distributed.world import available_cores
from maskfeat.registry import dataset_spec

_SAMPLES = 64
_SECONDS = 20.0

RATES = {
    "in1k_VIT_B_MaskFeat_PT": 4000,
    "in1k_VIT_L_MaskFeat_PT": 1300,
    "k400_MVITv2_S_16x4_MaskFeat_PT": 500,
    "k400_MVITv2_L_16x4_MaskFeat_PT": 130,
    "in1k_R50_MFM_PT": 3500,
}
"""Samples a second that one H200 trains on, by recipe: the targets of docs/speed.md."""


class Speed(NamedTuple):
    """Samples a second.

    Attributes:
        core: that one core reads and augments.
        cores: that there are here.
        needed: by all GPUs together; None = not known.
    """

    core: float
    cores: int
    needed: float | None

    @property
    def here(self) -> float:
        """What all cores read, at most."""
        return self.core * self.cores

    def words(self, gpus: int) -> str:
        """The comparison in words."""
        here = f"{self.here:,.0f}" if self.here >= 10 else f"{self.here:.2g}"
        said = (
            f"reading: {self.core:.3g} samples/s a core, as the recipe augments them; at most {here} on the "
            f"{self.cores} cores here"
        )
        if self.needed is None:
            return f"{said}. What a GPU needs is not known for this recipe: --rate gives its samples/s"
        if self.here >= self.needed:
            return f"{said}. {gpus} x GPU take {self.needed:,.0f}: enough"
        short = self.needed / self.core
        return f"{said}. {gpus} x GPU take {self.needed:,.0f}: they would wait, {short:.0f} cores would do"


def measure(cfg: CfgNode, gpus: int, rate: float | None) -> Speed:
    """Read samples of the training set in this process, spread over it, for `_SECONDS` at most.

    Args:
        cfg: the recipe.
        gpus: how many train.
        rate: samples a second that one trains on; None = not known.

    Raises:
        UserError: there is no training set.
    """
    dataset = dataset_spec(cfg, "TRAIN").build(cfg, DatasetRequest("train", True, build_mask_sampler(cfg)))
    indices = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLES).round().astype(int))
    read, started = 0, time.perf_counter()
    for index in indices.tolist():
        try:
            dataset[SampleKey(0, index)]
        except UnreadableSample:
            continue
        read += 1
        if time.perf_counter() - started > _SECONDS:
            break
    core = read / (time.perf_counter() - started)
    return Speed(core, available_cores(), None if rate is None else rate * gpus)
