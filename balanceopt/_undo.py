"""Temporary changes of the user's objects, restored also after an exception or an interrupt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

_ABSENT = object()


class Undo:
    """A stack of steps that undo changes, each recorded before its change is made.

    `with undo, undo:` restores at the end of the block, also after an exception or an interrupt. The second exit
    completes a first one that was interrupted; after two interrupts the next `restore` does.
    """

    def __init__(self) -> None:
        """Start with no recorded step."""
        self._steps: list[Callable[[], object]] = []

    def note(self, step: Callable[[], object]) -> None:
        """Record a `step` for `restore` to call; `step` must be safe before its change and when called twice."""
        self._steps.append(step)

    def set(self, namespace: dict[str, Any], name: str, value: Any) -> None:
        """Set an entry of a namespace, such as `vars(module)`, and record its old value."""
        self.note(partial(_put, namespace, name, namespace.get(name, _ABSENT)))
        namespace[name] = value

    @property
    def depth(self) -> int:
        """The number of recorded steps."""
        return len(self._steps)

    def restore(self, depth: int = 0) -> None:
        """Undo changes, latest first, until `depth` steps are left.

        After a step that raises an exception the other steps run too; then all are tried once more.
        """
        for _ in range(2):
            errors = [error for step in reversed(self._steps[depth:]) if (error := _try(step)) is not None]
            if not errors:
                break
        del self._steps[depth:]  # only now, so that after an interrupt all steps run again in their order
        if errors:
            raise errors[0]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.restore()


class Attempt(Undo):
    """Changes that are undone only where the block `with attempt, attempt:` ends with an exception."""

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self.restore()
        else:
            self._steps.clear()  # they hold copies of what was changed


def optimizers_in(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimizer and the optimizers inside, held in attributes or lists of any name, outermost first."""
    result = [optimizer]
    for holder in result:
        for value in vars(holder).values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(inner, torch.optim.Optimizer) and not any(inner is other for other in result):
                    result.append(inner)
    return result


class Before:
    """A snapshot of an optimizer and those inside: attributes, groups and state, without copies of tensors.

    Args:
        optimizer: the optimizer that is about to change.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._held: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        for inner in optimizers_in(optimizer):
            state = inner.state
            containers: list[dict[Any, Any]] = [vars(inner), *inner.param_groups, state]
            containers += [own for own in state.values() if isinstance(own, dict)]
            self._held += [(container, dict(container)) for container in containers]

    def restore(self) -> None:
        """Restore attributes, groups and state to the snapshot."""
        for container, contents in self._held:
            container.clear()
            container.update(contents)


def _try(step: Callable[[], object]) -> Exception | None:
    try:
        step()
    except Exception as error:
        return error
    return None


def _put(namespace: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        namespace.pop(name, None)
    else:
        namespace[name] = value
