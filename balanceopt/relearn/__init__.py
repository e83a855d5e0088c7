"""Methods that act between epochs: re-initialisation of encoders, and weights of uni-modal losses."""

from balanceopt.relearn._base import EpochMethod
from balanceopt.relearn._blend import BlendScheduler
from balanceopt.relearn._diagnosis import Diagnosis, diagnose
from balanceopt.relearn._scheduler import ReLearnScheduler

__all__ = ["BlendScheduler", "Diagnosis", "EpochMethod", "ReLearnScheduler", "diagnose"]
