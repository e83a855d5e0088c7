"""ForwardMethod: methods that change features on their way into the fusion."""

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
    """A training forward that a method has seen begin.

    Attributes:
        number: how many came before.
        acts: whether the forward lies in the method's window.
        training: by modality, whether its encoder was in training mode when it first ran.
        choice: what `begin` returned.
    """

    number: int
    acts: bool
    training: dict[str, bool] = field(default_factory=dict)
    choice: Any = None


class ForwardMethod(Method, ABC):
    """A method that changes features on their way into the fusion, in training forwards alone.

    A subclass defines `transform`, and `begin` or `look` where it has to choose or learn something before. An encoder
    in eval mode is left alone. Keep a reference: a method that is garbage-collected takes its hooks off.

    Args:
        monitor: a `ModalityMonitor`; others may use it at the same time.
        start: first training forward or epoch in which the method acts, counted from 0.
        end: last one, inclusive; None for no end.
        unit: `"step"` to count training forwards, or `"epoch"` to count the epochs that `set_epoch` is told.
        seed: of all randomness; None for `torch.initial_seed()` of the first rank, read now.

    Attributes:
        forwards: training forwards seen so far.
        seed: of all randomness.

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
        self._key = object()  # of the method's notes on a pass, which does not keep the method alive
        monitor.hooks.transforms.add(self._on_output)

    @abstractmethod
    def transform(self, name: str, features: Tensor, current: Pass) -> Tensor:
        """Return what goes into the fusion instead of a tensor of features `(B, ...)`; the tensor to leave it alone.

        Called for each floating tensor that the encoder of modality `name` returns, and again with the same pass when
        activation checkpointing runs the encoder a second time: the result has to be the same then.
        """

    def begin(self, current: Pass, acts: bool) -> Any:
        """Choose what to do in a training forward, when its first encoder has run; `acts` if it lies in the window.

        What is returned is what `choice_in` gives back for this forward.
        """

    def look(self, name: str, output: Any, current: Pass) -> None:
        """Look at what the encoder of modality `name` returned in a training forward, before any `transform`."""

    def generator(self, current: Pass, device: torch.device) -> torch.Generator:
        """Return a generator whose stream is a function of the seed, the number of the forward and the rank."""
        return generator_for(self.seed, self.number_of(current), rank_in(self.monitor.group), device)

    def choice_in(self, current: Pass) -> Any:
        """Return what `begin` chose for a pass; None if the method did not see the pass begin."""
        begun: _Begun | None = current.notes.get(self._key)
        return None if begun is None else begun.choice

    def number_of(self, current: Pass) -> int:
        """Return how many training forwards came before a pass."""
        begun: _Begun = current.notes[self._key]
        return begun.number

    def stats(self) -> dict[str, int]:
        """Return how many training forwards were seen, and how often something odd happened, by name."""
        return {"forwards": self.forwards, **super().stats()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on bit for bit: plain numbers and tensors."""
        return {"forwards": self.forwards, "seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. A load that fails changes nothing.

        Args:
            state: from `state_dict()`.

        Raises:
            TypeError, KeyError, ValueError: if it is none of this method.
        """
        self.check_state(state)
        self.forwards, self.seed = int(state["forwards"]), int(state["seed"])
        self.epoch = None if state["epoch"] is None else int(state["epoch"])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse what `load_state_dict` can't take.

        Raises:
            TypeError, KeyError, ValueError: as `load_state_dict`.
        """
        check_entries(f"the state of {type(self).__name__}", state, ("forwards", "seed", "epoch"))
        check_count("forwards", state["forwards"])
        check_count("seed", state["seed"])
        check_count("epoch", state["epoch"], or_none=True)

    def remove(self) -> None:
        """Act no more. The monitor stays. May be called twice."""
        super().remove()
        self.monitor.hooks.transforms.drop(self._on_output)

    def __getstate__(self) -> dict[str, Any]:
        # The hooks are on the model of this one's monitor: a copy acts on nothing.
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
        """What goes on into the fusion instead of an encoder's output; the same when the forward is run again."""
        begun: _Begun | None = current.notes.get(self._key)
        if begun is None:
            if in_backward():  # the forward ran before this method was there
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
    """Whether a tensor of an encoder's output holds features: not masks, indices, lengths or single numbers."""
    return is_differentiable(x) and x.dim() > 0
