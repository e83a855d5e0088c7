"""Re-learning: the diagnosis against scikit-learn, and soft re-initialisation against a loop."""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt.functional import kmeans, minmax_scale, purity, soft_reinit_
from benchmarks import naive
from benchmarks.extras import need
from benchmarks.shapes import CASES, Model
from benchmarks.speed_options import Options
from benchmarks.speed_report import Section
from benchmarks.timing import Contender, measure

WIDTH = 512
# Samples, classes, rounds: the last takes half a minute each.
SIZES = ((6_700, 6, 5), (19_000, 31, 3), (50_000, 309, 1))


def features(samples: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a ReLU leaves of noisy classes, and labels."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, WIDTH, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    noise = 2.5 * torch.randn(samples, WIDTH, generator=generator)
    return (centres[labels] + noise).relu().to(device), labels.to(device)


def ours(x: Tensor, labels: Tensor, classes: int, seed: int = 0) -> float:
    """Scale, cluster, count."""
    generator = torch.Generator(x.device).manual_seed(seed)
    found = kmeans(minmax_scale(x), classes, generator=generator)
    return float(purity(found.assignments, labels))


def diagnosis(samples: int, classes: int, rounds: int, options: Options) -> Section:
    """Both ways on the same features, and the purities that they find."""
    x, labels = features(samples, classes, options.device)
    array, label_array = x.cpu().numpy(), labels.cpu().numpy()
    found: dict[str, list[float]] = {"scikit-learn": [], "this": []}

    def published() -> None:
        found["scikit-learn"].append(naive.diagnosis(array, label_array, classes, seed=0))

    need("sklearn")
    rows = {
        "scikit-learn": Contender(published),
        "this": Contender(lambda: found["this"].append(ours(x, labels, classes))),
    }
    timings = measure(rows, rounds, options.device, warm_up=0)
    notes = {name: f"purity {values[-1]:.3f}" for name, values in found.items()}
    title = f"diagnosis, {samples} samples of {WIDTH}, {classes} classes"
    return Section(title, timings, "scikit-learn", {"this": "scikit-learn"}, notes)


def reinit(case: str, options: Options) -> Section:
    """Eq. 6 over all parameters of two encoders."""
    torch.manual_seed(0)
    model = Model(CASES[case]()).to(options.device)
    parameters = {name: list(encoder.carried) for name, encoder in model.modalities.items()}
    initial = {name: [p.detach().clone() for p in own] for name, own in parameters.items()}
    every = [p for own in parameters.values() for p in own]
    first = [p for own in initial.values() for p in own]
    rows = {
        "published": Contender(lambda: naive.soft_reinit(parameters, initial, 0.3)),
        "this": Contender(lambda: _discard(soft_reinit_(every, first, 0.3))),
    }
    timings = measure(rows, options.repetitions, options.device)
    return Section(f"soft re-initialisation, {case}", timings, "published", {"this": "published"})


def run(options: Options) -> list[Section]:
    """Diagnosis at three sizes, re-initialisation in every case."""
    sizes = ((300, 6, 1),) if options.quick else SIZES
    return [
        *(diagnosis(samples, classes, rounds, options) for samples, classes, rounds in sizes),
        *(reinit(case, options) for case in options.cases),
    ]


def _discard(result: object) -> None:
    """What a contender returns is not looked at."""
