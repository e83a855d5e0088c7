"""Uni-modal logits of a linear head over concatenated features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from balanceopt._sharding import whole
from balanceopt._undo import Undo
from balanceopt.functional import linear_logits
from balanceopt.monitor._columns import (
    AmbiguousMatchError,
    Match,
    NoMatchError,
    as_rows,
    find_match,
    projected,
    projection_onto,
)
from balanceopt.monitor._features import Features
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._logits import UnimodalLogits
from balanceopt.monitor._replay import State, evaluate

# Error allowed in a matrix product, in roundings of its terms' absolute sum; precision of TF32 and bfloat16 products.
_ROUNDINGS = 16
_REDUCED = 2.0**-8


class SplitHead(UnimodalLogits):
    """Uni-modal logits `W^m z^m + b / M` of a linear head over concatenated features, Eq. 8 exactly."""

    name = "split"
    are_parts = True

    def __init__(self, head: nn.Linear, slices: Mapping[str, slice] | None, features: Features) -> None:
        """Prepare to split `head` by the user's `slices`, or by the columns that the first passes show."""
        super().__init__(features)
        self.head = head
        self.modalities = list(features.encoders)
        self.columns = dict(slices or {})
        self.projections = features.projections
        self._tried = False
        if slices is not None:
            self._check_slices()

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        x = as_rows(current.head_inputs[None])
        weight, share = self._detached()
        found = {}
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if not self._tried:
                self._tried = self._try(x, weight, share, current)
            for name in current.calls:
                z = self._clean_columns(name, current, x)
                if z is not None:
                    current.vectors[name] = z
                    found[name] = linear_logits([z.float()], weight[:, self.columns[name]], share)[0]
        return found

    def join(self, current: Pass) -> None:
        """Gather a sharded head, a collective of all ranks."""
        self._detached()

    @property
    def knows_layout(self) -> bool:
        """Whether passes have shown each modality's columns, and that weight and bias give the logits."""
        return self._tried and self.projections.keys() >= set(self.modalities)

    def live(self, name: str, features: Tensor, samples: int) -> Tensor:
        """Return the modality's logits `(B, C)` of clean features, attached to the graphs of features and head."""
        x = projected(name, self.projections.get(name), features, samples)
        weight, bias = self._parameters()
        weight, share = whole(weight), None if bias is None else whole(bias) / len(self.modalities)
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
        return nn.functional.linear(x, weight[:, self.columns[name]], share)

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias without changing the state of a parametrization, as a read in training mode may."""
        if is_parametrized(self.head):
            undo, modules = Undo(), list(self.head.modules())
            with undo, undo:
                State(undo, modules)
                evaluate(undo, modules)
                return self.head.weight, self.head.bias
        return self.head.weight, self.head.bias

    def _detached(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and each modality's share of the bias, gathered from shards, in float32."""
        weight, bias = self._parameters()
        return whole(weight).detach().float(), None if bias is None else whole(bias).detach().float() / len(
            self.modalities
        )

    def _try(self, x: Tensor, weight: Tensor, share: Tensor | None, current: Pass) -> bool:
        """Check that weight and bias give the head's output; return False if values of the pass are not finite.

        Raises:
            NoMatchError: if the output is another, as with a subclass of nn.Linear or a hook on the head.
        """
        assert current.logits is not None
        logits, x = current.logits.float(), x.float()
        bias = torch.zeros_like(logits[:1]) if share is None else share * len(self.modalities)
        difference = (nn.functional.linear(x, weight) + bias - logits).abs()
        if not bool(torch.isfinite(difference).all()):
            return False
        exact = x.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
        # Both sides are compared in float32, so that a wider dtype gives no smaller error.
        known = max(torch.finfo(dtype).eps for dtype in (current.logits.dtype, torch.float32))
        precision = known if exact else _REDUCED
        terms = nn.functional.linear(x.abs(), weight.abs()) + bias.abs()
        if bool((difference > _ROUNDINGS * precision * terms).any()):
            raise NoMatchError(
                f"the head's weight and bias do not make its output (a {type(self.head).__name__}, perhaps with "
                "hooks). Use `scores='zero-out'` or a function from features to uni-modal logits."
            )
        return True

    def _clean_columns(self, name: str, current: Pass, x: Tensor) -> Tensor | None:
        """Return the modality's part `(N, D_m)` of the head's input without any drop; None for unknown columns."""
        if name not in self.projections and not self._locate(name, current, x):
            return None
        if name not in current.dropped:
            return x[:, self.columns[name]]
        project = self.projections[name]
        if project is None:
            raise RuntimeError(
                f"the features of {name!r} were dropped, and its clean columns can't be made from its encoder's "
                "output. Pass `select=` with a function that turns that output into the columns of `slices`."
            )
        return project(_like_rows(current.features[name], current.head_inputs[None]), len(x))

    def _locate(self, name: str, current: Pass, x: Tensor) -> bool:
        """Find the modality's columns; return False if values of the pass are not finite or all zero."""
        failure = (
            f"several tensors that the encoder of {name!r} returns reach the head. Pass `select=`, a function "
            "which makes its features of them, or use `scores='zero-out'`."
        )
        for path, z in self.features.options(name, current).items():
            sent = _like_rows(z, current.head_inputs[None])
            if not bool(torch.isfinite(sent).all()) or not bool(torch.isfinite(x).all()):
                return False
            if name not in self.columns:
                try:
                    match = self._match(name, sent, x, current)
                except NoMatchError as error:
                    failure = str(error)  # the text alone, since the error holds frames
                    continue
                except AmbiguousMatchError:
                    if bool(sent.any()):
                        raise
                    return False
                self.columns[name], self.projections[name] = match.columns, match.project
            else:
                project = projection_onto(sent, x[:, self.columns[name]])
                if project is None:
                    continue
                self.projections[name] = project
            self.features.settle(name, path, current)
            return True
        if name not in self.columns:
            raise NoMatchError(failure)
        self.projections[name] = None
        return True

    def _match(self, name: str, sent: Tensor, x: Tensor, current: Pass) -> Match:
        if current.calls[name] > 1:
            raise NoMatchError(
                f"the encoder of {name!r} ran {current.calls[name]} times in one pass, and only its last output would "
                "be found in the head's input. Pass `slices={modality: slice(start, stop)}` for every modality, or "
                "use `scores='zero-out'`."
            )
        match = find_match(name, sent, x)
        self._refuse_shared(name, match.columns)
        return match

    def _refuse_shared(self, name: str, columns: slice) -> None:
        for other, taken in self.columns.items():
            if columns.start < taken.stop and taken.start < columns.stop:
                raise NoMatchError(
                    f"the outputs of encoders {other!r} and {name!r} stand at the same columns of the head's input: "
                    "they are not concatenated. Pass `slices={modality: slice(start, stop)}` for every modality if "
                    "they are, or use `scores='zero-out'`."
                )

    def _check_columns(self, columns: Mapping[str, slice]) -> None:
        width = self.head.in_features or max((own.stop for own in columns.values()), default=0)
        if any(own.stop > width for own in columns.values()):
            found = {name: [own.start, own.stop] for name, own in columns.items()}
            raise ValueError(f"the layout should be of a head of {width} columns. Found {found}.")

    def _check_slices(self) -> None:
        width = self.head.in_features
        for name, columns in self.columns.items():
            if width == 0:  # a lazy head before its first forward
                start, stop = columns.start or 0, -1 if columns.stop is None else columns.stop
            else:
                start, stop, _ = columns.indices(width)
            if not 0 <= start < stop or (width and (columns.stop or 0) > width):
                of = f" of the head's {width}" if width else ", counted from 0 for a lazy head"
                raise ValueError(f"slices[{name!r}] should hold columns{of}. Found {columns}.")
            self.columns[name] = slice(start, stop)
        taken = [column for columns in self.columns.values() for column in range(columns.start, columns.stop)]
        if len(set(taken)) < len(taken):
            raise ValueError(f"`slices` should not overlap. Found {self.columns}.")


def _like_rows(features: Tensor, head_input: Tensor) -> Tensor:
    """Flatten features to the rows of a head's input with more than two dimensions, if both have its positions."""
    per_position = head_input.dim() > 2 and features.shape[:-1] == head_input.shape[:-1]
    return as_rows(features) if per_position else features
