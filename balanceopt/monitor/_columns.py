"""Where each encoder's output stands in the head's input: found by comparing numbers, never assumed from an order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from balanceopt.modality import unwrap

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def as_rows(x: Tensor) -> Tensor:
    """`(B, ..., D)` as `(N, D)`."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(-1)


def logit_rows(head: nn.Module, logits: Tensor) -> Tensor:
    """A head's logits, or their gradient, as `(N, C)`.

    Classes stand last, but first after the batch for convolutions, and for others with four dimensions or more, except
    linear heads: as dense prediction has them.
    """
    inner = unwrap(head)
    dense = isinstance(inner, _CONVOLUTIONS) or (logits.dim() > 3 and not isinstance(inner, nn.Linear))
    return as_rows(logits.movedim(1, -1) if dense and logits.dim() > 2 else logits)


Projection = Callable[[Tensor], Tensor]

# Pooling written in another way rounds differently.
_TOLERANCE = 1e-5
# A dropout between the features and the head keeps at least this part of the values.
_KEPT = 0.05


class NoMatchError(ValueError):
    """No encoder output, in any known shape, stands in the head's input."""


class AmbiguousMatchError(ValueError):
    """An encoder's output stands in the head's input at more than one place."""


@dataclass(frozen=True)
class Match:
    """One modality's columns of the head's input, and how its encoder's output becomes them.

    Attributes:
        columns: the slice of the head's input.
        project: from the encoder's output `(B, ...)` to `(B, D_m)`.
    """

    columns: slice
    project: Projection


def find_match(name: str, features: Tensor, head_input: Tensor) -> Match:
    """Find the columns of `head_input` `(B, D)` that hold `features` `(B, ...)`.

    Raises:
        NoMatchError: if they are nowhere.
        AmbiguousMatchError: if they are at several places.
    """
    complex_numbers = features.is_complex() or head_input.is_complex()
    x = head_input.detach() if complex_numbers else head_input.detach().float()
    for project in () if complex_numbers else _PROJECTIONS:
        block = _applied(project, features, x.shape)
        if block is None:
            continue
        places = [o for o in _plausible(block, x) if _same(block, x[:, o : o + block.shape[1]])]
        if len(places) > 1:
            raise AmbiguousMatchError(
                f"the output of encoder {name!r} stands at columns {places} of the head's input. "
                "Pass `slices={modality: slice(start, stop)}` for every modality."
            )
        if places:
            return Match(slice(places[0], places[0] + block.shape[1]), project)
    raise NoMatchError(
        f"the output of encoder {name!r} (shape {tuple(features.shape)}) stands nowhere in the head's input "
        f"(shape {tuple(head_input.shape)}). Pass `slices={{modality: slice(start, stop)}}` for every modality, "
        "with `select=` where an encoder's output is not the feature itself, or use `scores='zero-out'`."
    )


def projection_onto(features: Tensor, block: Tensor) -> Projection | None:
    """The projection that turns `features` into `block` `(B, D_m)`, or None."""
    for project in _PROJECTIONS:
        found = _applied(project, features, block.shape)
        if found is not None and found.shape == block.shape and _same(found, block.float()):
            return project
    return None


def projection_number(project: Projection | None) -> int:
    """A plain number for a projection; -1 for None."""
    return -1 if project is None else _PROJECTIONS.index(project)


def is_projection(number: int) -> bool:
    """Whether `projection_number` gives that number."""
    return -1 <= number < len(_PROJECTIONS)


def projection_numbered(number: int) -> Projection | None:
    """The projection of that number."""
    return None if number < 0 else _PROJECTIONS[number]


def projected(name: str, project: Projection | None, features: Tensor) -> Tensor:
    """Features as the head gets them.

    Raises:
        RuntimeError: if it is not known how.
    """
    if project is None:
        raise RuntimeError(
            f"it is not known how the output of encoder {name!r} becomes its head's input: no training pass has shown "
            "it, or something unknown lies between. Pass `select=` with a function from one to the other."
        )
    return project(features)


def _applied(project: Projection, features: Tensor, room: torch.Size) -> Tensor | None:
    """`features` projected to `(B, D_m)` float32, or None where that can't stand in a head's input of shape `room`."""
    try:
        block = project(features.detach().float())
    except (IndexError, RuntimeError):  # the projection asks for dimensions that these features don't have
        return None
    fits = block.dim() == 2 and block.shape[0] == room[0] and 0 < block.shape[1] <= room[1]
    return block if fits else None


def _plausible(block: Tensor, x: Tensor) -> list[int]:
    """The offsets at which the most telling column of `block` is, up to scale and zeros, a column of `x`."""
    telling = int(block.abs().amax(0).argmax())
    b = block[:, telling : telling + 1]
    kept = (x != 0).float()
    scale = ((x * b * kept).sum(0) / (b * b * kept).sum(0).clamp(min=1e-30)).clamp(min=1)
    close = ((x - scale * b) * kept).abs().amax(0) <= 2 * _TOLERANCE * scale * block.abs().max()
    offsets = close.nonzero().squeeze(1) - telling
    inside = (offsets >= 0) & (offsets <= x.shape[1] - block.shape[1])
    return [int(o) for o in offsets[inside]]


def _same(block: Tensor, x: Tensor) -> bool:
    """Whether `x` is `block`, up to rounding or up to a dropout (zeros, the rest scaled)."""
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


@dataclass(frozen=True)
class _Rectified:
    """A projection with a ReLU before it (as good as after it for all but means, which `_RectifiedLast` serves)."""

    project: Projection

    def __call__(self, z: Tensor) -> Tensor:
        return self.project(z.relu())


@dataclass(frozen=True)
class _RectifiedLast:
    project: Projection

    def __call__(self, z: Tensor) -> Tensor:
        return self.project(z).relu()


def _projections() -> Iterator[Projection]:
    plain = (_flat, _mean_spatial, _max_spatial, _first_token, _last_token, _mean_token, _max_token, _spread)
    yield from plain
    for project in plain:
        yield _Rectified(project)
    for project in (_mean_spatial, _mean_token):
        yield _RectifiedLast(project)


_PROJECTIONS: tuple[Projection, ...] = tuple(_projections())
