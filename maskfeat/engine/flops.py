"""Multiply-adds of a forward pass, counted without computing anything."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from maskfeat.models.base import Backbone


def multiply_adds(backbone: Backbone) -> float:
    """Multiply-adds of a backbone for one clip of the size it was built for.

    Relative positions are counted as they are computed here: folded into queries and keys, padding included.
    PyTorch's counter works on shapes alone; fvcore's would have to run the model.

    Args:
        backbone: built on the meta device; left in evaluation mode.
    """
    backbone.eval()  # one sample is too few for batch statistics
    clip = torch.empty(1, 3, *backbone.clip_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.forward_tokens(clip)
    return counter.get_total_flops() / 2
