"""Gradient methods: change the modalities' gradients, or a step's update, by the scores of the step."""

from balanceopt.modulation._agm import AGM
from balanceopt.modulation._amss import AMSS
from balanceopt.modulation._base import Modulation, OptimizerHintWarning, Slot, StepContext
from balanceopt.modulation._fixed import FixedModulation
from balanceopt.modulation._hiding import Hiding
from balanceopt.modulation._inforeg import InfoReg
from balanceopt.modulation._masks import MaskScale
from balanceopt.modulation._mlb import MLB
from balanceopt.modulation._ogm import OGM
from balanceopt.modulation._scaling import GradientScaling, UpdateScaling
from balanceopt.modulation._units import MaskUnits, attention_heads

__all__ = [
    "AGM",
    "AMSS",
    "FixedModulation",
    "GradientScaling",
    "Hiding",
    "InfoReg",
    "MLB",
    "MaskScale",
    "MaskUnits",
    "Modulation",
    "OGM",
    "OptimizerHintWarning",
    "Slot",
    "StepContext",
    "UpdateScaling",
    "attention_heads",
]
