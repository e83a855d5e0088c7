"""From hooks to scores: what each modality alone would have answered."""

from balanceopt.monitor._accumulator import Accumulator
from balanceopt.monitor._monitor import ModalityMonitor
from balanceopt.monitor._outputs import map_tensors, tensors_in
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._sums import ModalitySums
from balanceopt.monitor._supported import in_backward

__all__ = [
    "Accumulator",
    "ModalityMonitor",
    "ModalitySums",
    "Pass",
    "in_backward",
    "map_tensors",
    "tensors_in",
]
