"""Logits in the output of a head: the tensor that holds the logits, and its class dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from balanceopt.modality import unwrap
from balanceopt.monitor._columns import as_rows
from balanceopt.monitor._features import edge_of, reach
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._outputs import feature_tensors, shapes_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A softmax's gradient sums over classes to rounding error, but over positions to the size of its entries.
_CLEARLY = 8


class Answers:
    """Layout of the heads' outputs, as learned from passes."""

    def __init__(self) -> None:
        """Start without any learned layout."""
        self._paths: dict[int, str] = {}
        self._classes_first: dict[int, bool] = {}

    def logits(self, head: nn.Module, output: Any, current: Pass | None = None) -> Tensor | None:
        """Return the logits: the output, its entry `logits`, its only tensor, or the tensor made of all modalities.

        Raises:
            ValueError: if several tensors may be the logits.
        """
        if isinstance(output, Tensor):
            return output
        named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if isinstance(named, Tensor):
            return named
        tensors = feature_tensors(output)
        if len(tensors) < 2:
            return next(iter(tensors.values()), None)
        if id(head) not in self._paths and current is not None:
            fits = [path for path, x in tensors.items() if _is_of_all(x, current)]
            if len(fits) == 1:
                self._paths[id(head)] = fits[0]
        path = self._paths.get(id(head))
        if path in tensors:
            return tensors[path]
        raise ValueError(
            f"`head=` should return the logits. Found a {type(unwrap(head)).__name__} that returns several tensors "
            f"({shapes_of(tensors)}), and which are the logits can't be told. Give as `head` the module that makes the "
            "logits (B, C) of the classes, or call them `logits` in the output. A contrastive model (CLIP) has no "
            "classes: put a classifier on its embeddings, or use head=None."
        )

    def rows(self, head: nn.Module, logits: Tensor) -> Tensor:
        """Reshape a head's logits, or their gradient, to `(N, C)`.

        The class dimension is the last one. It is dimension 1 for convolutions, for any other non-linear head whose
        logits have four dimensions or more, and where the gradient has shown it.
        """
        return as_rows(logits.movedim(1, -1) if self.classes_first(head, logits) else logits)

    def learn(self, head: nn.Module, gradient: Tensor, current: Pass) -> None:
        """Find the class dimension from a first gradient of cross-entropy: over classes a softmax's sums to 0."""
        if gradient.dim() < 3 or id(head) in self._classes_first or _by_kind(head) is not None:
            return
        first = self._first(head, gradient)
        g = gradient.float()
        over_first, over_last = (float(g.sum(dim).abs().sum()) for dim in (1, -1))
        here, other = (over_first, over_last) if first else (over_last, over_first)
        if not max(here, other) > 0:
            return
        self._classes_first[id(head)] = first != (other * _CLEARLY < here)
        if self._classes_first[id(head)] != first:
            shape = gradient.movedim(1, -1).shape if first else gradient.shape

            def turned(x: Tensor) -> Tensor:
                raw = x.view(shape)
                return self.rows(head, raw.movedim(-1, 1) if first else raw)

            assert current.logits is not None
            current.logits = turned(current.logits)
            current.classes_first = not first
            if current.unimodal is not None:
                current.unimodal = {name: turned(x) for name, x in current.unimodal.items()}

    def classes_first(self, head: nn.Module, logits: Tensor) -> bool:
        """Tell whether the class dimension of a head's logits with positions is dimension 1."""
        return logits.dim() > 2 and self._first(head, logits)

    def _first(self, head: nn.Module, logits: Tensor) -> bool:
        by_kind = _by_kind(head)
        guess = logits.dim() > 3 if by_kind is None else by_kind
        return self._classes_first.get(id(head), guess)


def as_target_rows(target: Tensor, done: Pass) -> Tensor:
    """Reshape a target with an entry for each of the logits, in their shape or a flattened one, to `(N, C)`.

    Raises:
        ValueError: for another number of entries.
    """
    assert done.logits is not None
    if target.numel() != done.logits.numel():
        raise ValueError(
            f"targets from {done.label_source} should have one entry for each of the head's outputs, of shape "
            f"{tuple(done.shape)}. Found shape {tuple(target.shape)}. Likely causes: targets of another batch or "
            "another head, or a loss that compares something else than the head's output."
        )
    in_place = done.classes_first and target.shape == done.shape
    return (target.movedim(1, -1) if in_place else target).reshape(done.logits.shape)


def in_output_shape(rows: Tensor, done: Pass) -> Tensor:
    """Reshape rows `(..., N, C)` to the shape of the head's output."""
    lead, shape = rows.shape[:-2], done.shape
    if not done.classes_first:
        return rows.reshape(*lead, *shape)
    return rows.reshape(*lead, shape[0], *shape[2:], shape[1]).movedim(-1, len(lead) + 1)


def _by_kind(head: nn.Module) -> bool | None:
    """Tell by layer type whether a head's logits have classes before positions; None if the type does not decide."""
    inner = unwrap(head)
    while isinstance(inner, nn.Sequential) and len(inner):
        inner = unwrap(inner[-1])
    if isinstance(inner, nn.Linear):
        return False
    return True if isinstance(inner, _CONVOLUTIONS) else None


def _is_of_all(x: Tensor, current: Pass) -> bool:
    """Tell whether a tensor depends on every encoder of a pass, by the autograd graph."""
    ends = {edge: name for name, edges in current.edges.items() for edge in edges}
    ends = {**{edge: name for edge, (name, _) in current.bases.items()}, **ends}
    if not x.requires_grad or not ends:
        return False
    return {ends[edge] for edge in reach([edge_of(x)], ends)} == set(ends.values())
