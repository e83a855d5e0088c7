"""What one consumer of the monitor has not used yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from balanceopt.monitor._pass import Pass
from balanceopt.monitor._sums import ModalitySums


class Accumulator:
    """Passes that backward has reached since the consumer last took them.

    Several consumers of one monitor have one each, so that none takes the other's scores; each pass is scored once.
    """

    def __init__(
        self,
        settle: Callable[[Pass], ModalitySums | None],
        leave: Callable[[Accumulator], None],
        *,
        needs_entropy: bool,
        steps: bool,
    ) -> None:
        """Sum passes by `settle`; `needs_entropy` asks the monitor for the features' entropies too."""
        self.needs_entropy = needs_entropy
        self.steps = steps
        self._settle = settle
        self._leave = leave
        self._sums: ModalitySums | None = None
        self._latest: Pass | None = None

    def add(self, done: Pass) -> None:
        """Note a pass. It is scored when the next one comes or the sums are taken: labels may still arrive."""
        self._fold()
        self._latest = done

    def take(self) -> ModalitySums | None:
        """The sums over the passes since the last take or discard, and start anew; None where no pass had any."""
        self._fold()
        sums = self._sums
        self.discard()
        return sums

    def peek(self) -> ModalitySums | None:
        """The sums that the next take would give, as far as they are of passes since the last one; they stay."""
        self._fold()
        return self._sums

    def discard(self) -> None:
        """Forget what was not taken."""
        if self._latest is not None:
            self._latest.closed = True
        self._sums, self._latest = None, None

    def remove(self) -> None:
        """Take no pass any more. May be called twice."""
        self.discard()
        self._leave(self)

    def _fold(self) -> None:
        done, self._latest = self._latest, None
        if done is None:
            return
        sums = self._settle(done)
        if sums is not None:
            self._sums = sums if self._sums is None else self._sums + sums

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has a monitor that watches nothing, and a pass holds a graph, which can't be copied.
        return _inert, (self.needs_entropy, self.steps)


def _inert(needs_entropy: bool, steps: bool) -> Accumulator:
    return Accumulator(lambda done: None, lambda one: None, needs_entropy=needs_entropy, steps=steps)
