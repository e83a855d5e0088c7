"""Counts of events, and messages to the user about calls that no hook saw and scores that never came."""

from __future__ import annotations

import weakref
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from balanceopt._torch import holds_compiled_code
from balanceopt._warnings import warn_user

if TYPE_CHECKING:
    from balanceopt.monitor._forward import Pass
    from balanceopt.monitor._monitor import ModalityMonitor

# Backwards that reach an encoder before the user is told that no hook saw its call.
_UNSEEN_BACKWARDS = 10
COMPILED = (
    "torch.compile made its code before the monitor's hooks came, for this model or another one of its class. Call "
    "torch._dynamo.reset(), and build the monitor before the first call of the compiled model."
)


class Seen:
    """Counts of events, in total and since the last score."""

    def __init__(self) -> None:
        """Start with all counts at 0."""
        self.total: Counter[str] = Counter()
        self.recent: Counter[str] = Counter()

    def note(self, what: str) -> None:
        """Count an event."""
        self.total[what] += 1
        self.recent[what] += 1

    def note_score(self) -> None:
        """Clear the recent counts, since a pass was scored."""
        self.recent.clear()


def why_silent(seen: Seen, *, compiled: bool) -> str:
    """Describe for the user why no pass may have been scored recently."""
    recent = seen.recent
    reasons = []
    uncalled = _uncalled(recent)
    if compiled and (uncalled or not recent["heads"]):
        reasons.append(
            "the model was compiled, or another one of its class: build the monitor before the first call of the "
            "compiled model, or call torch._dynamo.reset()"
        )
    reasons += uncalled
    if recent["forwards"] and not recent["heads"]:
        reasons.append("the head's hook did not fire: the head was replaced, or only its weights are used")
    elif not recent["forwards"] and recent["reruns"]:
        reasons.append(
            "the whole model is inside reentrant activation checkpointing, whose first run has no gradients: use "
            "checkpoint(..., use_reentrant=False)"
        )
    elif not recent["forwards"]:
        reasons.append(
            "no forward of the model in training mode was seen (fine-tuning in eval mode: train_only=False; "
            "torch.func transforms are not watched: call loss.backward())"
        )
    elif recent["thrown"]:
        reasons.append(
            "zero_grad (or monitor.reset) came between backward and step, and the scores went with the gradients: call "
            "it before backward"
        )
    elif not recent["passes"] and recent["to inputs"]:
        reasons.append(
            "backward reached the head's output and no parameter (torch.autograd.grad to the inputs, frozen parameters)"
        )
    elif not recent["passes"]:
        reasons.append("no backward reached the head's output (frozen model, or no loss on it)")
    elif recent["unscored"]:
        reasons.append("no labels or no features came with the pass: call monitor.observe(labels)")
    reasons.append(
        ("otherwise: " if reasons else "")
        + "model compiled before the monitor was built, wrong or replaced head, head used functionally, frozen model"
    )
    return "; ".join(reasons)


def _uncalled(recent: Counter[str]) -> list[str]:
    missing = [
        w.split(":", 1)[1] for w, n in recent.items() if w.startswith("missing:") and n >= recent["forwards"]
    ]
    return [
        f"the encoder of {name!r} was never called: give the module that the model calls" for name in missing
    ]


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
