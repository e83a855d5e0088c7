"""Health of an optimizer's steps: irregularities by name, one warning each, an error after ten in a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from balanceopt._deferred import DeferredCounts
from balanceopt._warnings import WarnOnce
from balanceopt.monitor import ModalityMonitor, Scores

# Number of steps in a row without usable scores that raises an error.
_SILENT_STEPS = 10
# Relative tolerance of a mean score equal to 1 / C, for rounding.
_EQUAL = 1e-6
_ODDITIES = {
    "unusable_scores": "scores are not finite, all zero, or of fewer than two modalities: the step was left to the "
    "base optimizer. stats() counts such steps apart from modulated ones; a fusion that divides by the norm of its "
    "features makes NaN of zeroed ones, and regression predictions many spreads of the targets away from these score "
    "0 (standardise the targets, or start from their mean as the head's bias).",
    "nonfinite_gradients": "gradients that are not finite were left as they are. stats() counts them.",
}
# Private counters, beside those named by methods.
_SCORED, _TELLING, _EQUAL_STEPS = "_scored", "_telling", "_equal"


class Health:
    """Count the irregularities of steps without device synchronisation, and warn once of each.

    Args:
        monitor: the monitor, which explains missing scores.
        strict: raise after ten steps in a row with no scores, unusable scores, or equal ones.

    Attributes:
        warn: warns once of each kind of irregularity.
    """

    def __init__(self, monitor: ModalityMonitor, *, strict: bool) -> None:
        self._monitor = monitor
        self._strict = strict
        self.warn = WarnOnce()
        self._steps = {"modulated": 0, "without_scores": 0, "outside_window": 0}
        self._silent = 0
        self._counts = DeferredCounts((_SCORED, _TELLING, _EQUAL_STEPS, *_ODDITIES))
        self._scores: Scores | None = None
        self._seen = self._counts.read()
        self.restart()

    def restart(self) -> None:
        """Reset the counts of steps in a row."""
        self._silent = 0
        self._before = self._seen
        self._telling = False

    def outside_window(self) -> None:
        """Count a step in which no method acts."""
        self._steps["outside_window"] += 1

    def without_scores(self) -> None:
        """Count a step without scores.

        Raises:
            RuntimeError: after ten such steps in a row.
        """
        self._steps["without_scores"] += 1
        self._silent += 1
        why = self._monitor.silence()
        if self._strict and self._silent >= _SILENT_STEPS:
            raise RuntimeError(
                f"no scores in {self._silent} steps in a row: training goes on without balancing. "
                f"Likely causes: {why}. Pass strict=False to go on regardless."
            )
        self.warn("silent", f"no scores since the last step: the step was left unmodulated ({why}).")

    def modulated(self, scores: Scores | None, counts: dict[str, Tensor]) -> None:
        """Count a step in which methods acted, and judge the counts that can be read without synchronising.

        Args:
            scores: the step's scores; None where no method that acted needs scores.
            counts: the irregularities that the methods found in the step, 0-d.

        Raises:
            RuntimeError: after ten steps in a row whose scores are unusable or equal.
        """
        self._steps["modulated"] += 1
        self._counts.add(**(counts if scores is None else self._with_usability(scores, counts)))
        seen = self._counts.arrived()
        if seen is None:
            return
        self._seen = seen
        for name, message in _ODDITIES.items():
            if seen[name]:
                self.warn(name, message)
        if self._strict:
            self._judge(seen)

    def _with_usability(self, scores: Scores, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a step's counts with those of the usability of its scores."""
        self._silent = 0
        self._scores = scores
        unusable = ~scores.usable.any()
        if "unusable_scores" in counts:
            unusable = unusable | counts["unusable_scores"]
        counts = {**counts, _SCORED: torch.ones_like(unusable), "unusable_scores": unusable}
        if self._strict and not self._telling:
            # Logits without information about the sample give every class the same probability 1 / C.
            classes = scores.label_counts.numel()  # 0 for losses without classes
            equal = ((scores.mean_score * classes - 1).abs() < _EQUAL).all() & (classes > 0)
            counts |= {_TELLING: ~equal, _EQUAL_STEPS: equal}
        return counts

    def stats(self) -> dict[str, int]:
        """Return counts of steps modulated, without scores and outside the window, and those of methods, by name."""
        counts = {name: count for name, count in self._counts.read().items() if not name.startswith("_")}
        # Subtracted here, because a step does not synchronise with its device to learn that its scores are unusable.
        return {**self._steps, "modulated": self._steps["modulated"] - counts["unusable_scores"], **counts}

    def _judge(self, seen: dict[str, int]) -> None:
        scored, unusable = (seen[name] - self._before[name] for name in (_SCORED, "unusable_scores"))
        self._telling = self._telling or seen[_TELLING] > self._before[_TELLING]
        equal = seen[_EQUAL_STEPS] - self._before[_EQUAL_STEPS]
        if unusable < scored:
            self._before = {
                **self._before,
                _SCORED: seen[_SCORED],
                "unusable_scores": seen["unusable_scores"],
            }
        elif unusable >= _SILENT_STEPS:
            cause = self._cause()
            self.restart()
            raise RuntimeError(
                f"{_SILENT_STEPS} steps in a row had scores that can't be used: training goes on without balancing. "
                f"Likely cause: {cause}. Pass strict=False to go on regardless."
            )
        if not self._telling and equal >= _SILENT_STEPS:
            self.restart()
            raise RuntimeError(
                f"in {_SILENT_STEPS} steps in a row each modality alone gave every class the same probability: there "
                "is nothing to compare. All uni-modal scores are equal where zeroing the others removes the comparison "
                "that makes the logits, as in contrastive learning (InfoNCE, CLIP). Pass `scores=`, a function that "
                "returns each modality's own logits, or use what needs no scores: UnimodalObjective, re-learning. "
                "Pass strict=False to go on regardless."
            )

    def _cause(self) -> str:
        assert self._scores is not None
        # A device synchronisation is acceptable, because an error follows.
        score, present = self._scores.score.cpu(), self._scores.present.cpu()
        names = self._monitor.modalities
        here = [name for name, one in zip(names, present.tolist(), strict=True) if one]
        if len(here) < 2:
            return f"samples had only {here}: give every encoder its batch, and labels to samples with two modalities"
        bad = [name for name, s in zip(names, score.tolist(), strict=True) if not math.isfinite(s)]
        if self._scores.loss.scale_free and len(bad) == len(here):
            return (
                "a step of one sample, or of equal targets, tells no scale of the loss: take larger batches, or "
                "accumulate gradients over several. Otherwise predictions or targets are not finite"
            )
        if not bad and self._scores.loss.scale_free:
            return (
                "predictions lie many spreads of the targets away from them: standardise the targets, or start from "
                "their mean as the head's bias"
            )
        if not bad:
            return "the probability of the true class is 0 for every modality (other labels than the loss's?)"
        return (
            f"the logits of {bad} alone are not finite. Features of the others that are zeroed make NaN where the "
            "fusion divides by their norm (CLIP, SigLIP, cosine heads): use torch.nn.functional.normalize, which adds "
            "an eps, or pass `scores=`, a function that returns each modality's own logits"
        )
