"""The methods that every base optimizer is tried with. A new method adds its rows here and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf

import balanceopt as bo


@dataclass(frozen=True)
class Method:
    """One modulation.

    Attributes:
        name: what a test is called.
        make: the modulation at work.
        limit: the modulation with the options at which it is the base optimizer, bit for bit.
    """

    name: str
    make: Callable[[], bo.Modulation]
    limit: Callable[[], bo.Modulation]

    def __str__(self) -> str:
        return self.name


METHODS = [
    Method("OGM", partial(bo.OGM, 0.5, noise=False), limit=partial(bo.OGM, 0, noise=False)),
    Method("OGM-GE", partial(bo.OGM, 0.5), limit=partial(bo.OGM, 0, noise_scale=0)),
    Method(
        "OGM update",
        partial(bo.OGM, 0.5, noise=False, apply_to="update"),
        limit=partial(bo.OGM, 0, noise=False, apply_to="update"),
    ),
    Method(
        "Fixed",
        partial(bo.FixedModulation, {"audio": 0.5}),
        limit=partial(bo.FixedModulation, {"audio": 1, "visual": 1}),
    ),
    Method("AGM", bo.AGM, limit=partial(bo.AGM, 0)),
    Method("AGM update", partial(bo.AGM, apply_to="update"), limit=partial(bo.AGM, 0, apply_to="update")),
    Method("MLB", bo.MLB, limit=partial(bo.MLB, 0)),
    Method("InfoReg", bo.InfoReg, limit=partial(bo.InfoReg, threshold=inf)),
    # All units are kept where the ratios are clamped to 1; the offset makes every significance positive.
    Method("AMSS", bo.AMSS, limit=partial(bo.AMSS, clamp=(1, 1), offset=100)),
    Method(
        "AMSS+",
        partial(bo.AMSS, scale="unbiased", clamp=(0.3, 0.9)),  # one unit of six moves in each step, or more
        limit=partial(bo.AMSS, scale="unbiased", clamp=(1, 1), offset=100),
    ),
]
