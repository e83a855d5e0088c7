"""The user's default dtype and device are the user's: no tensor of the package follows them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import balanceopt as bo
from tests.models import CLASSES, Concat, Gated, Multimodal, SumHeads, watch
from tests.relearning import samples
from tests.training import backward, batches, groups_of, sgd

PACKAGE = Path(bo.__file__).parent

FACTORIES = {
    *("arange", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn"),
    *("randperm", "scalar_tensor", "tensor", "zeros"),
}
# The dtype of a permutation or of random integers is int64 whatever the default.
WHOLE = {"randint", "randperm"}


def factory_calls() -> Iterator[tuple[str, str, set[str | None]]]:
    """Every `torch.<factory>(...)` of the package: where, which, and the names of its keywords."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                and node.func.attr in FACTORIES | {"as_tensor"}
            ):
                where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                yield where, node.func.attr, {keyword.arg for keyword in node.keywords}


def test_every_factory_call_names_dtype_and_device():
    calls = list(factory_calls())
    assert len(calls) > 20
    wanted = {name: {"dtype", "device"} for name in FACTORIES} | {name: {"device"} for name in WHOLE}
    wanted["as_tensor"] = {"device"}  # the dtype is that of the numbers
    incomplete = [
        (where, name, missing)
        for where, name, given in calls
        if (missing := sorted(map(str, wanted[name] - given)))
    ]
    assert incomplete == []


# -- runs under other defaults ---------------------------------------------------------------------------------------

Run = Callable[[], list[Tensor]]


class Watch(TorchFunctionMode):
    """Note factory calls by torch's Python functions that leave dtype or device to the defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.bare: list[str] = []
        self.factories = {getattr(torch, name): name for name in FACTORIES}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        name = self.factories.get(func)
        if name is not None and PACKAGE in Path(sys._getframe(1).f_code.co_filename).parents:
            wanted = ("device",) if name in WHOLE else ("device", "dtype")
            if any(given.get(key) is None for key in wanted):
                self.bare.append(name)
        return func(*args, **given)


def model_of(kind: type[Multimodal], dtype: torch.dtype) -> Multimodal:
    torch.manual_seed(0)
    model = kind()
    return model.to(dtype)


def numbers_of(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def trained_with(method: str, kind: type[Multimodal], dtype: torch.dtype) -> Run:
    """Build a model and batches now, under the usual defaults; train with the method when called."""
    model = model_of(kind, dtype)
    given = [([x.to(dtype) for x in inputs], labels) for inputs, labels in batches(small_batches(model), 5)]
    *columns, classes = samples(40).tensors
    loader = [(*(x.to(dtype) for x in columns), classes)]

    def run() -> list[Tensor]:
        monitor = watch(model)
        optimizer: torch.optim.Optimizer = sgd(groups_of(model), momentum=0.9)
        objective: bo.UnimodalObjective | None = None
        competition: bo.CompetitionObjective | None = None
        opm: bo.OPM | None = None
        scheduler: bo.ReLearnScheduler | None = None
        if method == "OPM":
            opm = bo.OPM(monitor, seed=3, rescale="official")
        elif method == "re-learning":
            scheduler = bo.ReLearnScheduler(optimizer, monitor, loader, loader, every=2, seed=3, epochs=99)
        elif method == "competition":
            competition = bo.CompetitionObjective(monitor, seed=3)
        elif method.startswith("uni-modal"):
            inject = method.endswith("injected")
            objective = bo.UnimodalObjective(monitor, CLASSES, seed=3, inject=inject)
            optimizer.add_param_group({"params": list(objective.parameters())})
        else:
            optimizer = bo.ModulatedOptimizer(optimizer, monitor, METHODS[method](), seed=3)
        for inputs, labels in given:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(*inputs), labels)
            if objective is not None and not objective.inject:
                loss = loss + objective(labels)
            if competition is not None:
                loss = loss + competition()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        heads = [] if objective is None else numbers_of(objective)
        return [*numbers_of(model), *heads, *([] if opm is None else [opm.q])]

    return run


def small_batches(model: Multimodal) -> Any:
    """What `batches` asks of a model: its modalities and the number of classes."""
    return Concat(len(model.modalities))


METHODS: dict[str, Callable[[], bo.Modulation]] = {
    "OGM": lambda: bo.OGM(0.3, noise=False),
    "OGM-GE": lambda: bo.OGM(0.3, noise_scale=0.3),
    "OGM by update": lambda: bo.OGM(0.3, noise=False, apply_to="update"),
    "AMSS": lambda: bo.AMSS(),
    "AMSS+": lambda: bo.AMSS(scale="unbiased"),
    "AMSS official": lambda: bo.AMSS(scale="official"),
}
OTHERS = ["OPM", "re-learning", "uni-modal", "uni-modal injected"]


def functional_results() -> list[Tensor]:
    """Of the functions that take integers, or make numbers of their own."""
    f = bo.functional
    labels = torch.tensor([0, 1, 1, 2], device="cpu")
    counts = torch.tensor([5000, 300, 1], device="cpu")
    logits = torch.tensor([[3, 0, 1], [0, 1, 2], [1, 4, 0], [2, 1, 1]], device="cpu")
    features = torch.tensor([[0, 0], [0, 1], [9, 9], [9, 8]], device="cpu")
    draw = torch.Generator("cpu").manual_seed(0)
    return [
        f.true_class_score(logits, labels),
        f.discrepancy_ratio(counts),
        f.modulation_coefficient(counts, 0.3),
        f.drop_probability(counts),
        f.modal_significance(logits[None], [logits], labels),
        f.significance_from_baseline(counts, counts, counts[0], counts),
        f.keep_ratio(counts),
        f.unit_importance(logits),
        f.inclusion_probabilities(counts, 2.3),
        f.purity(labels, labels.flip(0)),
        f.minmax_scale(features),
        f.kmeans(features, 2, generator=draw).centroids,
        f.reinit_strength(counts, 0.1),
        f.recover_scale(logits - 1, logits, labels).scale,
        f.total_correlation_loss([logits, logits], labels),
        f.permutation_divergence(logits, logits.flip(0)),
        f.vote(torch.stack([logits, logits.flip(0)])),
    ]


KINDS = [(Concat, torch.float32), (Gated, torch.float32), (SumHeads, torch.float64)]
RUNS: dict[str, Callable[[], Run]] = {
    f"{method} {kind.__name__} {str(dtype)[6:]}": partial(trained_with, method, kind, dtype)
    for method in [*METHODS, *OTHERS]
    # How logits are made matters to scores and features, which all gradient methods have in common.
    for kind, dtype in (KINDS if method in ("OGM-GE", *OTHERS) else KINDS[:1])
}
RUNS["competition"] = partial(trained_with, "competition", Concat, torch.float32)
RUNS["functional"] = lambda: functional_results


@pytest.mark.filterwarnings("ignore:some of the encoders")
@pytest.mark.parametrize("name", RUNS)
def test_another_default_dtype_changes_no_bit(name):
    expected = RUNS[name]()()
    for default in (torch.float64, torch.bfloat16):
        run = RUNS[name]()
        torch.set_default_dtype(default)
        found = run()
        torch.set_default_dtype(torch.float32)
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", RUNS)
def test_another_default_device_is_not_used(name):
    expected, run = RUNS[name]()(), RUNS[name]()
    with torch.device("meta"):
        found = run()
    assert all(map(torch.equal, found, expected))
    run = RUNS[name]()
    with Watch() as watched:
        run()
    assert watched.bare == []


def test_a_copy_of_a_label_list_is_on_the_cpu():
    model = model_of(Concat, torch.float32)
    monitor = watch(model)
    accumulator = monitor.scores()
    given = batches(model, 1)[0]
    with torch.device("meta"):
        monitor.observe(given[1].tolist(), present={"audio": torch.ones(8, dtype=torch.bool, device="cpu")})
        backward(model, given)
        sums = accumulator.take()
    assert sums is not None
    assert sums.count.tolist() == [8, 8]
