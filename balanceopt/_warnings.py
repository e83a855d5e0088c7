"""Warnings that point at the user's line of code."""

from __future__ import annotations

import sys
import warnings

_INSIDE = ("balanceopt", "torch", "contextlib")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the nearest caller outside this package and torch."""
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in _INSIDE:
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


class WarnOnce:
    """Warnings of one object at the user's line of code, at most one of each kind."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def __call__(self, kind: str, message: str) -> None:
        """Warn with `message`, unless a warning of this `kind` was given before."""
        if kind not in self._kinds:
            self._kinds.add(kind)
            warn_user(message)
