"""The methods: from the sums of a step to a change of the modalities' gradients."""

from balanceopt.modulation._base import Modulation, OptimizerHint, Slot, Step, Undo
from balanceopt.modulation._ogm import OGM

__all__ = ["OGM", "Modulation", "OptimizerHint", "Slot", "Step", "Undo"]
