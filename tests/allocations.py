"""How much memory a piece of code has allocated at once, as torch's own profiler counts it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes: the most that `run` had at once, and what it has kept."""
    gc.collect()  # or garbage from before is given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    levels = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    return (max(levels, default=0), levels[-1] if levels else 0)
