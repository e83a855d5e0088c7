"""Diagnosing & Re-learning: re-initialisation of encoders by the purity gap of their features."""

from balanceopt.relearn._base import EpochMethod
from balanceopt.relearn._diagnosis import Diagnosis, diagnose
from balanceopt.relearn._scheduler import ReLearnScheduler

__all__ = ["Diagnosis", "EpochMethod", "ReLearnScheduler", "diagnose"]
