"""From hooks to scores: what each modality alone would have answered."""

from balanceopt.monitor._columns import as_rows
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._hooks import WeakHook
from balanceopt.monitor._labels import two_classes
from balanceopt.monitor._logits import check_layout
from balanceopt.monitor._monitor import ModalityMonitor
from balanceopt.monitor._outputs import logits_of, map_tensors, tensors_in
from balanceopt.monitor._replay import random_state_kept
from balanceopt.monitor._scores import Accumulator
from balanceopt.monitor._sums import ModalitySums
from balanceopt.monitor._supported import in_backward, is_batched

__all__ = [
    "Accumulator",
    "ModalityMonitor",
    "ModalitySums",
    "Pass",
    "WeakHook",
    "as_rows",
    "check_layout",
    "in_backward",
    "is_batched",
    "logits_of",
    "map_tensors",
    "random_state_kept",
    "tensors_in",
    "two_classes",
]
