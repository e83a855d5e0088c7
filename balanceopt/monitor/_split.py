"""Uni-modal logits of a linear head over concatenated features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from balanceopt.monitor._matching import (
    AmbiguousMatchError,
    Match,
    Projection,
    find_match,
    projected,
    projection_onto,
)
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._rows import as_rows


class SplitHead:
    """Exact Eq. 8 for a linear head over concatenated features: `W^m z^m + b / M`."""

    name = "split"

    def __init__(
        self, head: nn.Linear, modalities: Sequence[str], slices: Mapping[str, slice] | None
    ) -> None:
        """Split `head` over `modalities` by the user's `slices`, or by those that the first passes show."""
        self.head = head
        self.modalities = list(modalities)
        self.columns: dict[str, slice] = dict(slices or {})
        self.projections: dict[str, Projection | None] = {}
        if slices is not None:
            self._check_slices()

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        x = as_rows(current.head_inputs[None])
        if x.shape[0] == 0:
            return {}
        weight = _whole(self.head.weight).float()
        share = None if self.head.bias is None else _whole(self.head.bias).float() / len(self.modalities)
        found = {}
        with torch.autocast(x.device.type, enabled=False):
            for name in current.features:
                z = self._clean_columns(name, current, x)
                if z is not None:
                    current.vectors[name] = z
                    found[name] = torch.nn.functional.linear(z.float(), weight[:, self.columns[name]], share)
        return found

    def live(self, name: str, features: Tensor) -> Tensor:
        """The modality's logits `(B, C)` from clean features, attached to the graphs of features and head."""
        x = projected(name, self.projections.get(name), features)
        weight, bias = _attached(self.head.weight), self.head.bias
        share = None if bias is None else _attached(bias) / len(self.modalities)
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
        return torch.nn.functional.linear(x, weight[:, self.columns[name]], share)

    def clean(self, name: str, features: Tensor) -> Tensor:
        """The modality's logits `(N, C)` from clean features, before the head has run."""
        weight = _whole(self.head.weight).float()[:, self.columns[name]]
        share = None if self.head.bias is None else _whole(self.head.bias).float() / len(self.modalities)
        z = projected(name, self.projections[name], features)
        if z.shape[-1] != weight.shape[-1]:  # a row of logits for each position
            z = projected(name, self.projections[name], as_rows(features))
        with torch.autocast(z.device.type, enabled=False):
            return torch.nn.functional.linear(z.float(), weight, share)

    def _clean_columns(self, name: str, current: Pass, x: Tensor) -> Tensor | None:
        """The modality's part of the head's input as it would be without any drop `(N, D_m)`."""
        if name not in self.projections and not self._locate(name, current, x):
            return None
        project = self.projections[name]
        if project is not None:
            return project(_likeas_rows(current.features[name], current.head_inputs[None]))
        if current.was_dropped(name):
            raise RuntimeError(
                f"the features of {name!r} were dropped, and its clean columns can't be made from its encoder's "
                "output. Pass `select=` with a function that turns that output into the columns of `slices`."
            )
        return x[:, self.columns[name]]

    def _locate(self, name: str, current: Pass, x: Tensor) -> bool:
        """Find the modality's columns; False where this pass can't show them (numbers that are not finite)."""
        sent = _likeas_rows(current.sent_features[name], current.head_inputs[None])
        if not bool(torch.isfinite(sent).all()) or not bool(torch.isfinite(x).all()):
            return False
        if name in self.columns:
            self.projections[name] = projection_onto(sent, x[:, self.columns[name]])
        else:
            match: Match = find_match(name, sent, x)
            self.projections[name] = match.project
            self.columns[name] = match.columns
            self._check_slices()
        return True

    def _check_slices(self) -> None:
        unknown = self.columns.keys() - set(self.modalities)
        if unknown:
            raise ValueError(f"`slices` should be given for {self.modalities}. Found also {sorted(unknown)}.")
        width = self.head.in_features
        taken = [0] * width
        for name, columns in self.columns.items():
            own = range(width)[columns]
            if len(own) == 0:
                raise ValueError(
                    f"slices[{name!r}] should hold columns of the head's {width}. Found {columns}."
                )
            for column in own:
                taken[column] += 1
        if max(taken, default=0) > 1:
            raise AmbiguousMatchError(
                f"the modalities' columns of the head's input should not overlap. Found {self.columns}. "
                "Pass `slices={modality: slice(start, stop)}` for every modality."
            )


def _likeas_rows(features: Tensor, head_input: Tensor) -> Tensor:
    """Features with one row for each row of a head's input that has more than two dimensions."""
    per_position = head_input.dim() > 2 and features.shape[:-1] == head_input.shape[:-1]
    return as_rows(features) if per_position else features


def _attached(parameter: Tensor) -> Tensor:
    """The full tensor of a sharded parameter, attached to the graph."""
    full: Callable[[], Tensor] | None = getattr(parameter, "full_tensor", None)
    return parameter if full is None else full()


def _whole(parameter: Tensor) -> Tensor:
    """The full tensor of a sharded parameter, detached."""
    full = getattr(parameter, "full_tensor", None)
    return parameter.detach() if full is None else full().detach()
