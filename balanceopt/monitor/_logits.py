"""Uni-modal logits of a training pass, by fusion: what each modality alone would have answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from balanceopt._options import check_choice, check_entries, check_kind, is_whole, shown
from balanceopt.modality import unwrap
from balanceopt.monitor._answers import Answers
from balanceopt.monitor._columns import (
    NoMatchError,
    is_projection,
    projection_number,
    projection_numbered,
)
from balanceopt.monitor._features import Features
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._per_head import PerHead
from balanceopt.monitor._split import SplitHead
from balanceopt.monitor._zero_out import ZeroOut

UserScores = Callable[[dict[str, Tensor]], Mapping[str, Tensor] | Sequence[Tensor] | Tensor]


def choose_scores(
    scores: str | UserScores,
    model: nn.Module,
    encoders: Mapping[str, nn.Module],
    head: nn.Module | Mapping[str, nn.Module] | None,
    slices: Mapping[str, slice] | None,
    features: Features,
    answers: Answers,
) -> UnimodalLogits | None:
    """The way to uni-modal logits that `scores` asks for; None for features only.

    Raises:
        ValueError: if `scores` is unknown, or does not go with the head.
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
        return UserFunction(
            scores, features, answers, next(iter(head.values())) if isinstance(head, Mapping) else head
        )
    if isinstance(head, Mapping):
        if scores not in ("auto", "per-head"):
            raise ValueError(
                f"with a head for each modality `scores` should be 'per-head'. Found {scores!r}."
            )
        return PerHead(head, features, answers)
    return _of_joint_head(scores, model, head, slices, features, answers)


def _of_joint_head(
    scores: str,
    model: nn.Module,
    head: nn.Module,
    slices: Mapping[str, slice] | None,
    features: Features,
    answers: Answers,
) -> UnimodalLogits:
    if scores == "per-head":
        raise ValueError("`scores='per-head'` needs a mapping from modality to its own head. Found one head.")
    inner = unwrap(head)
    if scores == "zero-out" or (scores == "auto" and not isinstance(inner, nn.Linear)):
        return ZeroOut(model, features.encoders, head, features, answers)
    if not isinstance(inner, nn.Linear):
        raise ValueError(
            f"`scores='split'` needs a linear head. Found {type(inner).__name__}: use 'zero-out' or a function."
        )
    split = SplitHead(inner, list(features.encoders), slices, features)
    if scores == "split" or slices:
        return split
    return Automatic(split, ZeroOut(model, features.encoders, head, features, answers))


class UnimodalLogits(Protocol):
    """How the uni-modal logits of a pass are made."""

    @property
    def name(self) -> str:
        """What `stats()` and `repr` call it."""

    @property
    def needs_outputs(self) -> bool:
        """Whether it needs the encoders' whole outputs and the model's inputs."""

    @property
    def knows_layout(self) -> bool:
        """Whether passes have shown all that there is to know of the way from encoders to head."""

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        """Logits `(N, C)` of each modality that was present; empty where this pass can't tell."""

    def replayed(self) -> list[nn.Module]:
        """The modules whose code it may run once more."""

    def join(self, current: Pass) -> None:
        """Take part in what the ranks do together in every pass, where this one has no row."""


class UserFunction:
    """Uni-modal logits from the user's own function of the features."""

    needs_outputs = False
    knows_layout = True

    def __init__(self, function: UserScores, features: Features, answers: Answers, head: nn.Module) -> None:
        """Call `function` with the features of every modality; it returns logits as `head` does."""
        self.function = function
        self.modalities = list(features.encoders)
        self.features, self.answers, self.head = features, answers, head
        self.name = f"function {getattr(function, '__name__', type(function).__name__)}"

    def replayed(self) -> list[nn.Module]:
        """None: what the function runs is the user's."""
        return []

    def join(self, current: Pass) -> None:
        """Nothing that is known of."""

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        with torch.no_grad():
            known = current.features
            features = {
                name: known[name] if name in known else self.features.of(name, current.pending[name])
                for name in current.calls
            }
            logits = self.function(features)
        if not isinstance(logits, Mapping):
            if len(logits) != len(self.modalities):
                raise ValueError(
                    f"`scores` should return logits for each of {self.modalities}. Found {len(logits)}."
                )
            logits = dict(zip(self.modalities, logits, strict=True))
        unknown = logits.keys() - set(self.modalities)
        if unknown:
            raise KeyError(
                f"`scores` should return logits by modality {self.modalities}. Found {sorted(logits)}."
            )
        rows = {name: self.answers.rows(self.head, value.detach()).float() for name, value in logits.items()}
        for name, value in rows.items():
            if current.logits is not None and value.shape != current.logits.shape:
                raise ValueError(
                    f"the logits that `scores` returns for {name!r} should have the shape "
                    f"{tuple(current.logits.shape)} of the joint ones. Found {tuple(value.shape)}."
                )
        return rows


class Automatic:
    """The first of split, per-head and zero-out that is exact for this model, chosen on the first pass."""

    def __init__(self, split: SplitHead, otherwise: UnimodalLogits) -> None:
        """Try `split`; where a feature is not in the head's input, take `otherwise` for good."""
        self.chosen: UnimodalLogits = split
        self._first = split
        self._otherwise: UnimodalLogits | None = otherwise

    @property
    def name(self) -> str:
        """Of the one chosen; "auto" until a pass has shown which."""
        return "auto" if self.needs_outputs and self._otherwise is not None else self.chosen.name

    @property
    def needs_outputs(self) -> bool:
        """Until a pass has shown that the first one will do."""
        return self._otherwise is None or not self._first.knows_layout

    @property
    def knows_layout(self) -> bool:
        """As the one chosen."""
        return self.chosen.knows_layout

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        try:
            return self.chosen(current)
        except NoMatchError:
            if self._otherwise is None:
                raise
            self.give_up()
            return self.chosen(current)

    def replayed(self) -> list[nn.Module]:
        """As the one chosen, or as the one that may be chosen in its place."""
        pending = self._otherwise if self.needs_outputs else None
        return [*self.chosen.replayed(), *(pending.replayed() if pending is not None else [])]

    def join(self, current: Pass) -> None:
        """As the one chosen."""
        self.chosen.join(current)

    def give_up(self) -> None:
        """Take `otherwise` from now on."""
        if self._otherwise is not None:
            self.chosen, self._otherwise = self._otherwise, None


def layout_of(scores: UnimodalLogits | None, features: Features) -> dict[str, Any]:
    """Which kind of scores was chosen, each modality's columns and features, and how these become what the head gets.

    A pass whose features were dropped can't always show it again, and training goes on with one after a resume.
    """
    chosen = scores.chosen if isinstance(scores, Automatic) else scores
    columns = chosen.columns if isinstance(chosen, SplitHead) else {}
    projections = features.projections
    return {
        "scores": None if chosen is None else chosen.name,
        "columns": {name: [own.start, own.stop] for name, own in columns.items() if name in projections},
        "projections": {name: projection_number(own) for name, own in projections.items()},
        "features": dict(features.paths),
    }


def check_layout(layout: dict[str, Any]) -> None:
    """Refuse what `layout_of` can't have told.

    Raises:
        TypeError: if it, or its columns or projections, are no mapping.
        KeyError: if an entry is missing.
        ValueError: for columns that are no range, and unknown projections.
    """
    check_entries("the layout", layout, ("scores", "columns", "projections", "features"))
    for part in ("columns", "projections", "features"):
        check_kind(f"the layout's {part}", layout[part], Mapping, "a mapping from modality to numbers")
    if layout["scores"] is not None and not isinstance(layout["scores"], str):
        raise ValueError(f"the layout's scores should be a name or None. Found {shown(layout['scores'])}.")
    for name, own in layout["columns"].items():
        pair = isinstance(own, (list, tuple)) and len(own) == 2 and all(map(is_whole, own))
        if not pair or not 0 <= own[0] < own[1]:
            raise ValueError(f"the layout's columns of {name!r} should be [start, stop]. Found {shown(own)}.")
    for name, number in layout["projections"].items():
        if not is_whole(number) or not is_projection(number):
            raise ValueError(f"the layout's projection of {name!r} is unknown. Found {shown(number)}.")
    for name, path in layout["features"].items():
        check_kind(
            f"the layout's features of {name!r}", path, str, "the way to a tensor in the encoder's output"
        )


def lay_out(scores: UnimodalLogits | None, features: Features, layout: dict[str, Any]) -> None:
    """Take over what `layout_of` told; of a layout that can't be read, nothing.

    Raises:
        TypeError, KeyError, ValueError: as `check_layout`; for columns that the head does not have.
    """
    check_layout(layout)
    columns = {name: slice(*own) for name, own in layout["columns"].items()}
    projections = {name: projection_numbered(number) for name, number in layout["projections"].items()}
    if isinstance(scores, Automatic):
        if layout["scores"] != scores.chosen.name:
            scores.give_up()
        scores = scores.chosen
    if scores is None or scores.name != layout["scores"]:
        return  # another monitor: it finds out by itself
    if isinstance(scores, SplitHead):
        width = scores.head.in_features or max((own.stop for own in columns.values()), default=0)
        if any(own.stop > width for own in columns.values()):
            raise ValueError(f"the layout should be of a head of {width} columns. Found {layout['columns']}.")
        scores.columns.update(columns)
    features.projections.update(projections)
    features.paths.update(layout["features"])
