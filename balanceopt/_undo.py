"""Changes of somebody else's objects for a while, put back however that ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
