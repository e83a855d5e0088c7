"""Detection of encoders whose parameters get gradients though no hook saw a call of the encoder."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from balanceopt._torch import holds_compiled_code
from balanceopt._warnings import warn_user
from balanceopt.monitor._forward import Pass

if TYPE_CHECKING:
    from balanceopt.monitor._monitor import ModalityMonitor

# Backwards that reach an encoder before the user is told that no hook saw its call.
_UNSEEN_BACKWARDS = 10
COMPILED = (
    "torch.compile made its code before the monitor's hooks came, for this model or another one of its class. Call "
    "torch._dynamo.reset(), and build the monitor before the first call of the compiled model."
)


def compiled_before(name: str) -> str:
    """Return the message for an encoder that has gradients but no seen call, in a process with compiled code."""
    return f"the encoder of {name!r} has gradients, and no call of it was seen: {COMPILED}"


class CallWatch:
    """Count the backwards to each encoder until a hook sees the encoder's first call in training.

    Args:
        monitor: monitor whose encoders are watched.
        who: name, in messages, of the object that needs the calls; None to report compiled code only.
        consequence: effect, in messages, of calls that no hook sees.
    """

    def __init__(self, monitor: ModalityMonitor, who: str | None, consequence: str) -> None:
        self._monitor = weakref.ref(monitor)
        self._who, self._consequence = who, consequence
        self._fired: set[str] = set()
        self._backwards = dict.fromkeys(monitor.modalities, 0)
        self._handles: dict[str, RemovableHandle] = {}
        for name, params in monitor.parameters.items():
            for parameter in [p for p in params if p.requires_grad and not is_lazy(p)][:1]:
                hook = partial(self._count, name)
                self._handles[name] = parameter.register_post_accumulate_grad_hook(hook)
        if self._handles:
            monitor.hooks.outputs.add(self._on_output)

    def remove(self) -> None:
        """Remove all hooks. May be called twice."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        if (monitor := self._monitor()) is not None:
            monitor.hooks.outputs.drop(self._on_output)

    def _on_output(self, name: str, output: Any, current: Pass | None) -> None:
        self._fired.add(name)
        if current is not None and not current.rehearsal and (handle := self._handles.pop(name, None)):
            handle.remove()
            if not self._handles:
                self.remove()

    def _count(self, name: str, parameter: nn.Parameter | Tensor) -> None:
        self._backwards[name] += 1
        monitor = self._monitor()
        if self._backwards[name] < _UNSEEN_BACKWARDS or monitor is None:
            return
        self.remove()
        if name not in self._fired and holds_compiled_code():
            raise RuntimeError(f"{compiled_before(name)} Until then {self._consequence}.")
        if self._who is None:
            return
        warn_user(
            f"{_UNSEEN_BACKWARDS} backwards without a training forward that {self._who} saw: {self._consequence}. "
            f"Likely causes: {monitor.silence()}."
        )
