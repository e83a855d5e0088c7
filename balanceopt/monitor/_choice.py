"""Choice of the kind of uni-modal logits for a head: the user's, or the first kind that is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from balanceopt._options import check_choice
from balanceopt.modality import unwrap
from balanceopt.monitor._answers import Answers
from balanceopt.monitor._columns import NoMatchError
from balanceopt.monitor._features import Features
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._logits import UnimodalLogits, UserFunction, UserScores, check_layout
from balanceopt.monitor._per_head import PerHead
from balanceopt.monitor._split import SplitHead
from balanceopt.monitor._zero_out import Fill, ZeroOut


def choose_logits(
    scores: str | UserScores,
    model: nn.Module,
    head: nn.Module | Mapping[str, nn.Module] | None,
    slices: Mapping[str, slice] | None,
    features: Features,
    answers: Answers,
    fill: Fill,
) -> UnimodalLogits | None:
    """Build the uni-modal logits that `scores` asks for; None for features only.

    Raises:
        ValueError: if `scores` is unknown, or does not fit the head.
    """
    if not callable(scores) or isinstance(scores, type):
        check_choice("scores", scores, ("auto", "split", "per-head", "zero-out"), other=", or a function")
    linear = isinstance(head, nn.Module) and isinstance(unwrap(head), nn.Linear)
    if slices and not (linear and scores in ("auto", "split")):
        raise ValueError(
            "`slices` go with one linear head over concatenated features. "
            f"Found {'several heads' if isinstance(head, Mapping) else type(head).__name__} and scores={scores!r}."
        )
    if head is None:
        if scores == "auto":
            return None
        raise ValueError(
            f"`scores={scores!r}` needs `head=`, whose output tells that a pass counts. Found None."
        )
    if callable(scores):
        one = next(iter(head.values())) if isinstance(head, Mapping) else head
        return UserFunction(scores, features, answers, one)
    if isinstance(head, Mapping):
        if scores not in ("auto", "per-head"):
            raise ValueError(
                f"with a head for each modality `scores` should be 'per-head'. Found {scores!r}."
            )
        return PerHead(head, features, answers)
    return _of_joint_head(scores, model, head, slices, features, answers, fill)


def _of_joint_head(
    scores: str,
    model: nn.Module,
    head: nn.Module,
    slices: Mapping[str, slice] | None,
    features: Features,
    answers: Answers,
    fill: Fill,
) -> UnimodalLogits:
    if scores == "per-head":
        raise ValueError("`scores='per-head'` needs a mapping from modality to its own head. Found one head.")
    inner = unwrap(head)
    zero_out = ZeroOut(model, head, features, answers, fill)
    if scores == "zero-out" or (scores == "auto" and not isinstance(inner, nn.Linear)):
        return zero_out
    if not isinstance(inner, nn.Linear):
        raise ValueError(
            f"`scores='split'` needs a linear head. Found {type(inner).__name__}: use 'zero-out' or a function."
        )
    split = SplitHead(inner, slices, features)
    return split if scores == "split" or slices else Automatic(split, zero_out)


class Automatic(UnimodalLogits):
    """Uni-modal logits by split if that is exact for this model, else by zero-out; chosen on the first pass.

    Attributes:
        chosen: the kind of uni-modal logits in use.
    """

    def __init__(self, split: SplitHead, otherwise: UnimodalLogits) -> None:
        """Try `split`; where features are not in the head's input, change to `otherwise` for good."""
        super().__init__(split.features)
        self.chosen: UnimodalLogits = split
        self.columns = split.columns
        self._otherwise: UnimodalLogits | None = otherwise

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        try:
            return self.chosen(current)
        except NoMatchError:
            if self._otherwise is None:
                raise
            self._give_up()
            return self.chosen(current)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the chosen kind of logits; "auto" until a pass has decided."""
        return "auto" if self._is_open else self.chosen.name

    @property
    def needs_outputs(self) -> bool:
        """Whether passes must keep whole outputs and inputs; true until a pass has shown that split is exact."""
        return self._is_open or self.chosen.needs_outputs

    @property
    def are_parts(self) -> bool:  # type: ignore[override]
        """Whether the chosen kind's logits are parts of a sum."""
        return self.chosen.are_parts

    @property
    def knows_layout(self) -> bool:
        """Whether the chosen kind of logits has its layout."""
        return self.chosen.knows_layout

    def replayed(self) -> list[nn.Module]:
        """Return the modules that scoring may run again, for the alternative too while that may be chosen."""
        others = self._otherwise.replayed() if self._is_open and self._otherwise is not None else []
        return [*self.chosen.replayed(), *others]

    def join(self, current: Pass) -> None:
        """Take part in the chosen kind's collectives in a pass without rows."""
        self.chosen.join(current)

    def live(self, name: str, features: Tensor, samples: int) -> Tensor:
        """Return the chosen kind's logits `(B, C)` of clean features, attached to the graph."""
        return self.chosen.live(name, features, samples)

    def layout(self) -> dict[str, Any]:
        """Return the layout of the chosen kind of logits."""
        return self.chosen.layout()

    def load_layout(self, layout: Mapping[str, Any]) -> None:
        """Choose the kind of logits that saved the layout, and load the layout there."""
        check_layout(layout)
        if layout["scores"] != self.chosen.name and self._otherwise is not None:
            self._give_up()
        self.chosen.load_layout(layout)

    @property
    def _is_open(self) -> bool:
        """Whether no pass has decided yet between split and the alternative."""
        return self._otherwise is not None and not self.chosen.knows_layout

    def _give_up(self) -> None:
        if self._otherwise is not None:
            self.chosen, self._otherwise = self._otherwise, None
            self.columns = self.chosen.columns
