"""Columns of the head's input that hold an encoder's output, found by comparing values, never by order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from balanceopt._pooling import Projection


def as_rows(x: Tensor) -> Tensor:
    """Flatten `(B, ..., D)` to `(N, D)`."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(-1)


Rule = Callable[[Tensor], Tensor]

# The model's pooling may be written in another way, which rounds differently.
_TOLERANCE = 1e-5
# A dropout between the features and the head keeps at least this part of the values.
_KEPT = 0.05


class NoMatchError(ValueError):
    """Error for an encoder output that is not in the head's input under any projection."""


class AmbiguousMatchError(ValueError):
    """Error for an encoder output that is in the head's input at several offsets."""


@dataclass(frozen=True)
class Match:
    """One modality's columns of the head's input, and the projection from its encoder's output to the columns.

    Attributes:
        columns: slice of the head's input.
        project: function from the encoder's features `(B, ...)`, or `(B * T, ...)`, to `(B, D_m)`.
    """

    columns: slice
    project: Projection


def find_match(name: str, features: Tensor, head_input: Tensor) -> Match:
    """Find the columns of `head_input` `(B, D)` that hold `features` `(B, ...)`.

    Raises:
        NoMatchError: if no columns hold the features.
        AmbiguousMatchError: if several ranges of columns hold the features.
    """
    matches: list[Match] = []
    for project, width, places in _placed(features, head_input):
        if len(places) > 1 and not matches:
            raise AmbiguousMatchError(
                f"the output of encoder {name!r} stands at columns {places} of the head's input. "
                "Pass `slices={modality: slice(start, stop)}` for every modality."
            )
        matches += [Match(slice(o, o + width), project) for o in places]
    if matches:
        widest = max(matches, key=lambda match: match.columns.stop - match.columns.start)
        inside = range(widest.columns.start, widest.columns.stop + 1)
        if all(m.columns.start in inside and m.columns.stop in inside for m in matches):
            return widest
        raise NoMatchError(
            f"the head's input holds the output of encoder {name!r} in more than one form. Pass `select=` with a "
            "function that makes its features of it, or use `scores='zero-out'`."
        )
    raise NoMatchError(
        f"the output of encoder {name!r} (shape {tuple(features.shape)}) stands nowhere in the head's input "
        f"(shape {tuple(head_input.shape)}). Pass `slices={{modality: slice(start, stop)}}` for every modality, "
        "with `select=` where an encoder's output is not the feature itself, or use `scores='zero-out'`."
    )


def _placed(features: Tensor, x: Tensor) -> Iterator[tuple[Projection, int, list[int]]]:
    """Yield each projection of `features` that is found in `x` `(B, D)`, with its width and its first columns."""
    if features.is_complex() or x.is_complex():
        return
    x = x.detach().float()
    for project in _PROJECTIONS:
        block = _applied(project, features, x.shape)
        if block is not None:
            width = block.shape[1]
            places = [o for o in _plausible(block, x) if _same(block, x[:, o : o + width])]
            if places:
                yield project, width, places


def projection_onto(features: Tensor, x: Tensor, *, within: bool = False) -> Projection | None:
    """Return the projection of `features` to `x` `(B, D_m)`, or with `within` to most columns of `x`; or None."""
    placed = [(width, project) for project, width, _ in _placed(features, x) if within or width == x.shape[1]]
    return max(placed, key=lambda pair: pair[0])[1] if placed else None


def projection_number(project: Projection | None) -> int:
    """Return the index of a projection, for a checkpoint; -1 for None."""
    return -1 if project is None else _PROJECTIONS.index(project)


def is_projection(number: int) -> bool:
    """Tell whether a number is an index of a projection, or -1."""
    return -1 <= number < len(_PROJECTIONS)


def projection_numbered(number: int) -> Projection | None:
    """Return the projection of an index; None for -1."""
    return None if number < 0 else _PROJECTIONS[number]


def projected(name: str, project: Projection | None, features: Tensor, samples: int) -> Tensor:
    """Project features to the vectors that the head gets.

    Raises:
        RuntimeError: if the projection is unknown.
    """
    if project is None:
        raise RuntimeError(
            f"it is not known how the output of encoder {name!r} becomes its head's input: no training pass has shown "
            "it, or something unknown lies between. Pass `select=` with a function from one to the other."
        )
    return project(features, samples)


def _applied(project: Projection, features: Tensor, room: torch.Size) -> Tensor | None:
    """Project `features` to `(B, D_m)` float32; None if the result does not fit a head's input of shape `room`."""
    try:
        block = project(features.detach().float(), room[0])
    except (
        IndexError,
        RuntimeError,
        ZeroDivisionError,
    ):  # the projection asks for dimensions that these features don't have
        return None
    fits = block.dim() == 2 and block.shape[0] == room[0] and 0 < block.shape[1] <= room[1]
    return block if fits else None


def _plausible(block: Tensor, x: Tensor) -> list[int]:
    """Return the offsets at which the largest column of `block` equals, up to scale and zeros, a column of `x`."""
    telling = int(block.abs().amax(0).argmax())
    b = block[:, telling : telling + 1]
    kept = (x != 0).float()
    scale = ((x * b * kept).sum(0) / (b * b * kept).sum(0).clamp(min=1e-30)).clamp(min=1)
    close = ((x - scale * b) * kept).abs().amax(0) <= 2 * _TOLERANCE * scale * block.abs().max()
    offsets = close.nonzero().squeeze(1) - telling
    inside = (offsets >= 0) & (offsets <= x.shape[1] - block.shape[1])
    return [int(o) for o in offsets[inside]]


def _same(block: Tensor, x: Tensor) -> bool:
    """Tell whether `x` equals `block`, up to rounding or up to a dropout (zeros, the rest scaled)."""
    close = _TOLERANCE * block.abs().max()
    if not bool(torch.isfinite(close)):
        return False
    if bool(((x - block).abs() <= close).all()):
        return True
    kept = x != 0
    if float(kept.float().mean()) < _KEPT or bool(kept.all()):
        return False
    scale = (x[kept] * block[kept]).sum() / (block[kept] ** 2).sum()
    scaled = (x - block * scale).abs() <= close * scale
    return bool(scale > 1) and bool((scaled | ~kept).all())


def _flat(z: Tensor) -> Tensor:
    return z.flatten(1)


def _mean_spatial(z: Tensor) -> Tensor:
    return z.flatten(2).mean(2)


def _max_spatial(z: Tensor) -> Tensor:
    return z.flatten(2).amax(2)


def _first_token(z: Tensor) -> Tensor:
    return z[:, 0].flatten(1)


def _last_token(z: Tensor) -> Tensor:
    return z[:, -1].flatten(1)


def _mean_token(z: Tensor) -> Tensor:
    return z.mean(1)


def _max_token(z: Tensor) -> Tensor:
    return z.amax(1)


def _spread(z: Tensor) -> Tensor:
    return z.unsqueeze(-1) if z.dim() == 1 else z


def _rectified(z: Tensor) -> Tensor:
    return z.relu()


def _as_is(z: Tensor) -> Tensor:
    return z


def _last_two_tokens(z: Tensor) -> Tensor:
    return z[:, -2:].flatten(1)


def _states_first(z: Tensor, samples: int) -> Tensor:
    """Transpose states `(L, B, H)` of a recurrent encoder to `(B, L, H)`."""
    if z.dim() != 3 or z.shape[1] != samples:
        raise IndexError("no states of layers")
    return z.transpose(0, 1)


@dataclass(frozen=True)
class _Pooled:
    """Pooling rule with functions before and after (a ReLU), for rows that are samples, states or frames.

    Attributes:
        rule: function from `(B, ...)` to `(B, D)`.
        before: function of the features, before the rule.
        after: function of the rule's result.
        states: whether features are recurrent states `(L, B, H)`.
        over: function from `(B, T, D)` to `(B, D')`, where a sample has T consecutive rows (frames).
    """

    rule: Rule
    before: Rule = _as_is
    after: Rule = _as_is
    states: bool = False
    over: Rule | None = None

    def __call__(self, z: Tensor, samples: int) -> Tensor:
        if self.over is not None and (samples == 0 or len(z) == samples or len(z) % samples):
            raise IndexError("no frames")
        z = _states_first(z, samples) if self.states else z
        vectors = self.after(self.rule(self.before(z)))
        return vectors if self.over is None else self.over(vectors.unflatten(0, (samples, -1)))


def _projections() -> Iterator[Projection]:
    plain = (_flat, _mean_spatial, _max_spatial, _first_token, _last_token, _mean_token, _max_token, _spread)
    rules = [_Pooled(rule) for rule in plain]
    # A ReLU commutes with every rule but the means, which need both orders.
    rules += [_Pooled(rule, before=_rectified) for rule in plain]
    rules += [_Pooled(rule, after=_rectified) for rule in (_mean_spatial, _mean_token)]
    yield from rules
    for over in (_mean_token, _max_token, _flat, _first_token, _last_token):
        yield from (replace(pooled, over=over) for pooled in rules)
    for rule in (_flat, _last_two_tokens, _last_token, _first_token, _mean_token, _max_token):
        yield _Pooled(rule, states=True)
    yield _Pooled(_last_two_tokens)


_PROJECTIONS: tuple[Projection, ...] = tuple(_projections())
