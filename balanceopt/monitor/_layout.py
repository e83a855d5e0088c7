"""What passes have shown of the way from encoders to head, as plain numbers that a checkpoint can carry."""

from __future__ import annotations

from typing import Any

from balanceopt.monitor._matching import Projection, projection_number, projection_numbered
from balanceopt.monitor._per_head import PerHead
from balanceopt.monitor._split import SplitHead
from balanceopt.monitor._unimodal import Automatic, UnimodalLogits


def layout_of(scores: UnimodalLogits | None) -> dict[str, Any]:
    """Which kind of scores was chosen, each modality's columns, and how its features become what the head gets.

    A pass whose features were dropped can't always show it again, and training goes on with one after a resume.
    """
    chosen = scores.chosen if isinstance(scores, Automatic) else scores
    columns = chosen.columns if isinstance(chosen, SplitHead) else {}
    projections: dict[str, Projection | None] = {}
    if isinstance(chosen, (SplitHead, PerHead)):
        projections = chosen.projections
    return {
        "scores": None if chosen is None else chosen.name,
        "columns": {name: [own.start, own.stop] for name, own in columns.items() if name in projections},
        "projections": {name: projection_number(own) for name, own in projections.items()},
    }


def lay_out(scores: UnimodalLogits | None, layout: dict[str, Any]) -> None:
    """Take over what `layout_of` told; of a layout that can't be read, nothing."""
    columns = {name: slice(*own) for name, own in layout["columns"].items()}
    projections = {name: projection_numbered(number) for name, number in layout["projections"].items()}
    if isinstance(scores, Automatic):
        if layout["scores"] != scores.chosen.name:
            scores.give_up()
        scores = scores.chosen
    if scores is None or scores.name != layout["scores"]:
        return  # another monitor: it finds out by itself
    if isinstance(scores, SplitHead):
        scores.columns.update(columns)
    if isinstance(scores, (SplitHead, PerHead)):
        scores.projections.update(projections)
