"""ForwardMethod: base of methods that change features before the fusion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from balanceopt._method import Method, Unit
from balanceopt._options import check_count, check_entries, check_kind
from balanceopt._random import generator_for
from balanceopt._torch import in_backward
from balanceopt.distributed import rank_in, shared_seed
from balanceopt.monitor import ModalityMonitor, Pass, is_differentiable, map_tensors, samples_first


@dataclass
class _Begun:
    """State of a method for one training forward.

    Attributes:
        number: number of earlier training forwards.
        acts: whether the forward lies in the method's window.
        training: whether each modality's encoder was in training mode in its first call.
        choice: result of `begin`.
    """

    number: int
    acts: bool
    training: dict[str, bool] = field(default_factory=dict)
    choice: Any = None


class ForwardMethod(Method, ABC):
    """Base of methods that change features before the fusion, in training forwards only.

    A subclass defines `transform`, and `begin` or `look` for earlier choices. Features of an encoder in eval mode stay
    unchanged. Keep a reference to the method: garbage collection of the method removes its hooks.

    Args:
        monitor: a `ModalityMonitor`, which other methods may share.
        start: first training forward or epoch of the window, counted from 0.
        end: last training forward or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"` for training forwards, or `"epoch"`, set by `set_epoch`.
        seed: seed of all randomness; None for `torch.initial_seed()` of the first rank, read now.

    Attributes:
        forwards: number of training forwards so far.
        seed: seed of all randomness.

    Raises:
        TypeError: if `monitor` is no `ModalityMonitor`.
        ValueError: for an option outside its range.

    Reference:
        docs/adding.md.
    """

    def __init__(
        self,
        monitor: ModalityMonitor,
        *,
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
        seed: int | None = None,
    ) -> None:
        check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
        super().__init__(start=start, end=end, unit=unit)
        self.monitor = monitor
        self.seed = shared_seed(monitor.group, seed)
        self.forwards = 0
        self._key = object()  # key of `Pass.notes`, which must hold no reference to the method
        monitor.hooks.transforms.add(self._on_output)

    @abstractmethod
    def transform(self, name: str, features: Tensor, current: Pass) -> Tensor:
        """Return the features for the fusion in place of `features` `(B, ...)`; `features` itself for no change.

        Called for each floating tensor in the output of the encoder of modality `name`, and again with the same pass
        when activation checkpointing repeats the encoder's forward, where the result has to be the same.
        """

    def begin(self, current: Pass, acts: bool) -> Any:
        """Return the method's choice for a training forward after the first encoder's call, for `choice_in`.

        `acts` is whether the forward lies in the window.
        """

    def look(self, name: str, output: Any, current: Pass) -> None:
        """Inspect the output of the encoder of modality `name` in a training forward, before any `transform`."""

    def generator(self, current: Pass, device: torch.device) -> torch.Generator:
        """Return a generator with a stream that is a function of (seed, number of the forward, rank)."""
        return generator_for(self.seed, self.number_of(current), rank_in(self.monitor.group), device)

    def choice_in(self, current: Pass) -> Any:
        """Return the result of `begin` for a pass; None for a pass without a call of `begin`."""
        begun: _Begun | None = current.notes.get(self._key)
        return None if begun is None else begun.choice

    def number_of(self, current: Pass) -> int:
        """Return the number of training forwards before a pass."""
        begun: _Begun = current.notes[self._key]
        return begun.number

    def stats(self) -> dict[str, int]:
        """Return counts of training forwards and of irregularities, by name."""
        return {"forwards": self.forwards, **super().stats()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume, of plain numbers and tensors."""
        return {"forwards": self.forwards, "seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint. A load that fails changes nothing.

        Args:
            state: result of `state_dict()`.

        Raises:
            TypeError, KeyError, ValueError: if `state` is no state of this method.
        """
        self.check_state(state)
        self.forwards, self.seed = int(state["forwards"]), int(state["seed"])
        self.epoch = None if state["epoch"] is None else int(state["epoch"])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where `load_state_dict` would, before anything changes."""
        check_entries(f"the state of {type(self).__name__}", state, ("forwards", "seed", "epoch"))
        check_count("forwards", state["forwards"])
        check_count("seed", state["seed"])
        check_count("epoch", state["epoch"], or_none=True)

    def remove(self) -> None:
        """Remove the method's hooks; the monitor stays. May be called twice."""
        super().remove()
        self.monitor.hooks.transforms.drop(self._on_output)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is inert, because hooks exist on the original monitor's model only.
        return {**super().__getstate__(), "removed": True}

    def _begin(self, current: Pass) -> _Begun:
        begun = current.notes[self._key] = _Begun(self.forwards, self.is_open(self.forwards))
        try:
            begun.choice = self.begin(current, begun.acts)
        except BaseException:
            del current.notes[self._key]
            raise
        self.forwards += 1
        return begun

    def _on_output(self, name: str, current: Pass, output: Any) -> Any:
        """Return an encoder's output with transformed features, the same when checkpointing repeats the forward."""
        begun: _Begun | None = current.notes.get(self._key)
        if begun is None:
            if in_backward():  # the forward ran before this method was built
                return output
            begun = self._begin(current)
        if not in_backward():
            begun.training.setdefault(name, self.monitor.encoders[name].training)
            self.look(name, output, current)
        if not (begun.acts and begun.training.get(name)):
            return output
        changed, encoder = False, self.monitor.encoders[name]

        def transformed(x: Tensor) -> Tensor:
            nonlocal changed
            if not is_feature(x):
                return x
            view = samples_first(encoder, output, x)
            result = self.transform(name, view, current)
            if result is view:
                return x
            changed = True
            return result if view is x else result.transpose(0, 1)

        sent = map_tensors(transformed, output)
        return sent if changed else output


def is_feature(x: Tensor) -> bool:
    """Whether a tensor of an encoder's output holds features, not a mask, indices, lengths or a single number."""
    return is_differentiable(x) and x.dim() > 0
