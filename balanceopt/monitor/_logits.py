"""Uni-modal logits of a training pass: the head's output for each modality alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from balanceopt._options import check_entries, check_kind, is_whole, shown
from balanceopt.monitor._answers import Answers
from balanceopt.monitor._columns import is_projection, projection_number, projection_numbered
from balanceopt.monitor._features import Features
from balanceopt.monitor._forward import Pass

UserScores = Callable[[dict[str, Tensor]], Mapping[str, Tensor] | Sequence[Tensor] | Tensor]


class UnimodalLogits(ABC):
    """Base of the kinds of uni-modal logits, one kind for each kind of fusion.

    Attributes:
        name: name of the kind in `stats()` and `repr`.
        features: layout from the encoders' outputs to the head.
        columns: each modality's columns of a linear head's weight, as shown by passes; empty for other heads.
        are_parts: whether the logits of the modalities are parts of a sum, which are no predictions in regression
            unless centred.
    """

    name: str
    are_parts = False

    def __init__(self, features: Features) -> None:
        self.features = features
        self.columns: dict[str, slice] = {}

    @abstractmethod
    def __call__(self, current: Pass) -> dict[str, Tensor]:
        """Return logits `(N, C)` of each present modality; empty if the pass does not determine the logits."""

    @property
    def needs_outputs(self) -> bool:
        """Whether passes must keep the encoders' whole outputs and the model's inputs."""
        return False

    @property
    def knows_layout(self) -> bool:
        """Whether passes have shown the whole layout from encoders to head."""
        return True

    def replayed(self) -> list[nn.Module]:
        """Return the modules that scoring may run again."""
        return []

    def join(self, current: Pass) -> None:
        """Take part in the collectives of scoring in a pass without rows."""

    def live(self, name: str, features: Tensor, samples: int) -> Tensor:
        """Return the head's logits `(B, C)` of one modality's clean features, attached to both graphs.

        Raises:
            ValueError: if this kind of fusion has no uni-modal head.
            RuntimeError: if no pass has shown how the features become the head's input.
        """
        raise ValueError(
            "the shared head's own answer to one modality needs a linear head on concatenated features "
            f"(scores='split') or a head for each modality ('per-head'). Found {self.name!r}."
        )

    def layout(self) -> dict[str, Any]:
        """Return the layout from encoders to head, as plain numbers for a checkpoint.

        The first pass after a resume may have dropped features, which do not always show the layout.
        """
        projections = self.features.projections
        columns = {name: [own.start, own.stop] for name, own in self.columns.items() if name in projections}
        return {
            "scores": self.name,
            "columns": columns,
            "projections": {name: projection_number(own) for name, own in projections.items()},
            "features": dict(self.features.paths),
        }

    def load_layout(self, layout: Mapping[str, Any]) -> None:
        """Load what `layout` returned; a layout of another kind of logits is skipped, a refused layout changes nothing.

        Raises:
            TypeError, KeyError, ValueError: as `check_layout`; for columns that the head does not have.
        """
        check_layout(layout)
        if layout["scores"] != self.name:
            return  # saved by another kind of logits, whose layout says nothing about this kind
        columns = {name: slice(*own) for name, own in layout["columns"].items()}
        self._check_columns(columns)
        self.columns.update(columns)
        numbers = layout["projections"].items()
        self.features.projections.update({name: projection_numbered(number) for name, number in numbers})
        self.features.paths.update(layout["features"])

    def _check_columns(self, columns: Mapping[str, slice]) -> None:
        """Raise for columns that the head does not have."""


class UserFunction(UnimodalLogits):
    """Uni-modal logits from the user's function of the features."""

    def __init__(self, function: UserScores, features: Features, answers: Answers, head: nn.Module) -> None:
        """Prepare for `function`, which maps the features of every modality to logits in the layout of `head`."""
        super().__init__(features)
        self.function = function
        self.modalities = list(features.encoders)
        self.answers, self.head = answers, head
        self.name = f"function {getattr(function, '__name__', type(function).__name__)}"

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


def check_layout(layout: Any) -> None:
    """Raise for a value that `UnimodalLogits.layout` can't have returned.

    Raises:
        TypeError: if the layout, or its columns, projections or features, are no mapping.
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
        what = f"the layout's features of {name!r}"
        check_kind(what, path, str, "the way to a tensor in the encoder's output")
