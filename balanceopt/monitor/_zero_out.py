"""Uni-modal logits of any fusion: run it again with the other modalities' features zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from balanceopt.modality import modules_outside
from balanceopt.monitor._columns import logit_rows
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._outputs import logits_of, map_tensors, tensors_in
from balanceopt.monitor._replay import forwards, quiet


class ZeroOut:
    """The fusion runs once more for each modality, with the others' encoder outputs replaced by zeros."""

    name = "zero-out"
    needs_outputs = True
    knows_layout = True

    def __init__(self, model: nn.Module, encoders: Mapping[str, nn.Module], head: nn.Module) -> None:
        """Replay `model` from the outputs of `encoders` up to the output of `head`."""
        self.model = model
        self.encoders = dict(encoders)
        self.head = head

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        if current.inputs is None:
            raise RuntimeError(
                "`scores='zero-out'` runs the model's forward again, but the model itself was not called, only its "
                "parts. Call the model, or pass `scores=` with a function from features to uni-modal logits."
            )
        for name, outputs in current.outputs.items():
            if not any(x.is_floating_point() for x in tensors_in(outputs)):
                raise RuntimeError(
                    f"the encoder of {name!r} returns a {type(outputs[0]).__name__}, in which nothing can be set to "
                    "zero. Return tensors, or pass `scores=` with a function from features to uni-modal logits."
                )
        with self._quiet():
            return {name: self._alone(name, current) for name in current.outputs}

    def join(self, current: Pass) -> None:
        """Make a sharded fusion whole with the other ranks."""
        with self._quiet():
            pass

    def _quiet(self) -> AbstractContextManager[None]:
        """Once for all modalities: ranks may see different ones, and make sharded parameters whole together."""
        # Looked up each time: layers may have been replaced, and one that slipped through would run in training mode.
        fusion = modules_outside(self.model, self.encoders.values())
        return quiet([*fusion, *self.encoders.values()], next(self.model.parameters()).device)

    def _alone(self, kept: str, current: Pass) -> Tensor:
        stubs: list[tuple[nn.Module, Callable[..., Any]]] = [
            (self.encoders[name], _Cached(outputs if name == kept else map_tensors(_zeros, outputs)))
            for name, outputs in current.outputs.items()
        ]
        assert current.inputs is not None
        args, kwargs = map_tensors(_same, current.inputs)  # a forward may take its batch apart
        if self.head is not self.model:
            stubs.append((self.head, _stop_after(self.head.forward, current.answering_call)))
        with forwards(stubs):
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
        return logit_rows(self.head, logits).float()


class _Reached(BaseException):
    """The head answered: nothing after it is needed. Not an Exception, which the user's forward might catch."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _stop_after(forward: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = calls

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        output = forward(*args, **kwargs)
        if left > 0:
            return output
        raise _Reached(output)

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


def _same(x: Tensor) -> Tensor:
    return x


def _zeros(x: Tensor) -> Tensor:
    """Zeros for features; masks and indices among an encoder's outputs stay."""
    return torch.zeros_like(x) if x.is_floating_point() else x
