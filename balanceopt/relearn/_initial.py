"""The weights that encoders go back to: copied before training, kept on a device of choice, saved with the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from balanceopt._warnings import warn_user
from balanceopt.monitor import ModalityMonitor
from balanceopt.relearn._sharded import as_saved, local, local_start

# What torch.compile and activation checkpointing put into the names of a module's parameters.
_INSIDE = ("_orig_mod.", "_checkpoint_wrapped_module.")


class InitialWeights:
    """A copy of each encoder's own parameters, by dotted name.

    Those that are frozen, or not built yet (lazy modules), are copied when a forward finds them trainable and built:
    before any step could have changed them.

    Args:
        monitor: knows the encoders.
        device: where copies are kept; None for each parameter's own device.
    """

    def __init__(self, monitor: ModalityMonitor, device: torch.device | str | None) -> None:
        self.monitor = monitor
        self.device = None if device is None else torch.device(device)
        self.values: dict[str, Tensor] = {}
        self._waiting = set(self._by_dotted_name())
        self._warn_of_shared()
        self.take()

    @property
    def waiting(self) -> bool:
        """Whether some are still to be copied."""
        return bool(self._waiting)

    @property
    def nbytes(self) -> int:
        """Memory of the copies."""
        return sum(value.numel() * value.element_size() for value in self.values.values())

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Each modality's own parameters by dotted name, as they are now."""
        names = {id(p): _clean(n) for n, p in reversed(list(self.monitor.model.named_parameters()))}
        return {m: {names[id(p)]: p for p in own} for m, own in self.monitor.parameters.items()}

    def take(self) -> None:
        """Copy what is waited for and is built and trainable by now."""
        for name, tensor in self._by_dotted_name().items():
            if name in self._waiting and tensor.requires_grad and not is_lazy(tensor):
                self._waiting.discard(name)
                if tensor.is_floating_point() or tensor.is_complex():
                    self.values[name] = self._kept(local(tensor.detach()).clone(), tensor)

    def give(self, state: Mapping[str, Any]) -> None:
        """Take the user's values: a model's state dict, or each encoder's own by modality.

        Raises:
            ValueError: if a trainable parameter is missing in it, or has another shape.
        """
        given = self._by_name(state)
        current = self._by_dotted_name()
        missing = [name for name, p in current.items() if name not in given and p.requires_grad]
        if missing:
            raise ValueError(
                f"`initial` should hold every trainable parameter of the encoders. Missing: {missing}."
            )
        self._set({name: value for name, value in given.items() if name in current}, current)

    def state(self) -> dict[str, Tensor]:
        """The copies by name, as a checkpoint holds them: sharded where the parameters are."""
        current = self._by_dotted_name()
        return {
            name: as_saved(value, current[name]) for name, value in self.values.items() if name in current
        }

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint of another model.

        Raises:
            ValueError: if names or shapes differ.
        """
        current = self._by_dotted_name()
        unknown = sorted(state.keys() - current.keys())
        missing = sorted(self.values.keys() - state.keys())
        if unknown or missing:
            raise ValueError(
                f"the state should hold this model's initial weights. Unknown: {unknown}; missing: {missing}."
            )
        _check_shapes(state, current)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a checkpoint's copies over."""
        self.check(state)
        self._set(state, self._by_dotted_name())

    def starts(self, current: Mapping[str, nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors to change, this rank's part of each, and what they started from; frozen ones are left out."""
        targets, starts, unknown = [], [], []
        for name, tensor in current.items():
            if not tensor.requires_grad or is_lazy(tensor) or not tensor.is_floating_point():
                continue
            if name not in self.values:
                unknown.append(name)
                continue
            targets.append(local(tensor.detach()))
            starts.append(local_start(self.values[name], tensor))
        if unknown:
            warn_user(
                f"parameters {unknown} came after the scheduler was built: there is no initial value for them, and "
                "they are left as they are."
            )
        return targets, starts

    def _by_dotted_name(self) -> dict[str, nn.Parameter]:
        """The parameters of all modalities."""
        return {name: p for own in self.parameters().values() for name, p in own.items()}

    def _set(self, state: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
        _check_shapes(state, current)
        for name, value in state.items():
            self._waiting.discard(name)
            self.values[name] = self._kept(local_start(value.detach(), current[name]).clone(), current[name])

    def _kept(self, value: Tensor, tensor: Tensor) -> Tensor:
        return value.to(tensor.device if self.device is None else self.device)

    def _by_name(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """By dotted name in the model, from either form."""
        if not set(state) <= set(self.monitor.modalities) or not all(
            isinstance(own, Mapping) for own in state.values()
        ):
            return {_clean(name): value for name, value in state.items()}
        prefixes = {id(part): name for name, part in self.monitor.model.named_modules()}
        given = {}
        for modality, own in state.items():
            prefix = prefixes[id(self.monitor.encoders[modality])]
            given.update(
                {_clean(f"{prefix}.{name}" if prefix else name): value for name, value in own.items()}
            )
        return given

    def _warn_of_shared(self) -> None:
        own = {id(p) for parameters in self.monitor.parameters.values() for p in parameters}
        encoders = self.monitor.encoders.items()
        shared = {m: sum(id(p) not in own for p in encoder.parameters()) for m, encoder in encoders}
        if any(shared.values()):
            found = ", ".join(f"{modality}: {count}" for modality, count in shared.items() if count)
            warn_user(
                f"some of the encoders' parameters are shared with other modules ({found}): no single strength would "
                "be right for them, and re-learning leaves them as they are."
            )


def _check_shapes(state: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        tensor = current[name]
        if not is_lazy(tensor) and value.shape != tensor.shape:
            raise ValueError(
                f"the initial value of {name!r} should have shape {tuple(tensor.shape)}. Found {tuple(value.shape)}."
            )


def _clean(name: str) -> str:
    for part in _INSIDE:
        name = name.replace(part, "")
    return name.removeprefix("module.")  # DistributedDataParallel
