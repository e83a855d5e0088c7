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

# How many roundings of the largest term a matrix product may be off; and the precision of TF32 and bfloat16 products.
_ROUNDINGS = 16
_REDUCED = 2.0**-8


class SplitHead(UnimodalLogits):
    """Exact Eq. 8 for a linear head over concatenated features: `W^m z^m + b / M`."""

    name = "split"

    def __init__(self, head: nn.Linear, slices: Mapping[str, slice] | None, features: Features) -> None:
        """Split `head` over the modalities by the user's `slices`, or by those that the first passes show."""
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
        """Make a sharded head whole with the other ranks."""
        self._detached()

    @property
    def knows_layout(self) -> bool:
        """Whether passes have shown each modality's columns, and that weight and bias make the logits."""
        return self._tried and self.projections.keys() >= set(self.modalities)

    def live(self, name: str, features: Tensor, samples: int) -> Tensor:
        """The modality's logits `(B, C)` from clean features, attached to the graphs of features and head."""
        x = projected(name, self.projections.get(name), features, samples)
        weight, bias = self._parameters()
        weight, share = whole(weight), None if bias is None else whole(bias) / len(self.modalities)
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
        return nn.functional.linear(x, weight[:, self.columns[name]], share)

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the forward had them: reading a parametrized one in training mode may change its state."""
        if is_parametrized(self.head):
            undo, modules = Undo(), list(self.head.modules())
            with undo, undo:
                State(undo, modules)
                evaluate(undo, modules)
                return self.head.weight, self.head.bias
        return self.head.weight, self.head.bias

    def _detached(self) -> tuple[Tensor, Tensor | None]:
        """Weight, and each modality's share of the bias, whole and in float32."""
        weight, bias = self._parameters()
        return whole(weight).detach().float(), None if bias is None else whole(bias).detach().float() / len(
            self.modalities
        )

    def _try(self, x: Tensor, weight: Tensor, share: Tensor | None, current: Pass) -> bool:
        """Make sure that weight and bias make the head's output; False where this pass can't tell.

        Raises:
            NoMatchError: if something else makes it, as in a subclass of nn.Linear or a hook on the head.
        """
        assert current.logits is not None
        logits, x = current.logits.float(), x.float()
        bias = torch.zeros_like(logits[:1]) if share is None else share * len(self.modalities)
        difference = (nn.functional.linear(x, weight) + bias - logits).abs()
        if not bool(torch.isfinite(difference).all()):
            return False
        exact = x.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
        # What is compared is float32 at best.
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
        """The modality's part of the head's input as it would be without any drop `(N, D_m)`."""
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
        """Find the modality's columns; False where this pass can't show them (not finite, or all zero)."""
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
                    failure = str(error)  # not the error, which holds frames
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
            if width == 0:  # a lazy head, which does not know its width yet
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
    """Features with one row for each row of a head's input that has more than two dimensions."""
    per_position = head_input.dim() > 2 and features.shape[:-1] == head_input.shape[:-1]
    return as_rows(features) if per_position else features
