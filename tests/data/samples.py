"""Samples as a batch holds them."""

import torch
from torch import Tensor

from maskfeat.data.collate import collate
from maskfeat.data.sample import Sample


def clip_of(sample: Sample) -> Tensor:
    """(C, [T,] H, W) float32: the sample with its deferred transform applied, on the CPU."""
    return collate([[sample]]).to_batch(torch.device("cpu")).clip[0]
