"""Forward methods: change features before the fusion, such as dropping those of the dominant modality (OPM)."""

from balanceopt.prediction._base import ForwardMethod
from balanceopt.prediction._dropout import ModalityDropout
from balanceopt.prediction._modulator import OPM

__all__ = ["OPM", "ForwardMethod", "ModalityDropout"]
