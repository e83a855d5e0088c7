"""Base of everything that holds hooks on a user's model or optimizer: a `with` block removes them."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

Self = TypeVar("Self", bound="Removable")


class Removable:
    """Base of classes with hooks: the end of a `with` block calls `remove()`, after an exception too."""

    def remove(self) -> object:
        """Remove every hook; a second call is a no-op."""
        raise NotImplementedError

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
