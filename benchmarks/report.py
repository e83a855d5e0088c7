"""A comparison in words: a table, what it says, and the same as JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiment import Comparison, Outcome
from benchmarks.extras import need

# Points of accuracy below which a gap is not worth a sentence.
_NOTABLE = 1.0


def report(comparison: Comparison) -> str:
    """All of it: what was trained, what the numbers say, the table, how to read it."""
    return "\n".join(
        [
            _setting(comparison),
            "",
            "What it says",
            *(_bullet(sentence) for sentence in findings(comparison)),
            "",
            table(comparison),
            "",
            _legend(comparison),
        ]
    )


def table(comparison: Comparison) -> str:
    """Rows: ways to train. Columns: the whole model, each encoder's linear probe, the discrepancy ratio."""
    modalities = comparison.data.modalities
    ahead = dominant(comparison)
    rows = [["", "whole model", *(f"{m} encoder" for m in modalities), _ratio_name(comparison)]]
    alone = [mean_and_spread([o.probes[m] for o in comparison.alone[m]]) for m in modalities]
    rows.append(["each trained alone", "-", *alone, "-"])
    for name, outcomes in comparison.methods.items():
        probes = [mean_and_spread([o.probes[m] for o in outcomes]) for m in modalities]
        ratio = mean_and_spread([o.mean("ratio", ahead) for o in outcomes], digits=2)
        rows.append([name, mean_and_spread([o.accuracy for o in outcomes]), *probes, ratio])
    return aligned(rows)


def findings(comparison: Comparison) -> list[str]:
    """What the numbers say, in plain sentences; each only where the numbers say it."""
    first, *others = comparison.methods
    ratio = _mean(o.mean("ratio", dominant(comparison)) for o in comparison.methods[first])
    sentences = [_gap(comparison, first)]
    if ratio > 1.1:
        sentences.append(
            f"In {first} training the {dominant(comparison)} encoder gives the right answer {ratio:.1f} times the "
            f"probability that {_rest(comparison)} gives it. It explains the labels first and "
            "leaves little error to learn from."
        )
    best = max(comparison.alone, key=lambda m: _mean(o.accuracy for o in comparison.alone[m]))
    difference = _paired(comparison.methods[first], comparison.alone[best])
    verdict = "and is {:.1f} points better" if np.mean(difference) > 0 else "yet is {:.1f} points worse"
    sentences.append(
        f"The {first} model sees everything, {verdict.format(abs(np.mean(difference)))} than the {best} encoder "
        f"trained alone with a head of its own{_chance(difference)}."
    )
    sentences += [_effect(comparison, first, name) for name in others]
    if comparison.seeds == 1:
        sentences.append("This is one seed: a point or two may be chance. `--seeds 5` shows the spread.")
    return sentences


def save_json(comparison: Comparison, path: Path) -> None:
    """Every number of the table, seed by seed, and the sentences."""
    modalities = comparison.data.modalities
    content = {
        "data": comparison.data.name,
        "protocol": comparison.data.protocol,
        "modalities": comparison.data.about,
        "samples": {part: len(getattr(comparison.data, part)) for part in ("train", "val", "test")},
        "recipe": vars(comparison.recipe),
        "seeds": comparison.seeds,
        "alone": {
            m: {"accuracy": [o.accuracy for o in outcomes], "probe": [o.probes[m] for o in outcomes]}
            for m, outcomes in comparison.alone.items()
        },
        "methods": {
            name: {
                "accuracy": [o.accuracy for o in outcomes],
                "probe": {m: [o.probes[m] for o in outcomes] for m in modalities},
                **{
                    quantity: {m: [_or_none(o.mean(quantity, m)) for o in outcomes] for m in modalities}
                    for quantity in ("ratio", "coefficient", "drop_probability", "keep_ratio")
                },
            }
            for name, outcomes in comparison.methods.items()
        },
        "findings": findings(comparison),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first to the left, the others to the right; a line under the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "   ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 3 * (len(widths) - 1)), *lines[1:]])


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """`mean ± standard deviation`; only the value if there is one, a dash if there is none."""
    if not len(values) or np.isnan(values).any():
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def dominant(comparison: Comparison) -> str:
    """The modality that is ahead in the first method, by its mean ratio; the first one if nothing was recorded."""
    outcomes = next(iter(comparison.methods.values()))
    ratios = {m: _mean(o.mean("ratio", m) for o in outcomes) for m in comparison.data.modalities}
    return max(ratios, key=lambda m: -math.inf if math.isnan(ratios[m]) else ratios[m])


def _bullet(sentence: str) -> str:
    return textwrap.fill(
        sentence, 100, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False
    )


def _setting(comparison: Comparison) -> str:
    data, recipe = comparison.data, comparison.recipe
    seeds = "1 seed" if comparison.seeds == 1 else f"{comparison.seeds} seeds"
    width = max(map(len, data.modalities))
    return "\n".join(
        [
            f"{data.protocol[0].upper()}{data.protocol[1:]}.",
            *(f"  {m.ljust(width)}  {text}" for m, text in data.about.items()),
            f"{len(data.train):,} samples for training, {len(data.test):,} for the test. One small encoder for each, "
            f"joined by a linear head; {recipe.epochs} epochs, {seeds}.",
        ]
    )


def _legend(comparison: Comparison) -> str:
    spread = "" if comparison.seeds == 1 else f", mean ± standard deviation over {comparison.seeds} seeds"
    ahead = dominant(comparison)
    return "\n".join(
        [
            f"How to read it (test accuracy in percent{spread})",
            "  whole model   what the model that sees everything gets right",
            "  ... encoder   what this encoder knows by itself: a linear classifier fitted on its frozen output",
            f"  ratio         how much more probability the {ahead} encoder gave the right class during training "
            "(1: balance)",
        ]
    )


def _ratio_name(comparison: Comparison) -> str:
    return f"ratio {dominant(comparison)} : {_rest(comparison)}"


def _rest(comparison: Comparison) -> str:
    """The modalities that are not ahead."""
    rest = [m for m in comparison.data.modalities if m != dominant(comparison)]
    return rest[0] if len(rest) == 1 else "the rest"


def _gap(comparison: Comparison, first: str) -> str:
    lost = {
        m: _paired_probes(comparison.alone[m], comparison.methods[first], m)
        for m in comparison.data.modalities
    }
    worst = max(lost, key=lambda m: float(np.mean(lost[m])))
    alone = _mean(o.probes[worst] for o in comparison.alone[worst])
    inside = _mean(o.probes[worst] for o in comparison.methods[first])
    if alone - inside < _NOTABLE:
        return f"No encoder is much worse inside the {first} model than alone: here is little to balance."
    also = [
        f" The {m} encoder loses {np.mean(points):.1f} points as well."
        for m, points in lost.items()
        if m != worst and np.mean(points) >= _NOTABLE and not _chance(points)
    ]
    return (
        f"Trained alone, the {worst} encoder reaches {alone:.1f} %. Inside the {first} model the same encoder only "
        f"reaches {inside:.1f} %: {alone - inside:.1f} points that were there to learn are lost"
        f"{_chance(lost[worst]) or '. That gap is what balancing is for'}.{''.join(also)}"
    )


def _effect(comparison: Comparison, first: str, name: str) -> str:
    before, after = comparison.methods[first], comparison.methods[name]
    ahead = dominant(comparison)
    old, new = (_mean(o.mean("ratio", ahead) for o in outcomes) for outcomes in (before, after))
    changes = {f"{m} encoder": _paired_probes(after, before, m) for m in comparison.data.modalities}
    changes["whole model"] = _paired(after, before)
    points = [f"{what} {np.mean(change):+.1f}{_chance(change)}" for what, change in changes.items()]
    acts = [*_acts(after, ahead), f"moves the ratio from {old:.2f} to {new:.2f}"]
    opening = "" if math.isnan(new) else f"{name} {' and '.join(acts)}. "
    return f"{opening}{name} against {first}, in points: {', '.join(points)}."


def _acts(outcomes: Sequence[Outcome], ahead: str) -> list[str]:
    """What a method does to the modality that is ahead, as far as it was recorded."""
    k = _mean(o.mean("coefficient", ahead) for o in outcomes)
    q = _mean(o.mean("drop_probability", ahead) for o in outcomes)
    r = _mean(o.mean("keep_ratio", ahead) for o in outcomes)
    acts = [] if math.isnan(k) or k == 1 else [f"leaves {k:.0%} of the {ahead} encoder's gradient on average"]
    acts += [] if math.isnan(q) else [f"drops the {ahead} of {q:.0%} of the samples"]
    return acts + ([] if math.isnan(r) else [f"updates {r:.0%} of the {ahead} encoder's units in a step"])


def _chance(differences: np.ndarray) -> str:
    """Says so where paired differences over seeds can't be told from none (t-test, 5 %)."""
    count = len(differences)
    if count == 1:
        return ""
    error = np.std(differences, ddof=1) / math.sqrt(count)
    clear = abs(np.mean(differences)) > need("scipy.stats").t.ppf(0.975, count - 1) * error
    return "" if clear else " (within chance)"


def _paired(one: Sequence[Outcome], other: Sequence[Outcome]) -> np.ndarray:
    return np.array([a.accuracy - b.accuracy for a, b in zip(one, other, strict=True)])


def _paired_probes(one: Sequence[Outcome], other: Sequence[Outcome], modality: str) -> np.ndarray:
    return np.array([a.probes[modality] - b.probes[modality] for a, b in zip(one, other, strict=True)])


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
