"""Diagnosing & Re-learning: from encoders' features to how far each encoder goes back."""

from balanceopt.relearn._base import EpochMethod
from balanceopt.relearn._diagnosis import Diagnosis, diagnose
from balanceopt.relearn._scheduler import ReLearnScheduler

__all__ = ["Diagnosis", "EpochMethod", "ReLearnScheduler", "diagnose"]
