"""What each encoder knows, by linear heads that are trained beside the model."""

from balanceopt.probes._losses import ProbeLosses
from balanceopt.probes._monitor import ProbeMonitor

__all__ = ["ProbeLosses", "ProbeMonitor"]
