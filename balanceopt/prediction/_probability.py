"""The drop probabilities, and how they follow the monitor's scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from balanceopt._deferred import DeferredCounts, on_host
from balanceopt._warnings import warn_user
from balanceopt.distributed import active_group, sum_over_ranks
from balanceopt.functional import discrepancy_ratio, drop_probability
from balanceopt.functional._scores import RatioReduction
from balanceopt.modulation._ogm import scores_usable
from balanceopt.monitor import ModalityMonitor, ModalitySums

# Updates without any score before the user is told; two forwards before one backward are nothing unusual.
_SILENT_UPDATES = 10


class DropProbabilities:
    """q of each modality, from the scores of the passes since the last update.

    Attributes:
        value: `(M,)`, on the device of the scores.
        possible: whether any of them may be above 0, as far as the host knows.
        pending: `(2, M)` summed scores and counts of this rank that a checkpoint brought, not in `value` yet.
        updates: how often scores came.
    """

    def __init__(
        self,
        monitor: ModalityMonitor,
        *,
        q_base: float,
        lam: float,
        ratio: RatioReduction,
        report: Callable[[str, Tensor], None],
    ) -> None:
        """Begin with q = 0."""
        self.monitor = monitor
        self.value = torch.zeros(len(monitor.modalities), dtype=torch.float32)
        self.possible = False
        self.pending: Tensor | None = None
        self.updates = 0
        self._q_base, self._lam, self._ratio = q_base, lam, ratio
        self._report = report
        self._accumulator = monitor.accumulator(steps=False)
        self._silent = 0
        self._unusable = DeferredCounts(("unusable_scores",), self._tell_unusable)
        self._told: set[str] = set()

    def update(self) -> None:
        """Follow the scores that came since the last update; a sum over ranks, which all of them have to join."""
        self.follow(self.fetch())

    def follow(self, own: Tensor | None) -> None:
        """Follow this rank's summed scores and counts `(2, M)`; None for none."""
        group = self.monitor.group
        if active_group(group) is not None:
            total: Tensor | None = sum_over_ranks(self._nothing() if own is None else own, group)
        else:
            total = own
        host = None if total is None else on_host(total)
        if total is None or (host is not None and not host[1].any()):
            self._silent += 1
            if self._silent >= _SILENT_UPDATES:
                self._tell_silence()
            return
        self._silent = 0
        self._set(total)

    def fetch(self) -> Tensor | None:
        """This rank's summed scores and counts `(2, M)` since the last update, which are then taken."""
        sums = self._accumulator.take()
        own = None if sums is None else scores_and_counts(sums)
        if self.pending is not None:
            own = self.pending if own is None else own + self.pending.to(own.device)
            self.pending = None
        return own

    def waiting(self) -> Tensor | None:
        """What the next `fetch` would give; it stays."""
        sums = self._accumulator.peek()
        if sums is None or self.pending is None:
            return self.pending if sums is None else scores_and_counts(sums)
        return scores_and_counts(sums) + self.pending.to(sums.score.device)

    def load(self, value: Tensor, pending: Tensor | None) -> None:
        """Go on from a checkpoint."""
        self.value = value.detach().clone()
        self.possible = bool(value.any())
        self.pending = None if pending is None else pending.detach().clone()
        self._silent = 0
        self._accumulator.discard()

    def unusable(self) -> int:
        """How often scores came that could not be used; waits for the device."""
        return self._unusable.read()["unusable_scores"]

    def close(self) -> None:
        """Take no more scores."""
        self._accumulator.discard()  # labels that are observed from now on are for another pass
        self.monitor.drop_accumulator(self._accumulator)

    def _set(self, total: Tensor) -> None:
        empty = ModalitySums.zeros(len(self.monitor.modalities), 2, total.device)
        sums = replace(empty, score=total[0], count=total[1])
        usable = scores_usable(sums)
        score, present = sums.mean_score, sums.present
        ratio = discrepancy_ratio(score, self._ratio, present)
        q = drop_probability(ratio, self._q_base, self._lam)  # TPAMI Eq. 8
        # Never the weakest, whatever the ratios' rounding says: no sample may lose all that it has.
        weakest = torch.where(present, score, torch.inf).min()
        q = q.masked_fill((score <= weakest) | ~present, 0)
        self.value = torch.where(usable, q, self.value.to(q.device))
        known = on_host(self.value)
        self.possible = known is None or bool(known.any())
        self.updates += 1
        self._unusable.add(~usable & (total[1] > 0).any())
        self._report("ratio", ratio)

    def _nothing(self) -> Tensor:
        device = next(self.monitor.model.parameters()).device
        return torch.zeros(2, len(self.monitor.modalities), device=device)

    def _tell_silence(self) -> None:
        self._tell(
            "silence",
            f"no scores in {_SILENT_UPDATES} training forwards in a row: OPM leaves its drop "
            f"probabilities as they are. Likely causes: {self.monitor.silence()}.",
        )

    def _tell_unusable(self, counts: dict[str, int]) -> None:
        if counts["unusable_scores"]:
            self._tell(
                "scores",
                "scores are not finite, all zero, or of fewer than two modalities: OPM leaves its drop "
                "probabilities as they are. stats() counts such updates.",
            )

    def _tell(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warn_user(message)


def scores_and_counts(sums: ModalitySums) -> Tensor:
    """`(2, M)`: all that the drop probabilities need of the sums."""
    return torch.stack([sums.score, sums.count])
