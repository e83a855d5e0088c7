"""Uni-modal logits of a training pass, by fusion: what each modality alone would have answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from balanceopt.modality import unwrap
from balanceopt.monitor._matching import (
    AmbiguousMatchError,
    Match,
    NoMatchError,
    Projection,
    find_match,
    projection_onto,
)
from balanceopt.monitor._outputs import logits_of, map_tensors
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._replay import forwards, quiet

UserScores = Callable[[dict[str, Tensor]], Mapping[str, Tensor] | Sequence[Tensor] | Tensor]


def choose_scores(
    scores: str | UserScores,
    model: nn.Module,
    encoders: Mapping[str, nn.Module],
    head: nn.Module | Mapping[str, nn.Module] | None,
    slices: Mapping[str, slice] | None,
) -> UnimodalLogits | None:
    """The way to uni-modal logits that `scores` asks for; None for features only.

    Raises:
        ValueError: if `scores` is unknown, or does not go with the head.
    """
    modalities = list(encoders)
    if callable(scores):
        return UserFunction(scores, modalities)
    if scores not in ("auto", "split", "per-head", "zero-out"):
        raise ValueError(
            f"`scores` should be 'auto', 'split', 'per-head', 'zero-out' or a function. Found {scores!r}."
        )
    if head is None:
        if scores == "auto":
            return None
        raise ValueError(f"`scores={scores!r}` needs `head=`. Found None.")
    if isinstance(head, Mapping):
        if scores not in ("auto", "per-head"):
            raise ValueError(f"with a head for each modality `scores` should be 'per-head'. Found {scores!r}.")
        return PerHead(head)
    if scores == "per-head":
        raise ValueError("`scores='per-head'` needs a mapping from modality to its own head. Found one head.")
    inner = unwrap(head)
    if scores == "zero-out" or (scores == "auto" and not isinstance(inner, nn.Linear)):
        return ZeroOut(model, encoders, head)
    if not isinstance(inner, nn.Linear):
        raise ValueError(
            f"`scores='split'` needs a linear head. Found {type(inner).__name__}: use 'zero-out' or a function."
        )
    split = SplitHead(inner, modalities, slices)
    return split if scores == "split" or slices else Automatic(split, partial(ZeroOut, model, encoders, head))


class UnimodalLogits(Protocol):
    """How the uni-modal logits of a pass are made."""

    @property
    def name(self) -> str:
        """What `stats()` and `repr` call it."""

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        """Logits `(N, C)` of each modality that was present; empty where this pass can't tell."""


class SplitHead:
    """Exact Eq. 8 for a linear head over concatenated features: `W^m z^m + b / M`."""

    name = "split"

    def __init__(self, head: nn.Linear, modalities: Sequence[str], slices: Mapping[str, slice] | None) -> None:
        """Split `head` over `modalities` by the user's `slices`, or by those that the first passes show."""
        self.head = head
        self.modalities = list(modalities)
        self.columns: dict[str, slice] = dict(slices or {})
        self.projections: dict[str, Projection | None] = {}
        if slices is not None:
            self._check_slices()

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        x = _rows(current.head_inputs[None])
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
        x = _projected(name, self.projections.get(name), features)
        weight, bias = _attached(self.head.weight), self.head.bias
        share = None if bias is None else _attached(bias) / len(self.modalities)
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
        return torch.nn.functional.linear(x, weight[:, self.columns[name]], share)

    def clean(self, name: str, features: Tensor) -> Tensor:
        """The modality's logits `(N, C)` from clean features, before the head has run."""
        weight = _whole(self.head.weight).float()[:, self.columns[name]]
        share = None if self.head.bias is None else _whole(self.head.bias).float() / len(self.modalities)
        z = _projected(name, self.projections[name], features)
        if z.shape[-1] != weight.shape[-1]:  # a row of logits for each position
            z = _projected(name, self.projections[name], _rows(features))
        with torch.autocast(z.device.type, enabled=False):
            return torch.nn.functional.linear(z.float(), weight, share)

    def _clean_columns(self, name: str, current: Pass, x: Tensor) -> Tensor | None:
        """The modality's part of the head's input as it would be without any drop `(N, D_m)`."""
        if name not in self.projections and not self._locate(name, current, x):
            return None
        project = self.projections[name]
        if project is not None:
            return project(_like_rows(current.features[name], current.head_inputs[None]))
        if current.was_dropped(name):
            raise RuntimeError(
                f"the features of {name!r} were dropped, and its clean columns can't be made from its encoder's "
                "output. Pass `select=` with a function that turns that output into the columns of `slices`."
            )
        return x[:, self.columns[name]]

    def _locate(self, name: str, current: Pass, x: Tensor) -> bool:
        """Find the modality's columns; False where this pass can't show them (numbers that are not finite)."""
        sent = _like_rows(current.sent_features[name], current.head_inputs[None])
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
                raise ValueError(f"slices[{name!r}] should hold columns of the head's {width}. Found {columns}.")
            for column in own:
                taken[column] += 1
        if max(taken, default=0) > 1:
            raise AmbiguousMatchError(
                f"the modalities' columns of the head's input should not overlap. Found {self.columns}. "
                "Pass `slices={modality: slice(start, stop)}` for every modality."
            )


class PerHead:
    """Each modality's own head answers for it, with its own bias."""

    name = "per-head"

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        """Take the outputs of `heads`, one for each modality."""
        self.heads = dict(heads)
        self.projections: dict[str, Projection | None] = {}

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        found = {}
        for name, output in current.head_outputs.items():
            dropped = current.was_dropped(name)
            if not dropped:
                self._learn(name, current)
            found[name] = _rows(self._without_drop(name, current) if dropped else output).float()
        return found

    def live(self, name: str, features: Tensor) -> Tensor:
        """The modality's logits `(B, C)` from clean features, attached to the graphs of features and head."""
        # Not called as a module: this is not the pass's own call, which hooks wait for.
        logits = logits_of(self.heads[name].forward(_projected(name, self.projections.get(name), features)))
        assert logits is not None
        return logits

    def _learn(self, name: str, current: Pass) -> None:
        if name not in self.projections and name in current.features:
            self.projections[name] = projection_onto(current.sent_features[name], _rows(current.head_inputs[name]))

    def clean(self, name: str, features: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The modality's logits `(N, C)` from clean features, `dtype` as its head gets them."""
        head = self.heads[name]
        x = _projected(name, self.projections[name], features)
        with quiet(list(head.modules()), x.device):
            logits = logits_of(head.forward(x.to(x.dtype if dtype is None else dtype)))
        assert logits is not None
        return _rows(logits).float()

    def _without_drop(self, name: str, current: Pass) -> Tensor:
        if self.projections.get(name) is None:
            raise RuntimeError(
                f"the features of {name!r} were dropped, and what its head gets can't be made from its encoder's "
                "output. Pass `select=` with a function that turns that output into the head's input."
            )
        return self.clean(name, current.features[name], current.head_inputs[name].dtype)


class ZeroOut:
    """The fusion runs once more for each modality, with the others' encoder outputs replaced by zeros."""

    name = "zero-out"

    def __init__(self, model: nn.Module, encoders: Mapping[str, nn.Module], head: nn.Module) -> None:
        """Replay `model` from the outputs of `encoders` up to the output of `head`."""
        self.model = model
        self.encoders = dict(encoders)
        self.head = head
        inner = {id(part) for encoder in encoders.values() for part in encoder.modules()}
        inner -= {id(encoder) for encoder in encoders.values()}
        self.fusion = [part for part in model.modules() if id(part) not in inner]

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        if current.inputs is None:
            raise RuntimeError(
                "`scores='zero-out'` runs the model's forward again, but the model itself was not called, only its "
                "parts. Call the model, or pass `scores=` with a function from features to uni-modal logits."
            )
        return {name: self._alone(name, current) for name in current.outputs}

    def _alone(self, kept: str, current: Pass) -> Tensor:
        stubs: list[tuple[nn.Module, Callable[..., Any]]] = [
            (self.encoders[name], _Cached(outputs if name == kept else map_tensors(_zeros, outputs)))
            for name, outputs in current.outputs.items()
        ]
        assert current.inputs is not None
        args, kwargs = current.inputs
        if self.head is not self.model:
            stubs.append((self.head, _stop_after(self.head.forward)))
        device = next(iter(current.features.values())).device
        with quiet(self.fusion, device), forwards(stubs):
            try:
                output = self.model.forward(*args, **kwargs)
            except _Reached as reached:
                output = reached.output
            except Exception as error:
                raise RuntimeError(
                    "`scores='zero-out'` could not run the model again with some features zero. "
                    "Pass `scores=` with a function from features to uni-modal logits."
                ) from error
        logits = logits_of(output)
        assert logits is not None
        return _rows(logits).float()


class UserFunction:
    """Uni-modal logits from the user's own function of the features."""

    def __init__(self, function: UserScores, modalities: Sequence[str]) -> None:
        """Call `function` with the features of every modality."""
        self.function = function
        self.modalities = list(modalities)
        self.name = f"function {getattr(function, '__name__', type(function).__name__)}"

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        with torch.no_grad():
            logits = self.function(dict(current.features))
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
        return {name: _rows(value.detach()).float() for name, value in logits.items()}


class Automatic:
    """The first of split, per-head and zero-out that is exact for this model, chosen on the first pass."""

    def __init__(self, split: SplitHead, otherwise: Callable[[], UnimodalLogits]) -> None:
        """Try `split`; where a feature is not in the head's input, take `otherwise` for good."""
        self.chosen: UnimodalLogits = split
        self._otherwise: Callable[[], UnimodalLogits] | None = otherwise

    @property
    def name(self) -> str:
        """Of the one chosen."""
        return self.chosen.name

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        try:
            return self.chosen(current)
        except NoMatchError:
            if self._otherwise is None:
                raise
            self.give_up()
            return self.chosen(current)

    def give_up(self) -> None:
        """Take `otherwise` from now on."""
        if self._otherwise is not None:
            self.chosen, self._otherwise = self._otherwise(), None


class _Reached(BaseException):
    """The head answered: nothing after it is needed. Not an Exception, which the user's forward might catch."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _stop_after(forward: Callable[..., Any]) -> Callable[..., Any]:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(forward(*args, **kwargs))

    return stop


class _Cached:
    """An encoder's outputs, given again in the order of its calls."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        self.outputs = outputs
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.outputs[self.calls % len(self.outputs)]
        self.calls += 1
        return output


def _zeros(x: Tensor) -> Tensor:
    """Zeros for features; masks and indices among an encoder's outputs stay."""
    return torch.zeros_like(x) if x.is_floating_point() else x


def _rows(x: Tensor) -> Tensor:
    """`(B, ..., D)` as `(N, D)`."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(-1)


def _like_rows(features: Tensor, head_input: Tensor) -> Tensor:
    """Features with one row for each row of a head's input that has more than two dimensions."""
    per_position = head_input.dim() > 2 and features.shape[:-1] == head_input.shape[:-1]
    return _rows(features) if per_position else features


def _projected(name: str, project: Projection | None, features: Tensor) -> Tensor:
    if project is None:
        raise RuntimeError(
            f"it is not known how the output of encoder {name!r} becomes its head's input: no training pass has shown "
            "it, or something unknown lies between. Pass `select=` with a function from one to the other."
        )
    return project(features)


def _attached(parameter: Tensor) -> Tensor:
    """The full tensor of a sharded parameter, attached to the graph."""
    full: Callable[[], Tensor] | None = getattr(parameter, "full_tensor", None)
    return parameter if full is None else full()


def _whole(parameter: Tensor) -> Tensor:
    """The full tensor of a sharded parameter, detached."""
    full = getattr(parameter, "full_tensor", None)
    return parameter.detach() if full is None else full().detach()
