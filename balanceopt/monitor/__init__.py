"""From hooks to scores: what each modality alone would have answered."""

from balanceopt.monitor._accumulator import Accumulator
from balanceopt.monitor._monitor import ModalityMonitor
from balanceopt.monitor._sums import ModalitySums

__all__ = ["Accumulator", "ModalityMonitor", "ModalitySums"]
