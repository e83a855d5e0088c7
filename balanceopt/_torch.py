"""Private parts of torch that have no public name, in one place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch


def backward_number() -> int:
    """Return the number of the backward that is running in this thread; -1 outside of any."""
    return torch._C._current_graph_task_id()


def after_backward(callback: Callable[[], None]) -> None:
    """Call `callback` once when the backward that is running ends, as DistributedDataParallel does."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def keep_compiler_stance() -> Callable[[], object]:
    """Return a function that gives torch.compile back the stance that it has now."""
    from torch._dynamo import eval_frame  # not at import: it takes long, and few need it

    return partial(eval_frame._set_stance, eval_frame._stance)


def holds_compiled_code() -> bool:
    """Whether the process holds code made by torch.compile, which torch runs for all modules of a class alike."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    return dynamo is not None and any(code() is not None for code in dynamo.output_codes.seen)
