"""Interrupts at single lines of the package, and what may not be left of them."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Line = tuple[str, int]


def lines_of(run: Callable[[], object]) -> list[Line]:
    """The package's lines in the order in which they begin while `run` runs."""
    lines: list[Line] = []
    _traced(run, lines.append)
    return lines


def first_and_last(lines: list[Line], files: Container[str]) -> list[int]:
    """For each different line of some files where it begins first and last."""
    numbered = [(line, i) for i, line in enumerate(lines) if Path(line[0]).name in files]
    return sorted({*dict(numbered).values(), *dict(numbered[::-1]).values()})


def interrupted(
    run: Callable[[], object], number: int, kind: type[BaseException] = KeyboardInterrupt
) -> bool:
    """Run with `kind` raised where the package's line of that number begins; whether it came to that."""
    left = number

    def at_line(line: Line) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise kind

    try:
        _traced(run, at_line)
    except kind:
        return True
    except RuntimeError as error:  # of what the user's own forward is told
        if isinstance(error.__cause__, kind):
            return True
        raise
    return False


def _traced(run: Callable[[], object], at_line: Callable[[Line], None]) -> None:
    def trace(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if "/balanceopt/" not in name:
            return None
        if event == "line":
            at_line((name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    gc.disable()  # what a collection finalizes meanwhile would run lines of the package too
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
        gc.enable()


def shape_of(model: nn.Module) -> dict[str, Any]:
    """All of a model, and of the process, that an interrupt must leave as it was."""

    def each() -> Iterator[tuple[str, Any]]:
        yield "gradients", torch.is_grad_enabled()
        yield "torch's stream", hash(torch.get_rng_state().numpy().tobytes())
        yield "numpy's stream", hash(np.random.get_state()[1].tobytes())  # type: ignore[index]
        yield "Python's stream", hash(random.getstate())
        yield "stance", str(torch._dynamo.eval_frame._stance)
        yield "global hooks", [len(h) for n, h in vars(nn.modules.module).items() if n.endswith("_hooks")]
        yield "checkpoint", torch.utils.checkpoint.check_backward_validity
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                yield f"{name}.{key}", [value, *value.items()] if isinstance(value, dict) else value

    return dict(each())


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is not the same object any more."""
    return [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)
