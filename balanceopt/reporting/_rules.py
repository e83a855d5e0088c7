"""What a report can find: each rule as data, with its condition, its words and its source.

A new rule is one entry of `RULES`, one function that says of which modalities it is true, and one test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from balanceopt.reporting._run import LEAD, Run

Level = Literal["act", "unclear", "note", "fine"]
# What a rule fills into its sentences, once for each modality of which it is true.
Facts = dict[str, str]

# Fewer recorded steps than this say nothing: scores of single batches differ by more than modalities do.
ENOUGH_STEPS = 20
# Shares of 1, as the probes are. Measured on the runs of docs/report.md:
WEAK = 0.10  # the probe is so far below the best encoder's
CARRY = 0.12  # the probe on training samples is so far above that on validation samples
CLOSE = 0.05  # the probe is no further below the best encoder's
FITTED = 0.97  # the probe on training samples of an encoder that has fitted them
GONE = 0.25  # the gradient's norm, as a share of its peak, when the joint loss has no more to teach
TOUCHED = 0.05  # a method that changes less than this on average hardly acts
# A participation ratio below this: all but some 0.05 % of the features' variance lies in one direction. With two
# classes a healthy encoder may come down to 1.05.
COLLAPSED = 1.001
STARVED = 0.03  # the encoder trained alone reaches so much more


@dataclass(frozen=True)
class Source:
    """Where a rule or its advice comes from: a title, where to read it, and what it says."""

    title: str
    where: str
    says: str


SOURCES: dict[str, Source] = {
    "evidence": Source(
        "Evidence: what was found",
        "docs/evidence.md#what-was-found",
        "Eleven settings of real data, eight or ten seeds each, tuned joint training as the baseline. With one setting "
        "for all, uni-modal losses with re-learning and a vote of all heads (bo.balance) gain 1.5 points on average, "
        "more than any tuned method; they are clearly better on seven settings and clearly worse on one (-1.1), and "
        "close 55 to 150 % of the starved encoder's gap. OGM-GE, AGM, InfoReg and AMSS+ change accuracy by -0.9 to "
        "+0.1 on average. OPM costs 1.2 to 2.5 where the modalities are unequal. These are small encoders on small "
        "data.",
    ),
    "report": Source(
        "The report: was it right?",
        "docs/report.md#was-it-right",
        "Findings of runs on eight sets of real data, with two seeds, checked by training each encoder alone; how the "
        "limits of the rules were chosen.",
    ),
    "peng2022": Source(
        "Balanced Multimodal Learning via On-the-fly Gradient Modulation (CVPR 2022)",
        "https://arxiv.org/abs/2203.15332",
        "The modality with the better performance lowers the joint loss, and the others' encoders get "
        "little gradient.",
    ),
    "wei2024": Source(
        "Diagnosing and Re-learning for Balanced Multimodal Learning (ECCV 2024)",
        "https://arxiv.org/abs/2407.09705",
        "A modality may be behind because it has little to say; training it harder then only memorises "
        "noise.",
    ),
    "alain2016": Source(
        "Understanding intermediate layers using linear classifier probes (2016)",
        "https://arxiv.org/abs/1610.01644",
        "A linear classifier on features that it does not change tells what they hold.",
    ),
    "gao2017": Source(
        "A theory of multineuronal dimensionality, dynamics and measurement (2017)",
        "https://www.biorxiv.org/content/10.1101/214262",
        "The participation ratio of the covariance's eigenvalues: over how many directions variance spreads.",
    ),
}


@dataclass(frozen=True)
class Rule:
    """One thing that a report can find.

    Args:
        name: for programs, such as `"starved"`.
        level: `"act"`, `"unclear"`, `"note"` or `"fine"`.
        applies: the facts for the sentences, one entry for each modality of which the rule is true.
        says: the finding, in a sentence.
        why: the reason.
        number: the measurement behind it.
        advice: what to try.
        sources: keys of `SOURCES`.
        alone: no further rule is applied where this one is true.
    """

    name: str
    level: Level
    applies: Callable[[Run], list[Facts]]
    says: str
    why: str
    number: str
    advice: str
    sources: tuple[str, ...]
    alone: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing found in a run: what, why, the number behind it and what to try.

    Args:
        rule: name of the rule.
        level: `"act"` (do something), `"unclear"` (measure more), `"fine"` or `"note"`.
        modality: which encoder it is about; None for the whole run.
        says: the finding, in a sentence.
        why: the reason.
        number: the measurement behind it.
        advice: what to try.
        sources: where that comes from.
    """

    rule: str
    level: Level
    modality: str | None
    says: str
    why: str
    number: str
    advice: str
    sources: tuple[Source, ...]


def find(run: Run) -> list[Finding]:
    """Apply the rules to a run; the most urgent findings first."""
    result: list[Finding] = []
    for rule in RULES:
        facts = rule.applies(run)
        result += [
            Finding(
                rule.name,
                rule.level,
                fact.get("m"),
                rule.says.format_map(fact),
                rule.why.format_map(fact),
                rule.number.format_map(fact),
                rule.advice.format_map(fact),
                tuple(SOURCES[key] for key in rule.sources),
            )
            for fact in facts
        ]
        if facts and rule.alone:
            break
    order: tuple[Level, ...] = ("act", "unclear", "fine", "note")
    return sorted(result, key=lambda finding: order.index(finding.level))


def percent(value: float) -> str:
    """Format a share as whole percent."""
    return f"{100 * value:.0f} %"


def states(run: Run) -> dict[str, str]:
    """What the probes say of each encoder that has one.

    Returns:
        `"starved"`, `"starved, says little"`, `"says little"`, `"unheard"`, `"weak"` (the measurements do not tell why)
        or `"fine"`.
    """
    probes = run.probes()
    if len(probes) < 2:
        return {}
    return {name: _state(run, name, max(probes.values())) for name in probes}


def _state(run: Run, name: str, best: float) -> str:
    probe, train = run.now("probe", name), run.now("probe_train", name)
    weak = best - probe >= WEAK
    if name in run.alone:
        starved = run.alone[name] - probe >= STARVED
        little = max(run.alone.values()) - run.alone[name] >= WEAK
    else:
        gradient = run.get("gradient_norm", name)
        if not (math.isfinite(train) and math.isfinite(gradient.now)):
            return "weak" if weak else _heard(run, name, probe, best)
        stopped = gradient.now <= GONE * max(run.get("gradient_norm", name).smooth(50).finite.values)
        # A weak encoder that knows no more of its training samples than of others may be able to do no more.
        starved = train < FITTED and stopped and (train > probe or not weak)
        little = weak and (starved or train - probe >= CARRY)
    if starved:
        return "starved, says little" if little else "starved"
    if little:
        return "says little"
    return "weak" if weak else _heard(run, name, probe, best)


def _heard(run: Run, name: str, probe: float, best: float) -> str:
    ratio = run.ratios().get(name)
    unheard = ratio is not None and ratio.now <= 1 / LEAD and best - probe <= CLOSE
    return "unheard" if unheard else "fine"


def _in(state: str, *, measured: bool = False) -> Callable[[Run], list[Facts]]:
    """The modalities in a state; `measured` for those whose encoder was trained alone, too."""

    def applies(run: Run) -> list[Facts]:
        names = [n for n, s in states(run).items() if s == state and (n in run.alone) == measured]
        return [_facts(run, name) for name in names]

    return applies


def _facts(run: Run, name: str) -> Facts:
    probes = run.probes()
    best = max(probes, key=lambda other: probes[other])
    gradient = run.get("gradient_norm", name)
    peak = max(gradient.smooth(50).finite.values, default=math.nan)
    ratio = run.ratios().get(name)
    return {
        "m": name,
        "best": best,
        "probe": percent(probes[name]),
        "best_probe": percent(probes[best]),
        "train": _or_dash(run.now("probe_train", name)),
        "alone": _or_dash(run.alone.get(name, math.nan)),
        "lost": f"{100 * (run.alone.get(name, math.nan) - probes[name]):.1f}",
        "gradient": _or_dash(gradient.now / peak if peak else math.nan),
        "ratio": "not recorded" if ratio is None else _ratio(ratio.now),
    }


def _ratio(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= value < 1000 else f"{value:.1g}"


def _or_dash(value: float) -> str:
    return percent(value) if math.isfinite(value) else "-"


def _empty(run: Run) -> list[Facts]:
    return [] if run.steps else [{}]


def _too_early(run: Run) -> list[Facts]:
    return [{"n": str(run.steps), "enough": str(ENOUGH_STEPS)}] if run.steps < ENOUGH_STEPS else []


def _one_modality(run: Run) -> list[Facts]:
    return [{"only": run.modalities[0]}] if len(run.modalities) == 1 else []


def _not_finite(run: Run) -> list[Facts]:
    result = []
    for name in run.modalities:
        bad = {
            quantity: (len(s.steps) - len(s.finite.steps), len(s.steps), s.steps[~_finite(s.values)])
            for quantity, by in run.series.items()
            if (s := by.get(name)) is not None and len(s.finite.steps) < len(s.steps)
        }
        if bad:
            quantity, (count, total, steps) = next(iter(bad.items()))
            result.append(
                {
                    "m": name,
                    "what": quantity,
                    "count": f"{count:,}",
                    "n": f"{total:,}",
                    "step": f"{int(steps[0]):,}",
                }
            )
    return result


def _finite(values: Any) -> Any:
    return abs(values) < math.inf


def _no_gradient(run: Run) -> list[Facts]:
    norms = {name: run.get("gradient_norm", name).finite.values for name in run.modalities}
    return [{"m": name, "n": f"{len(v):,}"} for name, v in norms.items() if len(v) and not v.any()]


def _collapsed(run: Run) -> list[Facts]:
    ranks = {name: run.now("effective_rank", name) for name in run.modalities}
    return [{"m": name, "rank": f"{rank:.1f}"} for name, rank in ranks.items() if rank < COLLAPSED]


def _no_probe(run: Run) -> list[Facts]:
    unprobed = len(run.modalities) > 1 and len(run.probes()) < 2
    return [{"lead": _lead(run) or "No encoder leads now."}] if unprobed else []


def _leads(run: Run) -> list[Facts]:
    changes = run.leaders()
    since, leader = changes[-1] if changes else (0, None)
    if leader is None:
        return []
    ratio = run.ratios()[leader]
    others = [name for name in run.modalities if name != leader]
    first, now = ratio.part(0, 1 / 3), ratio.part(2 / 3, 1)
    trend = "is growing" if now > 1.1 * first else "is closing" if now < first / 1.1 else "stays as it is"
    before = [name for _, name in changes[:-1] if name not in (None, leader)]
    earlier = f" Before that, {' and '.join(dict.fromkeys(before))} led for a time." if before else ""
    return [
        {
            "m": leader,
            "others": others[0] if len(others) == 1 else "the others on average",
            "ratio": _ratio(ratio.now),
            "since": "from the first step on" if since == ratio.steps[0] else f"since step {since:,}",
            "trend": trend,
            "first": _ratio(first),
            "now": _ratio(now),
            "earlier": earlier,
        }
    ]


def _lead(run: Run) -> str:
    facts = _leads(run)
    return "The {m} encoder has led {since}, at a ratio of {ratio} now.".format_map(facts[0]) if facts else ""


def _acts_in_vain(run: Run) -> list[Facts]:
    lead = _leads(run)
    if not lead or lead[0]["trend"] == "is closing":
        return []
    coefficient = run.get("coefficient", lead[0]["m"]).part(0, 1)
    dropped = run.get("drop_probability", lead[0]["m"]).part(0, 1)
    if coefficient < 1 - TOUCHED:
        return [{**lead[0], "act": f"{percent(coefficient)} of its gradient was kept"}]
    if dropped > TOUCHED:
        return [{**lead[0], "act": f"{percent(dropped)} of its samples were dropped"}]
    return []


def _nothing_wrong(run: Run) -> list[Facts]:
    state_of = states(run)
    if (
        len(state_of) < len(run.modalities)
        or len(state_of) < 2
        or set(state_of.values()) - {"fine", "unheard"}
    ):
        return []
    bad = _not_finite(run) + _no_gradient(run) + _collapsed(run)
    probes = ", ".join(f"{name} {percent(value)}" for name, value in run.probes().items())
    return [] if bad else [{"probes": probes}]


_PROBE = (
    "Record probes, too, and pass validation samples through the model now and then: "
    "`probes = bo.ProbeMonitor(monitor)`, `recorder = bo.Recorder(monitor, probes)`."
)
_UNIMODAL = (
    "Give every encoder a loss of its own: `objective = bo.UnimodalObjective(monitor, num_classes)`, "
    "`loss = loss + objective(y)`"
)

RULES: tuple[Rule, ...] = (
    Rule(
        "empty",
        "unclear",
        _empty,
        says="Nothing is recorded yet.",
        why="The recorder has no rows: no training step was taken after it was made.",
        number="0 steps.",
        advice="Make it before the training loop, `recorder = bo.Recorder(monitor)`, and keep it until the "
        "end.",
        sources=(),
        alone=True,
    ),
    Rule(
        "too early",
        "unclear",
        _too_early,
        says="Can't tell yet: too few steps.",
        why="Scores of single batches differ by more than modalities do, and the first steps often point "
        "the wrong way.",
        number="{n} steps recorded; at least {enough} are needed.",
        advice="Train on, best for some epochs, and ask again.",
        sources=("report",),
        alone=True,
    ),
    Rule(
        "one modality",
        "fine",
        _one_modality,
        says="There is only one modality, {only}: nothing to balance.",
        why="Balance is a relation between encoders.",
        number="1 modality recorded.",
        advice='Give the monitor every encoder: `encoders={{"audio": ..., "visual": ...}}`.',
        sources=(),
        alone=True,
    ),
    Rule(
        "not finite",
        "act",
        _not_finite,
        says="{m}: some numbers are not finite.",
        why="NaN or infinity in the scores, features or gradients: training has diverged, or the input "
        "holds such values.",
        number="`{what}` in {count} of {n} records, first at step {step}.",
        advice="Look at the inputs of that step; lower the learning rate or clip gradients. Such steps are "
        "left unmodulated.",
        sources=(),
    ),
    Rule(
        "no gradient",
        "act",
        _no_gradient,
        says="The {m} encoder gets no gradient.",
        why="It is frozen, detached, or its output does not reach the loss.",
        number="The norm of its gradient was 0 in all of {n} records.",
        advice="Check `requires_grad`, `detach()` and the fusion. If it is frozen on purpose, leave it out "
        "of the encoders.",
        sources=(),
    ),
    Rule(
        "collapsed",
        "act",
        _collapsed,
        says="The {m} encoder gives nearly the same feature for every sample.",
        why="Its features use a single direction, so a linear head can tell at most one thing by them.",
        number="Effective rank {rank} at the end; 1 is a single direction.",
        advice="Look for dead units, a too large learning rate, or constant inputs.",
        sources=("gao2017",),
    ),
    Rule(
        "starved, measured",
        "act",
        _in("starved", measured=True),
        says="The {m} encoder is starved: alone it learns more.",
        why="Trained alone it reaches more than inside the joint model, so the joint loss stopped asking "
        "it too early.",
        number="{lost} points lost: {alone} alone, {probe} in the joint model. (Its ratio, {ratio}, does "
        "not show this.)",
        advice=_UNIMODAL + ". `bo.balance` does it, with re-learning and a vote: the best on our sets.",
        sources=("evidence", "alain2016"),
    ),
    Rule(
        "starved",
        "act",
        _in("starved"),
        says="The {m} encoder is probably starved.",
        why="The joint loss ran out before this encoder had fitted its samples: others explain them, so "
        "hardly any gradient is left.",
        number="It answers {train} of the training samples by itself ({probe} in validation), and its "
        "gradient has fallen to "
        "{gradient} of its peak. (Its ratio, {ratio}, does not show this.)",
        advice=_UNIMODAL
        + ". `bo.balance` does it, with re-learning and a vote: the best on our sets. To be sure first, train "
        "this encoder alone and compare: `bo.report(recorder, alone=...)`.",
        sources=("evidence", "peng2022", "report"),
    ),
    Rule(
        "starved and scarce, measured",
        "act",
        _in("starved, says little", measured=True),
        says="The {m} encoder is starved, and its modality has less to say than others.",
        why="Alone it learns more than inside the joint model, but even alone it stays well below the best "
        "encoder.",
        number="{lost} points lost: {alone} alone, {probe} in the joint model; {best} has {best_probe}.",
        advice=_UNIMODAL
        + ". Not OGM, OPM or AMSS alone: they slow the informative encoder for one that can't replace it.",
        sources=("evidence", "wei2024"),
    ),
    Rule(
        "starved and scarce",
        "act",
        _in("starved, says little"),
        says="The {m} encoder is far behind: probably starved, perhaps with less to say as well.",
        why="The joint loss ran out before this encoder had fitted its samples. How much more they hold, only "
        "training it alone tells.",
        number="It answers {train} of the training samples, {probe} in validation ({best}: {best_probe}); its "
        "gradient has fallen to {gradient} of its peak.",
        advice=_UNIMODAL + ", which helped in both cases. Not OGM, OPM or AMSS alone, unless "
        "`bo.report(recorder, alone=...)` shows that it only starves: they slow the other encoders.",
        sources=("evidence", "wei2024", "report"),
    ),
    Rule(
        "scarce, measured",
        "note",
        _in("says little", measured=True),
        says="The {m} modality has little to say; its encoder is not starved.",
        why="Even alone it learns hardly more than inside the joint model.",
        number="{alone} alone, {probe} in the joint model; {best} has {best_probe}.",
        advice="Nothing to repair here. Slowing the other encoder (OGM, OPM, AMSS) would cost accuracy.",
        sources=("evidence", "wei2024"),
    ),
    Rule(
        "scarce",
        "note",
        _in("says little"),
        says="The {m} modality probably has little to say.",
        why="Its encoder has fitted its training samples, or is still being trained, and knows much "
        "less of new samples.",
        number="{probe} in validation, {train} on training samples; {best} has {best_probe}.",
        advice="Do not slow the other encoder (OGM, OPM, AMSS). Uni-modal losses do no harm. To be sure, "
        "train it alone.",
        sources=("evidence", "wei2024", "report"),
    ),
    Rule(
        "weak",
        "unclear",
        _in("weak"),
        says="The {m} encoder knows much less than {best}; why, these numbers do not tell.",
        why="It may be starved, or its modality may have little to say. Only what it can learn by itself "
        "tells.",
        number="Probe {probe}; {best} has {best_probe}.",
        advice='Train this encoder alone and give what it reaches: `bo.report(recorder, alone={{"name": '
        "accuracy}})`.",
        sources=("wei2024", "report"),
    ),
    Rule(
        "unheard",
        "note",
        _in("unheard"),
        says="The {m} encoder knows enough, but the joint answer makes little use of it.",
        why="The probe finds the classes in its features; its part of the joint answer is small all the "
        "same.",
        number="Probe {probe}, the best encoder has {best_probe}; ratio {ratio}.",
        advice="Its encoder needs no help. If the other modality may be missing later, use "
        '`bo.UnimodalObjective(..., heads="shared")`.',
        sources=("evidence", "alain2016"),
    ),
    Rule(
        "no probe",
        "unclear",
        _no_probe,
        says="Nobody can tell from these numbers whether an encoder is starved.",
        why="{lead} But a ratio compares answers, not knowledge: a starved encoder can lead, and an "
        "encoder behind may simply "
        "have little to say.",
        number="No probe was recorded.",
        advice=_PROBE,
        sources=("report", "alain2016"),
    ),
    Rule(
        "nothing wrong",
        "fine",
        _nothing_wrong,
        says="Nothing is wrong: no encoder looks starved.",
        why="Every encoder has fitted its samples or still gets gradient, and none knows much less than "
        "the best.",
        number="Probes: {probes}.",
        advice="Leave the training as it is. Where the joint model lacks nothing, balancing did not raise "
        "accuracy on our sets.",
        sources=("evidence",),
    ),
    Rule(
        "leads",
        "note",
        _leads,
        says="The {m} encoder has led {since}.",
        why="It gives the right answer more probability than {others}.{earlier} A lead alone is no fault.",
        number="Ratio {first} in the first third of the run, {now} in the last: the lead {trend}.",
        advice="Decide by what each encoder knows, not by the ratio.",
        sources=("peng2022", "report"),
    ),
    Rule(
        "in vain",
        "note",
        _acts_in_vain,
        says="A method holds the {m} encoder back, but its lead {trend}.",
        why="What the others lack is not always what the leader takes.",
        number="On average {act}; ratio {first} in the first third, {now} in the last.",
        advice="Uni-modal losses closed the gap where OGM, OGM-GE and AMSS did not.",
        sources=("evidence",),
    ),
)
