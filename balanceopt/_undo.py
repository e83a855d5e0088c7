"""Changes of somebody else's objects for a while, put back however that ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

_ABSENT = object()


class Undo:
    """The way back from changes, noted before each of them is made.

    `with undo, undo:` goes back at the end of the block, also after an exception or an interrupt. An interrupt of the
    first exit is made good by the second one; what two interrupts left is put back by the next `restore`.
    """

    def __init__(self) -> None:
        """Nothing is changed yet."""
        self._steps: list[Callable[[], object]] = []

    def note(self, step: Callable[[], object]) -> None:
        """Call `step` on the way back. It must do no harm where nothing was changed, or when it is called twice."""
        self._steps.append(step)

    def set(self, namespace: dict[str, Any], name: str, value: Any) -> None:
        """Set an entry of a namespace, such as `vars(module)`."""
        self.note(partial(_put, namespace, name, namespace.get(name, _ABSENT)))
        namespace[name] = value

    @property
    def depth(self) -> int:
        """How many steps lead back."""
        return len(self._steps)

    def restore(self, depth: int = 0) -> None:
        """Go back, latest change first, until `depth` steps are left.

        A step that raises an exception does not keep the others from being taken, and is tried twice.
        """
        for _ in range(2):
            errors = [error for step in reversed(self._steps[depth:]) if (error := _try(step)) is not None]
            if not errors:
                break
        del self._steps[depth:]  # not before: after an interrupt all of them are taken again, in their order
        if errors:
            raise errors[0]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.restore()


class Attempt(Undo):
    """Changes that stay where the block `with attempt, attempt:` ends well, and go back where it does not."""

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self.restore()


def optimizers_in(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimizer and those that it holds in attributes or lists of whatever name, the outermost first."""
    result = [optimizer]
    for holder in result:
        for value in vars(holder).values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(inner, torch.optim.Optimizer) and not any(inner is other for other in result):
                    result.append(inner)
    return result


class Before:
    """An optimizer and those inside it as they are before a change: attributes, groups, state; no copies of tensors.

    Args:
        optimizer: that is about to change.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._held: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        for inner in optimizers_in(optimizer):
            state = inner.state
            containers: list[dict[Any, Any]] = [vars(inner), *inner.param_groups, state]
            containers += [own for own in state.values() if isinstance(own, dict)]
            self._held += [(container, dict(container)) for container in containers]

    def restore(self) -> None:
        """Put everything back."""
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
