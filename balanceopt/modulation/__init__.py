"""The methods: from the sums of a step to a change of the modalities' gradients."""

from balanceopt.modulation._amss import AMSS
from balanceopt.modulation._base import Modulation, OptimizerHintWarning, Slot, Step
from balanceopt.modulation._masks import MaskScale
from balanceopt.modulation._ogm import OGM
from balanceopt.modulation._units import MaskUnits, attention_heads

__all__ = [
    "AMSS",
    "MaskScale",
    "MaskUnits",
    "Modulation",
    "OGM",
    "OptimizerHintWarning",
    "Slot",
    "Step",
    "attention_heads",
]
