"""The rows of the tables: what is added to joint training, and what of it is tuned.

A row is data: options of `benchmarks.evidence.building`, the one of them that is tuned, and those that it takes over
from what another row has chosen. A new recipe is one line in `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.evidence.sets import EvidenceSet
from benchmarks.tasks import NUMBER, Task

Kind = Literal["reference", "alone", "method", "recipe"]

# What every row may be compared with.
JOINT = "joint"
JOINT_ADAMW = "joint, AdamW"
FIXED_DROPOUT = "fixed modality dropout"
UNIMODAL = "uni-modal losses"


@dataclass(frozen=True)
class Knob:
    """An option that is tuned.

    Args:
        name: of the option.
        candidates: to choose from, the cheapest first.
        tolerance: the first candidate that comes within so many points of the best mean accuracy wins.
    """

    name: str
    candidates: tuple[Any, ...]
    tolerance: float = 0.0

    def best(self, scores: Sequence[float]) -> Any:
        """The candidate to take, by the mean accuracy of each."""
        enough = max(scores) - self.tolerance
        return next(c for c, score in zip(self.candidates, scores, strict=True) if score >= enough)


@dataclass(frozen=True)
class Row:
    """One way to train.

    Args:
        name: in the table.
        options: fixed ones.
        knobs: tuned one after the other.
        inherits: option -> row that has chosen it.
        reference: row that it is compared with.
        kind: what it is in the table.
        modality: the only one that is trained; None for all.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    knobs: tuple[Knob, ...] = ()
    inherits: Mapping[str, str] = field(default_factory=dict)
    reference: str = JOINT
    kind: Kind = "method"
    modality: str | None = None

    def serves(self, task: Task) -> bool:
        """Whether it can be run: the shared head's parts of a regression add up to the target, so none can be it."""
        return task is not NUMBER or self.options.get("unimodal_heads") != "shared"

    def needs(self) -> set[str]:
        """Rows that must be there before this one can be tuned and judged."""
        return {*self.inherits.values(), self.reference} - {self.name}


_LIKE_JOINT = {"lr": JOINT, "epochs": JOINT}
_WEIGHTS = Knob("unimodal_weight", (0.3, 1.0, 3.0))
_ALPHAS = Knob("ogm_alpha", (0.1, 0.3, 0.8))
_TEMPERATURES = Knob("amss_temperature", (0.1, 0.2, 0.5))
# The published weight of AMSS+ makes steps many times as long.
_SHORTER = Knob("lr_factor", (1.0, 0.25, 1 / 16))


def _row(name: str, options: Mapping[str, Any], *knobs: Knob, **inherits: str) -> Row:
    return Row(name, options, knobs, {**_LIKE_JOINT, **inherits})


def _recipe(name: str, **options: Any) -> Row:
    return Row(f"recipe: {name}", options, (), _LIKE_JOINT, kind="recipe")


METHODS = (
    _row(FIXED_DROPOUT, {}, Knob("dropout_p", (0.25, 0.5, 0.75))),
    _row(UNIMODAL, {"unimodal_heads": "own"}, _WEIGHTS),
    _row("uni-modal losses, shared head", {"unimodal_heads": "shared"}, _WEIGHTS),
    _row("OGM", {"ogm_noise": False}, _ALPHAS),
    _row("OGM-GE", {"ogm_noise": True}, _ALPHAS),
    _row("OPM", {}, Knob("opm_q_base", (0.25, 0.5, 0.75))),
    _row("OGM + OPM", {"ogm_noise": False}, _ALPHAS, opm_q_base="OPM"),
    _row("AMSS", {"amss_scale": "none"}, _TEMPERATURES),
    _row('AMSS+ "unbiased"', {"amss_scale": "unbiased"}, _TEMPERATURES),
    _row('AMSS+ "official"', {"amss_scale": "official"}, _SHORTER, amss_temperature="AMSS"),
    _row("re-learning", {}, Knob("relearn_lam", (1.0, 3.0, 7.0))),
    _row("re-learning + uni-modal losses", {"unimodal_heads": "own"}, _WEIGHTS, relearn_lam="re-learning"),
    _row("OPM + uni-modal losses", {"unimodal_heads": "own"}, _WEIGHTS, opm_q_base="OPM"),
    _row("OGM-GE + uni-modal losses", {"unimodal_heads": "own", "ogm_noise": True}, _WEIGHTS, ogm_alpha="OGM-GE"),
    _row("fixed dropout + uni-modal losses", {"unimodal_heads": "own"}, _WEIGHTS, dropout_p=FIXED_DROPOUT),
    Row(
        "OGM-GE by update, AdamW", {"optimizer": "adamw", "ogm_noise": True, "ogm_apply_to": "update"}, (_ALPHAS,),
        {"lr": JOINT_ADAMW, "epochs": JOINT_ADAMW}, reference=JOINT_ADAMW,
    ),
)  # fmt: skip

_OWN = {"unimodal_heads": "own", "unimodal_weight": 1.0}

# One setting for all sets, nothing tuned on any.
RECIPES = (
    _recipe("uni-modal losses", **_OWN),
    _recipe("re-learning + uni-modal losses", **_OWN, relearn_lam=3.0),
    _recipe("re-learning + 3 x uni-modal losses", unimodal_heads="own", unimodal_weight=3.0, relearn_lam=3.0),
    _recipe("OPM 0.25 + uni-modal losses", **_OWN, opm_q_base=0.25),
    _recipe("OPM 0.25 + re-learning + uni-modal losses", **_OWN, opm_q_base=0.25, relearn_lam=3.0),
    _recipe(
        "OPM 0.25 + 3 x uni-modal losses, shared head",
        unimodal_heads="shared",
        unimodal_weight=3.0,
        opm_q_base=0.25,
    ),
)


def rows_of(found: EvidenceSet) -> dict[str, Row]:
    """All rows of a set, in the order of its table."""
    by_lr = Knob("lr", found.lrs)
    start = {"lr": _middle(found.lrs), "epochs": _middle(found.lengths)}
    # Longer than it takes to converge would only cost time, for this row and all others.
    length = Knob("epochs", found.lengths, tolerance=0.5)
    joint = Row(JOINT, start, (by_lr, length), kind="reference")
    # As joint training, an encoder alone has the best learning rate for itself.
    alone = [
        Row(f"{m} alone", {}, (by_lr,), {"epochs": JOINT}, kind="alone", modality=m) for m in found.modalities
    ]
    adamw = Row(
        JOINT_ADAMW, {"optimizer": "adamw"}, (Knob("lr", found.adam_lrs),), {"epochs": JOINT},
        kind="reference",
    )  # fmt: skip
    rows = (joint, *alone, adamw, *METHODS, *RECIPES)
    return {row.name: row for row in rows if row.serves(found.task)}


def with_needs(rows: Mapping[str, Row], names: set[str]) -> dict[str, Row]:
    """These rows and all that they need, in the order of the table; joint training is always among them."""
    wanted = {JOINT, *names}
    while more := {need for name in wanted for need in rows[name].needs()} - wanted:
        wanted |= more
    return {name: row for name, row in rows.items() if name in wanted}


def _middle(values: tuple[Any, ...]) -> Any:
    return values[len(values) // 2]
