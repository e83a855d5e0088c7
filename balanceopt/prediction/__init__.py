"""OPM: drop features of the dominant modality in the forward pass, so that the other modalities learn."""

from balanceopt.prediction._base import ForwardMethod
from balanceopt.prediction._modulator import OPM

__all__ = ["OPM", "ForwardMethod"]
