"""The rows of the tables: what is added to joint training, and what of it is tuned.

A row is data: options of `benchmarks.evidence.building`, the one of them that is tuned, and those that it takes over
from what another row has chosen. A new method is one line in `METHODS`, a new recipe one in `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.evidence.sets import EvidenceSet
from benchmarks.tasks import CLASS, NUMBER, Task

Kind = Literal["reference", "alone", "control", "method", "recipe"]

# What every other row is compared with.
JOINT = "joint"
# Ends the name of a row in which the own heads vote with the joint head, after another row's training.
VOTES = ", heads vote"


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
    """One way to train, or to predict after it.

    Args:
        name: in the table.
        options: fixed ones.
        knobs: tuned one after the other.
        inherits: option -> (row that has chosen it, its name there).
        kind: what it is in the table.
        modality: the only one that is trained; None for all.
        votes: whether all heads answer together.
        again: whether it is run on the second and third setting of a set too, else on the first alone.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    knobs: tuple[Knob, ...] = ()
    inherits: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    kind: Kind = "method"
    modality: str | None = None
    votes: bool = False
    again: bool = True

    def serves(self, task: Task) -> bool:
        """Whether it can be run: parts of a regression add up and do not vote, and some losses are of classes alone."""
        if task is NUMBER and (self.name.endswith(VOTES) or self.options.get("unimodal_heads") == "shared"):
            return False
        return task is CLASS or not _OF_CLASSES & {*self.options, *(knob.name for knob in self.knobs)}

    def needs(self) -> set[str]:
        """Rows that must be there before this one can be tuned."""
        return {row for row, _ in self.inherits.values()} - {self.name}

    def read(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """What was measured of this row in a run that it may share with another one."""
        return {**result, **result["vote"]} if self.votes else result


# Other settings of a set that is there already, on which not every row is worth its time.
_AGAIN = ("av_noise_image", "av_noise_audio")
# Options of losses that are defined for classes alone.
_OF_CLASSES = {"tcmax_weight", "mcr_weight"}

_LIKE_JOINT = {"lr": (JOINT, "lr"), "epochs": (JOINT, "epochs")}
_OWN = {"unimodal_heads": "own", "unimodal_weight": 1.0}
_WEIGHTS = Knob("unimodal_weight", (0.3, 1.0, 3.0))


def _row(
    name: str, options: Mapping[str, Any], *knobs: Knob, kind: Kind = "method", again: bool = True
) -> Row:
    return Row(name, options, knobs, _LIKE_JOINT, kind, again=again)


def _recipe(name: str, **options: Any) -> Row:
    return _row(f"recipe: {name}", options, kind="recipe")


# What a method has to beat, beside joint training and the encoders alone.
CONTROLS = (
    _row("encoders' learning rate x c", {}, Knob("encoder_factor", (0.3, 3.0, 10.0)), kind="control"),
    _row("modality dropout, fixed rate", {}, Knob("dropout_p", (0.15, 0.3, 0.5)), kind="control"),
    _row("uni-modal losses", {"unimodal_heads": "own"}, _WEIGHTS, kind="control"),
)

METHODS = (
    _row("uni-modal losses, shared head", {"unimodal_heads": "shared"}, _WEIGHTS, again=False),
    _row("DGL", {"unimodal_heads": "own", "unimodal_joint": 0.0}, _WEIGHTS),
    _row("MMPareto", _OWN, Knob("mmpareto_gamma", (1.0, 1.5, 2.0)), again=False),
    _row("G-Blending", _OWN, Knob("blend_every", (1, 2, 4))),
    _row("MCR's competition + uni-modal losses", _OWN, Knob("mcr_weight", (0.1, 0.3, 1.0)), again=False),
    _row("TCMax", {}, Knob("tcmax_weight", (0.3, 0.6, 1.0))),
    _row("OGM-GE", {"ogm_noise": True}, Knob("ogm_alpha", (0.1, 0.3, 0.8))),
    _row("AGM", {}, Knob("agm_alpha", (0.1, 0.3, 1.0))),
    _row("MLB", _OWN, Knob("mlb_alpha", (0.5, 2.0, 5.0))),
    _row("InfoReg", {}, Knob("inforeg_scale", (0.01, 0.1, 1.0)), again=False),
    _row("OPM", {}, Knob("opm_q_base", (0.25, 0.5, 0.75))),
    _row("AMSS+", {"amss_scale": "unbiased"}, Knob("amss_temperature", (0.1, 0.2, 0.5))),
    _row("re-learning", {}, Knob("relearn_lam", (1.0, 3.0, 7.0))),
)

# One setting for all sets, nothing tuned on any.
RECIPES = (
    replace(_recipe("bo.balance", balance=True), votes=True),
    _recipe("uni-modal losses", **_OWN),
    _recipe("dropout 0.3 + uni-modal losses", **_OWN, dropout_p=0.3),
    _recipe("re-learning + uni-modal losses", **_OWN, relearn_lam=3.0),
    _recipe("OPM 0.25 + uni-modal losses", **_OWN, opm_q_base=0.25),
    _recipe("OPM 0.25 + re-learning + uni-modal losses", **_OWN, opm_q_base=0.25, relearn_lam=3.0),
)


def rows_of(found: EvidenceSet) -> dict[str, Row]:
    """Name -> row for a set, in the order of the table."""
    by_lr = Knob("lr", found.lrs)
    start = {"lr": _middle(found.lrs), "epochs": _middle(found.lengths)}
    # Longer than it takes to converge would only cost time, for this row and all others.
    length = Knob("epochs", found.lengths, tolerance=0.5)
    joint = Row(JOINT, start, (by_lr, length), kind="reference")
    # As joint training, an encoder alone has the best learning rate for itself.
    as_long = {"epochs": (JOINT, "epochs")}
    alone = [Row(f"{m} alone", {}, (by_lr,), as_long, "alone", modality=m) for m in found.modalities]
    by_adam = Knob("lr", found.adam_lrs)
    adamw = Row("joint, AdamW", {"optimizer": "adamw"}, (by_adam,), as_long, "reference", again=False)
    plain = (joint, *alone, adamw, *_rivals(found.modalities))
    rows = [
        row
        for row in (*plain, *CONTROLS, *METHODS, *RECIPES)
        if row.serves(found.task) and (row.again or found.name not in _AGAIN)
    ]
    pairs = ((row, *_voting(row, found.task)) for row in rows)
    return {row.name: row for pair in pairs for row in pair}


def with_needs(rows: Mapping[str, Row], names: set[str]) -> dict[str, Row]:
    """These rows and all that they need, in the order of the table; joint training is always among them."""
    wanted = {JOINT, *names}
    while more := {need for name in wanted for need in rows[name].needs()} - wanted:
        wanted |= more
    return {name: row for name, row in rows.items() if name in wanted}


def _rivals(modalities: Sequence[str]) -> list[Row]:
    """What can be made of encoders that were trained alone, each with its own best learning rate."""
    alone = {f"{m}_lr": (f"{m} alone", "lr") for m in modalities}
    length = {"epochs": (JOINT, "epochs")}
    return [
        Row(
            "ensemble of encoders alone (UME)", {"start": "ensemble"},
            (Knob("pool", ("logits", "probabilities")),), {**alone, **length}, "control",
        ),
        Row(
            "encoders alone, then frozen", {"start": "frozen"},
            (Knob("lr_factor", (0.1, 0.3, 1.0)),), {**alone, **_LIKE_JOINT}, "control",
        ),
        Row(
            "encoders alone, then fine-tuned", {"start": "tuned"},
            (Knob("encoder_factor", (0.1, 0.3, 1.0)),), {**alone, **_LIKE_JOINT}, "control",
        ),
    ]  # fmt: skip


def _voting(row: Row, task: Task) -> list[Row]:
    """The same training with another way to predict, for rows with own heads."""
    if row.options.get("unimodal_heads") != "own":
        return []
    chosen = {knob.name: (row.name, knob.name) for knob in row.knobs}
    votes = replace(row, name=row.name + VOTES, knobs=(), inherits={**row.inherits, **chosen}, votes=True)
    return [votes] if votes.serves(task) else []


def _middle(values: tuple[Any, ...]) -> Any:
    return values[len(values) // 2]
