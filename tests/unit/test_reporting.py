"""The report of a recorded run: each rule, the text, the page in a browser."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import balanceopt as bo
from balanceopt.recording import Row
from balanceopt.reporting import RULES, SOURCES, Finding

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("audio", "image")
STEPS = 200

Value = float | Callable[[float], float]


def recorder_of(rows: Iterable[Row]) -> bo.Recorder:
    recorder = bo.Recorder()
    recorder._rows += rows
    return recorder


def rows(quantity: str, *values: Value, steps: int = STEPS, names: tuple[str, ...] = NAMES) -> list[Row]:
    """A value for each modality, constant or a function of the share of the run that has passed."""
    return [
        Row(step, quantity, name, value(step / max(steps - 1, 1)) if callable(value) else value)
        for step in range(steps)
        for name, value in zip(names, values, strict=True)
    ]


def falling(t: float) -> float:
    return math.exp(-5 * t)


def rising_to(value: float) -> Callable[[float], float]:
    return lambda t: value - 0.3 * math.exp(-8 * t)


def run_with(
    probe: tuple[float, float], train: tuple[float, float], ratio: tuple[float, float] = (1.0, 1.0)
) -> list[Row]:
    """A run whose probes end at these values and whose gradients vanish."""
    return [
        *rows("ratio", *ratio),
        *rows("gradient_norm", falling, falling),
        *rows("probe", *map(rising_to, probe), steps=20),
        *rows("probe_train", *map(rising_to, train), steps=20),
    ]


def found(*parts: list[Row], **options: Any) -> dict[tuple[str, str | None], Finding]:
    report = bo.report(recorder_of(row for part in parts for row in part), **options)
    result = {(finding.rule, finding.modality): finding for finding in report.findings}
    assert len(result) == len(report.findings)
    return result


def test_nothing_recorded():
    assert list(found()) == [("empty", None)]


def test_too_few_steps_are_said_and_nothing_else():
    few = found(rows("ratio", 0.2, 5.0, steps=19), rows("score", 0.1, math.nan, steps=19))
    assert list(few) == [("too early", None)]
    assert "19 steps" in few["too early", None].number
    assert ("too early", None) not in found(rows("ratio", 0.2, 5.0, steps=20))


def test_one_modality():
    assert list(found(rows("score", 0.5, names=("audio",)))) == [("one modality", None)]


def test_numbers_that_are_not_finite():
    scores = rows("score", 0.5, lambda t: math.nan if t > 0.5 else 0.5)
    finding = found(scores)["not finite", "image"]
    assert finding.number == "`score` in 100 of 200 records, first at step 100."
    assert ("not finite", "audio") not in found(scores)


def test_an_encoder_without_a_gradient():
    result = found(rows("gradient_norm", 0.0, falling))
    assert ("no gradient", "audio") in result
    assert ("no gradient", "image") not in result


def test_features_that_collapsed():
    result = found(rows("effective_rank", 9.0, lambda t: 9.0 if t < 0.5 else 1.0))
    assert ("collapsed", "image") in result
    assert ("collapsed", "audio") not in result


def test_an_encoder_that_stopped_before_it_had_fitted_its_samples_is_starved():
    result = found(run_with(probe=(0.92, 0.88), train=(0.995, 0.95), ratio=(0.7, 1.5)))
    assert ("starved", "image") in result, "the leader by its ratio"
    assert not {rule for rule, name in result if name == "audio"} & {"starved", "scarce", "weak"}
    assert "95 %" in result["starved", "image"].number


@pytest.mark.parametrize(
    ("probe_train", "gradient"),
    [(0.99, falling), (0.95, lambda t: 1.0)],
    ids=["it has fitted its samples", "it still gets gradient"],
)
def test_an_encoder_that_is_not_starved(probe_train: float, gradient: Callable[[float], float]):
    parts = run_with(probe=(0.92, 0.88), train=(0.995, probe_train))
    parts = [row for row in parts if row.quantity != "gradient_norm"]
    assert ("starved", "image") not in found(parts, rows("gradient_norm", gradient, gradient))


def test_a_modality_with_little_to_say():
    assert ("scarce", "audio") in found(run_with(probe=(0.60, 0.95), train=(0.99, 0.99)))


def test_a_modality_with_little_to_say_that_is_starved_too():
    result = found(run_with(probe=(0.60, 0.91), train=(0.76, 0.995)))
    assert ("starved and scarce", "audio") in result
    assert "Not OGM" in result["starved and scarce", "audio"].advice


def test_a_weak_encoder_that_knows_as_little_of_its_training_samples_is_unclear():
    result = found(run_with(probe=(0.74, 0.95), train=(0.73, 0.99)))
    assert ("weak", "audio") in result
    assert not {"starved", "scarce"} & {rule for rule, _ in result}


def test_a_weak_encoder_without_a_probe_on_training_samples():
    result = found(rows("ratio", 0.5, 2.0), rows("probe", 0.60, 0.91, steps=20))
    assert ("weak", "audio") in result
    assert result["weak", "audio"].level == "unclear"


@pytest.mark.parametrize(
    ("alone", "rule"),
    [
        ({"audio": 0.93, "image": 0.92}, "starved, measured"),
        ({"audio": 0.70, "image": 0.92}, "starved and scarce, measured"),
        ({"audio": 0.61, "image": 0.92}, "scarce, measured"),
    ],
)
def test_what_an_encoder_reaches_alone_decides(alone: dict[str, float], rule: str):
    result = found(run_with(probe=(0.60, 0.91), train=(0.76, 0.995)), alone=alone)
    assert (rule, "audio") in result
    assert not [key for key in result if key[1] == "audio" and key[0] != rule and key[0] != "leads"]


def test_points_lost_are_told():
    result = found(run_with((0.60, 0.91), (0.76, 0.99)), alone={"audio": 0.675})
    assert "7.5 points lost" in result["starved, measured", "audio"].number


def test_an_encoder_that_knows_but_is_not_asked():
    result = found(run_with(probe=(0.90, 0.92), train=(0.99, 0.99), ratio=(0.5, 2.0)))
    assert ("unheard", "audio") in result
    assert ("nothing wrong", None) in result


def test_without_a_probe_starvation_is_not_claimed():
    result = found(rows("ratio", 0.2, 5.0))
    assert result["no probe", None].level == "unclear"
    assert "The image encoder has led from the first step on" in result["no probe", None].why
    assert "ProbeMonitor" in result["no probe", None].advice
    assert not {rule for rule, _ in result} & {"starved", "scarce", "weak", "nothing wrong"}


def test_nothing_is_wrong():
    result = found(run_with(probe=(0.91, 0.92), train=(0.99, 0.99)))
    assert list(result) == [("nothing wrong", None)]
    broken = found(run_with(probe=(0.91, 0.92), train=(0.99, 0.99)), rows("effective_rank", 1.0, 9.0))
    assert ("nothing wrong", None) not in broken


def test_who_leads_since_when_and_who_led_before():
    finding = found(rows("ratio", lambda t: 2.0 if t < 0.25 else 0.4, lambda t: 0.5 if t < 0.25 else 2.5))
    lead = finding["leads", "image"]
    assert "has led since step 50" in lead.says
    assert "audio led for a time" in lead.why
    assert "growing" in lead.number


@pytest.mark.parametrize(
    ("course", "word"),
    [(lambda t: 3 - t, "closing"), (lambda t: 2.0, "stays"), (lambda t: 2 + t, "growing")],
)
def test_whether_the_gap_closes(course: Callable[[float], float], word: str):
    finding = found(rows("ratio", lambda t: 1 / course(t), course))["leads", "image"]
    assert word in finding.number


def test_ratios_are_made_of_scores_where_none_is_recorded():
    assert ("leads", "image") in found(rows("score", 0.2, 0.5))
    assert not [rule for rule, _ in found(rows("score", 0.5, 0.5)) if rule == "leads"]


@pytest.mark.parametrize("method", [("coefficient", 0.6, 1.0), ("drop_probability", 0.3, 0.0)])
def test_a_method_in_vain(method: tuple[str, float, float]):
    quantity, leader, other = method
    acts = rows(quantity, other, leader)
    assert ("in vain", "image") in found(rows("ratio", 0.5, 2.0), acts)
    assert ("in vain", "image") not in found(rows("ratio", 0.5, 2.0))
    assert ("in vain", "image") not in found(rows("ratio", lambda t: 1, lambda t: 3 - t), acts)


def test_every_rule_has_a_test():
    here = Path(__file__).read_text(encoding="utf-8")
    assert [rule.name for rule in RULES if here.count(f'"{rule.name}"') < 1] == []


def test_every_rule_has_a_source_or_needs_none():
    sourceless = {rule.name for rule in RULES if not rule.sources}
    assert sourceless == {"empty", "one modality", "not finite", "no gradient"}
    used = {key for rule in RULES for key in rule.sources}
    assert used == set(SOURCES)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_sources_that_are_pages_exist(source: Any):
    if source.where.startswith("https://"):
        return
    page, _, anchor = source.where.partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
    assert anchor in anchors


def test_what_is_quoted_of_the_evidence_stands_there():
    page = " ".join((ROOT / "docs/evidence.md").read_text(encoding="utf-8").split())
    says = SOURCES["evidence"].says
    for quoted in ("Eleven settings", "eight or ten seeds", "seven", "-1.1"):
        assert quoted in says
        assert quoted in page


def test_a_huge_ratio_is_told_in_short():
    assert "in the last: the lead" in found(rows("ratio", 1e-7, 1e7))["leads", "image"].number
    assert "1e+07" in found(rows("ratio", 1e-7, 1e7))["leads", "image"].number


def test_bad_arguments():
    with pytest.raises(TypeError, match="`recorder` should be a Recorder"):
        bo.report([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`alone` should be a mapping"):
        bo.report(bo.Recorder(), alone=[0.5])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alone\['audio'\]"):
        bo.report(bo.Recorder(), alone={"audio": 93.0})
    with pytest.raises(ValueError, match="`alone` should name modalities, \\['audio', 'image'\\]"):
        bo.report(recorder_of(rows("score", 0.5, 0.5)), alone={"sound": 0.5})


# Names that a page or a template could trip over.
NASTY = ("<b>&\"'", "{m} {0} $x_1$ `code`", "a" * 300, "\x00\ud800\u202e", "音")


def everything(names: tuple[str, ...] = NAMES, steps: int = 3000) -> bo.Recorder:
    """A run in which every quantity is recorded, some values missing."""
    generator = np.random.default_rng(0)
    recorded: list[Row] = []
    for step in range(steps):
        for quantity in ("score", "ratio", "gradient_norm", "coefficient", "drop_probability", "strange one"):
            for i, name in enumerate(names):
                value = float(generator.uniform(0.5, 1)) * (1 + i)
                missing = step % 97 == 0 and quantity == "score"
                recorded.append(Row(step, quantity, name, math.nan if missing else value))
        if step % 500 == 499:
            for quantity in ("strength", "probe", "probe_train"):
                recorded += [Row(step // 500, quantity, name, 0.5) for name in names]
    return recorder_of(recorded)


@pytest.mark.parametrize("names", [("a",), NAMES, NASTY, tuple(map(str, range(25)))], ids=len)
def test_any_names_and_numbers_make_a_page(names: tuple[str, ...], tmp_path: Path):
    report = bo.report(everything(names, 300))
    assert str(report)
    report.to_html(tmp_path / "report.html", title=f"<i>{names[0]}")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.tags.isdisjoint({"b", "i", "script"})
    assert "nan" not in re.sub(r"[^\w ]", " ", text).split()
    assert "inf" not in re.sub(r"[^\w ]", " ", text).split()
    for picture in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(picture)


class Checker(HTMLParser):
    """Tags that stay open, and all tags."""

    VOID = frozenset({"meta", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(recorder: bo.Recorder, folder: Path) -> str:
    bo.report(recorder).to_html(folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_says_what_its_pictures_show(tmp_path: Path):
    text = page_of(everything(), tmp_path)
    assert '<html lang="en">' in text
    assert "<title>Training report</title>" in text
    assert not re.findall(r'(?:src|srcset|action|data)="|@import|url\(|<script|<iframe', text)
    pictures = re.findall(r"<svg [^>]*>", text)
    assert len(pictures) > 5
    assert all('role="img"' in picture and re.search(r'aria-label="\w', picture) for picture in pictures)
    linked = set(re.findall(r'href="#([^"]+)"', text))
    assert linked
    assert linked <= set(re.findall(r'id="([^"]+)"', text))


def test_long_runs_stay_small(tmp_path: Path):
    short, long = (len(page_of(everything(steps=n), tmp_path)) for n in (1000, 5000))
    assert long < 1.2 * short


def test_labels_do_not_overlap(tmp_path: Path):
    names = tuple(f"m{i}" for i in range(20))
    text = page_of(recorder_of(rows("score", *[0.5] * 20, names=names)), tmp_path)
    (picture,) = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    heights = sorted(float(y) for y in re.findall(r'class="name[^>]* y="([\d.]+)"', picture))
    assert len(heights) == 20
    assert min(b - a for a, b in pairwise(heights)) > 12
    height = float(re.findall(r'viewBox="0 0 \d+ (\d+)"', picture)[0])
    assert heights[0] > 0
    assert heights[-1] < height


def contrast(one: str, other: str) -> float:
    """Contrast of two colours `#rrggbb` as WCAG defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read_in_both_schemes(tmp_path: Path):
    text = page_of(everything(), tmp_path)
    schemes = [
        dict(re.findall(r"--([\w]+): (#\w{6})", part))
        for part in re.findall(r":root \{.*?\}", text, re.DOTALL)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        for name in {*scheme} - {"back", "card", "rule"}:
            assert contrast(scheme[name], scheme["back"]) >= 4.5, name
            assert contrast(scheme[name], scheme["card"]) >= 4.5, name


def test_methods_are_on_the_steps_axis():
    recorded = [
        *rows("score", 0.5, 0.5),
        *[Row(3, "strength", name, 0.4) for name in NAMES],
        *rows("k", 1.0, 1.0),
    ]
    assert "audio: moved back towards its first weights after step 199 (40 %)." in str(
        bo.report(recorder_of(recorded))
    )


def test_a_real_run_can_be_reported(tmp_path: Path):
    from tests.training import batches, modulated, train

    model, optimizer = modulated()
    recorder = bo.Recorder(optimizer)
    train(model, optimizer, batches(model, 30))
    report = bo.report(recorder)
    assert report.findings
    report.to_html(tmp_path / "report.html")
    assert "audio" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    return path


@pytest.mark.parametrize("width", [375, 1100])
@pytest.mark.parametrize("names", [NAMES, NASTY], ids=["plain", "nasty"])
def test_in_a_browser(browser: str, width: int, names: tuple[str, ...], tmp_path: Path):
    """No error on the console, nothing wider than the window, every picture with a size."""
    text = page_of(everything(names), tmp_path)
    probe = """<script>
      const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide") && !e.closest("svg")
        && e.getBoundingClientRect().right > window.innerWidth + 1).length;
      const flat = [...document.querySelectorAll("svg")].filter(e => !e.closest("details:not([open])")
        && e.getBoundingClientRect().height < 100).length;
      document.title = `checked wide=${wide} flat=${flat}`;
    </script></body>"""
    page = tmp_path / "checked.html"
    page.write_text(text.replace("</body>", probe), encoding="utf-8")
    ran = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1000",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False, encoding="utf-8", errors="replace",
    )  # fmt: skip
    assert "<title>checked wide=0 flat=0</title>" in ran.stdout, ran.stderr[-2000:]
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
