"""Scores that no step can use, ten times in a row: an error that names the likely cause."""

from __future__ import annotations

import math
from collections.abc import Sequence

from balanceopt._deferred import DeferredCounts
from balanceopt.monitor import ModalitySums

# Steps in a row without usable scores before it is an error.
SILENT_STEPS = 10
# How far a mean score may be from 1 / C by rounding, in parts of it.
_EQUAL = 1e-6


class Useless:
    """Count the steps in a row whose scores can't be used, and those from the first on whose scores tell nothing."""

    def __init__(self, modalities: Sequence[str]) -> None:
        """Expect sums over the samples of these modalities."""
        self._modalities = modalities
        self._counted = 0, 0  # steps, and those of them that were unusable
        self._sums: ModalitySums | None = None
        self.restart()

    def restart(self) -> None:
        """Count from 0."""
        self._before = self._counted
        self._telling = False
        self._equal = DeferredCounts(("telling", "equal"), self._judge_equal)

    def note(self, sums: ModalitySums) -> None:
        """Note the scores of a step.

        Raises:
            RuntimeError: after ten that are equal for each modality and class, as soon as that is known.
        """
        self._sums = sums
        if not self._telling:
            # Without any information about the sample a softmax gives every class the same probability.
            classes = sums.label_counts.numel()
            equal = ((sums.mean_score * classes - 1).abs() < _EQUAL).all()
            self._equal.add(telling=~equal, equal=equal)

    def judge(self, steps: int, unusable: int) -> None:
        """Look at how many `steps` there were so far, and how many of them were `unusable`.

        Raises:
            RuntimeError: if ten in a row were.
        """
        self._counted = steps, unusable
        in_a_row = unusable - self._before[1]
        if in_a_row < steps - self._before[0]:
            self._before = self._counted
        elif in_a_row >= SILENT_STEPS:
            cause = self._cause()
            self.restart()
            raise RuntimeError(
                f"{SILENT_STEPS} steps in a row had scores that can't be used: training goes on without balancing. "
                f"Likely cause: {cause}. Pass strict=False to go on regardless."
            )

    def _judge_equal(self, counts: dict[str, int]) -> None:
        self._telling = counts["telling"] > 0
        if not self._telling and counts["equal"] >= SILENT_STEPS:
            self.restart()
            raise RuntimeError(
                f"in {SILENT_STEPS} steps in a row each modality alone gave every class the same probability: there "
                "is nothing to compare. All uni-modal scores are equal where zeroing the others removes the comparison "
                "that makes the logits, as in contrastive learning (InfoNCE, CLIP). Pass `scores=`, a function that "
                "returns each modality's own logits, or use what needs no scores: UnimodalObjective, re-learning. "
                "Pass strict=False to go on regardless."
            )

    def _cause(self) -> str:
        assert self._sums is not None
        # Only on the way to an error: here waiting for the device is no matter.
        score, present = self._sums.score.cpu(), self._sums.present.cpu()
        here = [name for name, one in zip(self._modalities, present.tolist(), strict=True) if one]
        if len(here) < 2:
            return f"samples had only {here}: give every encoder its batch, and labels to samples with two modalities"
        bad = [name for name, s in zip(self._modalities, score.tolist(), strict=True) if not math.isfinite(s)]
        if not bad:
            return "the probability of the true class is 0 for every modality (other labels than the loss's?)"
        return (
            f"the logits of {bad} alone are not finite. Features of the others that are zeroed make NaN where the "
            "fusion divides by their norm (CLIP, SigLIP, cosine heads): use torch.nn.functional.normalize, which adds "
            "an eps, or pass `scores=`, a function that returns each modality's own logits"
        )
