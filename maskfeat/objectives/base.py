"""The contract between the training loop and what is learned.

Shape legend: B samples, K classes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from maskfeat.batch import Batch, StepOutput
from maskfeat.checkpoint.weights import LoadReport, LoadRules, fit_state
from maskfeat.distributed.fsdp import like
from maskfeat.models.base import Backbone

BACKBONE = "backbone."


class Objective(nn.Module):
    """Base of every objective: a backbone, plus what turns its tokens into a loss.

    Subclasses implement `forward`, and `predict` where they classify (`classifies = True`).
    """

    classifies: bool = False
    num_classes: int = 0
    backbone: Backbone

    def forward(self, batch: Batch) -> StepOutput:
        """The loss of a batch and detached metrics, each a mean over `weight(batch)` terms."""
        raise AssertionError("an objective implements forward")

    def prepare(self, batch: Batch) -> Batch:
        """Draws that span a batch: called once in training, on its device, before it is cut into micro-batches."""
        return batch

    def weight(self, batch: Batch) -> Tensor:
        """Scalar float32 on the batch's device: over how many terms the loss of this batch is a mean.

        The loop weighs micro-batches and ranks by it, so that neither changes the gradient of a step.
        """
        return batch.clip.new_full((), float(len(batch)))

    def predict(self, batch: Batch) -> Tensor:
        """(B, K) float32 probabilities; only where `classifies`."""
        raise AssertionError(f"{type(self).__name__} does not classify")

    def load_rules(self, state: Mapping[str, Tensor]) -> LoadRules:
        """Which names may be missing from or left over in a released state, beside what the user allows."""
        return LoadRules()

    def released_name(self, name: str) -> str:
        """The name in released files for a parameter or buffer of this module."""
        return name.removeprefix(BACKBONE)

    def released_state(self) -> "OrderedDict[str, Tensor]":
        """An ordered dict with the released names; the tensors are the module's own, not copies."""
        return OrderedDict((self.released_name(name), value) for name, value in self.state_dict().items())

    def load_released_state(
        self, state: Mapping[str, Tensor], allow: Sequence[str] = (), average: bool = False
    ) -> LoadReport:
        """Load a state dict with released names.

        Args:
            state: parameters by released name, of this or another objective, image size or number of axes.
            allow: patterns (`fnmatch`) of names which may stay fresh or be left over without an error.
            average: how 2-D patch kernels become 3-D, see `fit_state`.

        Raises:
            ValueError: naming each parameter that is missing, left over or of another shape, and
                TRAIN.CHECKPOINT_ALLOW, which allows it.
        """
        own = self.released_state()
        fitted, report = fit_state(own, state, self.load_rules(state), allow, average)
        inside = {self.released_name(name): name for name in self.state_dict()}
        self.load_state_dict({inside[name]: like(value, own[name]) for name, value in fitted.items()}, strict=False)
        return report

    def layer_id(self, released_name: str) -> int:
        """Layer for layer-wise learning rate decay; what is not the backbone's is the last layer."""
        return self.backbone.layer_id(released_name)
