"""How costs grow: with parameters, modalities, batch and classes, and with the samples of a diagnosis."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.shapes import many_small, of_size
from benchmarks.speed_diagnosis import features, ours
from benchmarks.speed_monitor import cost
from benchmarks.speed_options import Options
from benchmarks.speed_report import Growth
from benchmarks.speed_step import BASES, METHODS, Setting
from benchmarks.timing import Contender, Timing, measure

STEPS = ("OGM", "OGM-GE", "AMSS")


def steps(setting: Setting, options: Options) -> dict[str, Timing]:
    """The base's step and ours."""
    base = BASES[options.base]
    rows = {options.base: setting.plain(base)}
    rows |= {name: setting.ours(METHODS[name], base) for name in STEPS}
    return measure(rows, options.repetitions, options.device)


def with_parameters(options: Options) -> Growth:
    """Matrices of half a million elements."""
    sizes = (1,) if options.quick else (4, 16, 64)
    found = {f"{size} million": steps(Setting(of_size(size), options), options) for size in sizes}
    return Growth("step, by parameters", "parameters", found, options.base)


def with_modalities(options: Options) -> Growth:
    """Encoders of many small tensors."""
    shapes = many_small()[:9] if options.quick else many_small()[:99]
    counts = (2, 3) if options.quick else (2, 3, 4, 6, 8)
    found = {str(count): steps(Setting(shapes, options, count), options) for count in counts}
    return Growth("step, by modalities (99 small tensors each)", "modalities", found, options.base)


def scores(options: Options) -> list[Growth]:
    """What the monitor adds to a forward and backward."""
    batches = (8,) if options.quick else (16, 64, 256, 1024)
    classes = (6,) if options.quick else (6, 31, 309, 1000)
    counts = (2,) if options.quick else (2, 4, 8)
    return [
        Growth(
            "monitor, by batch (6 classes)", "batch", {str(n): {"added": cost(options, n)} for n in batches}
        ),
        Growth(
            "monitor, by classes (batch 64)",
            "classes",
            {str(c): {"added": cost(options, 64, classes=c)} for c in classes},
        ),
        Growth(
            "monitor, by modalities (batch 64)",
            "modalities",
            {str(m): {"added": cost(options, 64, modalities=m)} for m in counts},
        ),
    ]


def with_samples(options: Options) -> Growth:
    """The diagnosis of one modality, 31 classes."""
    counts = (300,) if options.quick else (5_000, 10_000, 20_000, 40_000)
    found = {}
    for count in counts:
        x, labels = features(count, 31, options.device)

        def run(x: object = x, labels: object = labels) -> None:
            ours(x, labels, 31)  # type: ignore[arg-type]

        found[str(count)] = measure({"diagnosis": Contender(run)}, 3, options.device, warm_up=1)
    return Growth("diagnosis, by samples (31 classes)", "samples", found)


def run(options: Options) -> list[Growth]:
    """All of them."""
    fewer = replace(options, repetitions=max(3, options.repetitions // 2))
    return [with_parameters(fewer), with_modalities(fewer), *scores(fewer), with_samples(fewer)]
