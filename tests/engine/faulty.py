"""A module for PLUGINS: the objective "Faulty", which raises what FAULT names, on the ranks that FAULT names."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from yacs.config import CfgNode

from maskfeat.batch import Batch
from maskfeat.errors import UserError
from maskfeat.models.base import Backbone
from maskfeat.objectives.base import StepOutput
from maskfeat.objectives.maskfeat import MaskFeat, sample_patches
from maskfeat.registry import ObjectiveSpec, register


class Faulty(MaskFeat):
    def forward(self, batch: Batch) -> StepOutput:
        kind, _, ranks = os.environ["FAULT"].partition("@")
        if not ranks or str(dist.get_rank()) in ranks.split(","):
            if kind == "unpack":
                _, _ = [1]
            elif kind == "shape":
                torch.zeros(2, 3) @ torch.zeros(2, 3)
            elif kind == "file":
                Path("/no/such/file").read_text()
            elif kind == "user":
                raise UserError("the data are upside down: set DATA.UPSIDE_DOWN")
        return super().forward(batch)


def build(cfg: CfgNode, backbone: Backbone) -> Faulty:
    return Faulty(backbone)


register(
    ObjectiveSpec(name="Faulty", build=build, losses=("multi_mse",), hides_patches=True, mask_sampler=sample_patches)
)
