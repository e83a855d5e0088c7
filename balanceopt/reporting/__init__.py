"""The report of a recorded run: what each modality does, what is wrong, and what to try."""

from balanceopt.reporting._report import Report, report
from balanceopt.reporting._rules import RULES, SOURCES, Finding, Rule

__all__ = ["RULES", "SOURCES", "Finding", "Report", "Rule", "report"]
