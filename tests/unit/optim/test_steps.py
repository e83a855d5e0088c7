"""What a step does with scores, gradients and closures: the wrapper and the hook form alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from tests.models import Concat, watch
from tests.training import (
    answering,
    backward,
    batch,
    batches,
    class_zero,
    distance,
    grad_of,
    groups_of,
    modulated,
    same_bits,
    sgd,
    small_model,
    train,
)


class Hooked:
    """`attach` behind the surface that `ModulatedOptimizer` has."""

    def __init__(self, base: torch.optim.Optimizer, monitor: Any, modulation: Any, **options: Any) -> None:
        self.base = base
        self.handle = bo.attach(base, monitor, modulation, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle if name in ("stats", "set_epoch", "listeners") else self.base, name)


def base_of(optimizer: Any) -> Any:
    return optimizer.base if isinstance(optimizer, Hooked) else optimizer.optimizer


Make = Callable[..., Any]
FORMS: dict[str, Make] = {"wrapper": bo.ModulatedOptimizer, "hooks": Hooked}
both_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def run(form: Make, modulation: Any = None, make: Any = sgd, **options: Any) -> tuple[Concat, Any]:
    model = small_model()
    chosen = bo.OGM(0.5) if modulation is None else modulation
    return model, form(make(groups_of(model)), watch(model), chosen, seed=0, **options)


# -- both forms are the same -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_the_hook_form_equals_the_wrapper(make: Any):
    model, optimizer = run(FORMS["wrapper"], make=make)
    twin, hooked = run(FORMS["hooks"], make=make)
    train(model, optimizer, batches(model, 5))
    train(twin, hooked, batches(twin, 5))
    assert same_bits(model, twin)


@both_forms
def test_untagged_groups_and_tagged_ones_are_the_same(form: Make):
    model, optimizer = run(form)
    twin = small_model()
    untagged = form(sgd([{"params": g["params"]} for g in groups_of(twin)]), watch(twin), bo.OGM(0.5), seed=0)
    train(model, optimizer, batches(model, 3))
    train(twin, untagged, batches(twin, 3))
    assert same_bits(model, twin)


def test_a_tag_beats_the_encoder():
    model = small_model()
    groups = [{"params": model.encoders.parameters(), "modality": "visual"}]
    optimizer = bo.ModulatedOptimizer(sgd(groups), watch(model), bo.OGM(0.5, noise=False))
    backward(model, batch(0, model))
    before = [grad_of(p).clone() for p in model.modalities["audio"].parameters()]
    optimizer.step()  # audio dominates, and none of these parameters is audio's
    assert all(
        torch.equal(grad_of(p), b)
        for p, b in zip(model.modalities["audio"].parameters(), before, strict=True)
    )


# -- steps without scores ----------------------------------------------------------------------------------------


@both_forms
def test_without_scores_it_is_the_base_warns_once_and_raises_at_the_tenth_step(form: Make):
    model, optimizer = run(form)
    twin = small_model()
    bare = sgd(groups_of(twin))
    silent = batches(model, 9)
    model.eval()
    with pytest.warns(UserWarning, match=r"no scores since the last step.*train_only=False") as warned:
        train(model, optimizer, silent)
    assert len(warned) == 1
    train(twin, bare, silent)
    assert same_bits(model, twin)
    assert optimizer.stats()["without_scores"] == 9
    assert optimizer.param_groups[0]["balanceopt_step"] == 9
    with pytest.raises(RuntimeError, match=r"no scores in 10 steps in a row.*strict=False"):
        train(model, optimizer, silent[:1])


def test_not_strict_only_warns():
    model, optimizer = run(bo.ModulatedOptimizer, strict=False)
    model.eval()
    with pytest.warns(UserWarning, match="no scores") as warned:
        train(model, optimizer, batches(model, 15))
    assert len(warned) == 1


def test_a_step_with_scores_starts_the_count_anew():
    model, optimizer = run(bo.ModulatedOptimizer)
    with pytest.warns(UserWarning, match="no scores"):
        train(model.eval(), optimizer, batches(model, 9))
    train(model.train(), optimizer, batches(model, 1))
    train(model.eval(), optimizer, batches(model, 9))
    assert optimizer.stats()["modulated"] == 1


@both_forms
@pytest.mark.parametrize("gradients", ["none", "zero"])
def test_a_step_without_gradients_says_nothing_and_counts_nothing(form: Make, gradients: str):
    model, optimizer = run(form, make=lambda groups: torch.optim.Adam(groups))
    if gradients == "zero":
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    for _ in range(12):
        optimizer.step()
    assert optimizer.param_groups[0]["balanceopt_step"] == 0
    assert optimizer.stats()["without_scores"] == 0


@both_forms
def test_scores_are_used_once(form: Make):
    model, optimizer = run(form)
    backward(model, batch(0, model))
    optimizer.step()
    with pytest.warns(UserWarning, match="no scores"):
        optimizer.step()
    assert (optimizer.stats()["modulated"], optimizer.stats()["without_scores"]) == (1, 1)


@both_forms
def test_zero_grad_discards_scores(form: Make):
    model, optimizer = run(form)
    backward(model, batch(0, model))
    optimizer.zero_grad()
    model.eval()
    backward(model, batch(1, model))
    with pytest.warns(UserWarning, match="no scores"):
        optimizer.step()


@both_forms
def test_set_to_none_false(form: Make):
    model, optimizer = run(form)
    backward(model, batch(0, model))
    optimizer.zero_grad(set_to_none=False)
    assert all(not grad_of(p).any() for p in model.parameters())
    optimizer.step()
    assert optimizer.param_groups[0]["balanceopt_step"] == 0


# -- accumulation, scaling, clipping -----------------------------------------------------------------------------


@both_forms
def test_micro_batches_are_modulated_once_and_as_one_batch(form: Make):
    whole, optimizer = run(form)
    parts, same = run(form)
    for number in range(3):
        inputs, labels = batch(number, whole, size=8)
        train(whole, optimizer, [(inputs, labels)])
        same.zero_grad()
        for rows in (slice(0, 4), slice(4, 8)):
            part = ([x[rows] for x in inputs], labels[rows])
            (torch.nn.functional.cross_entropy(parts(*part[0]), part[1]) / 2).backward()
        same.step()
    assert same.stats()["modulated"] == 3
    assert distance(whole, parts) < 1e-6


def scaled_step(
    model: Concat,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    number: int,
    *,
    broken: bool = False,
) -> None:
    inputs, labels = batch(number, model)
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(*inputs), labels)
    scaler.scale(loss * float("inf") if broken else loss).backward()
    scaler.step(optimizer)
    scaler.update()


SCALED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
}


@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
def test_a_step_that_the_scaler_skips_uses_nothing(make: Any):
    model, optimizer = modulated(bo.OGM(0.5), make)
    twin, same = modulated(bo.OGM(0.5), make)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for number in range(4):
        scaled_step(model, optimizer, scaler, number)
        scaled_step(model, optimizer, scaler, 50, broken=True)
    train(twin, same, batches(twin, 4))
    assert optimizer.stats() == same.stats()
    assert optimizer.param_groups[0]["balanceopt_step"] == 4
    assert distance(model, twin) < 1e-6


def test_unscale_and_clip():
    model, optimizer = modulated(bo.OGM(0.5, noise=False))
    twin, same = modulated(bo.OGM(0.5, noise=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(3):
        optimizer.zero_grad()
        inputs, labels = batch(number, model)
        scaler.scale(torch.nn.functional.cross_entropy(model(*inputs), labels)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()

        same.zero_grad()
        backward(twin, batch(number, twin))
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        same.step()
    assert distance(model, twin) < 1e-6


def test_hooks_on_a_fused_base_agree_under_a_scaler():
    model, hooked = run(FORMS["hooks"], make=SCALED["fused"])
    twin, same = run(FORMS["wrapper"], make=SCALED["fused"])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(3):
        scaled_step(model, hooked.base, scaler, number)
    train(twin, same, batches(twin, 3))
    assert distance(model, twin) < 1e-6


def test_the_fused_bases_flag_does_not_leak():
    _, optimizer = modulated(make=SCALED["fused"])
    assert getattr(optimizer.optimizer, "_step_supports_amp_scaling")  # noqa: B009
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


# -- closures ----------------------------------------------------------------------------------------------------


def closure_for(model: Concat, optimizer: Any, number: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, batch(number, model))

    return closure


@both_forms
@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_modulated_and_its_loss_returned(form: Make, keyword: bool):
    model, optimizer = run(form)
    twin, same = run(form)
    for number in range(3):
        closure = closure_for(model, optimizer, number)
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        same.zero_grad()
        assert torch.equal(loss, backward(twin, batch(number, twin)))
        same.step()
    assert same_bits(model, twin)
    assert optimizer.param_groups[0]["balanceopt_step"] == 3


@both_forms
def test_lbfgs(form: Make):
    def make(groups: Any) -> torch.optim.LBFGS:
        return torch.optim.LBFGS([p for g in groups for p in g["params"]], lr=0.1, max_iter=4)

    model, optimizer = run(form, bo.OGM(0.5, noise=False), make)
    losses = [float(optimizer.step(closure_for(model, optimizer, 0))) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer.param_groups[0]["balanceopt_step"] == 4
    assert optimizer.stats()["modulated"] > 4


def test_noise_in_a_line_search_is_warned_of_once():
    model, optimizer = modulated(
        bo.OGM(0.5), lambda groups: torch.optim.LBFGS([p for g in groups for p in g["params"]], lr=0.01)
    )
    with pytest.warns(UserWarning, match=r"LBFGS evaluates its closure several times.*noise=False") as warned:
        optimizer.step(closure_for(model, optimizer, 0))  # type: ignore[arg-type]
    optimizer.step(closure_for(model, optimizer, 1))  # type: ignore[arg-type]
    assert len(warned) == 1


class Twice(torch.optim.SGD):
    """Evaluates its closure twice, as sharpness-aware optimizers do."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        self.first = [grad_of(p).clone() for g in self.param_groups for p in g["params"]]
        return super().step(closure)


@both_forms
def test_a_closure_that_runs_twice_is_one_step_with_one_noise(form: Make):
    model, optimizer = run(form, make=lambda groups: Twice(groups, lr=0.0))
    base = base_of(optimizer)
    for number in range(2):
        optimizer.step(closure_for(model, optimizer, number))
        second = [grad_of(p) for g in base.param_groups for p in g["params"]]
        assert all(torch.equal(a, b) for a, b in zip(base.first, second, strict=True))
        assert base.param_groups[0]["balanceopt_step"] == number + 1


class Child(torch.optim.AdamW):
    """Its step calls its parent's: torch calls the hooks of both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    "modulation",
    [partial(bo.OGM, 0.5), partial(bo.OGM, 0.5, noise=False, apply_to="update")],
    ids=["grad", "update"],
)
@pytest.mark.parametrize("closure", [False, True])
def test_a_step_within_a_step_is_one(modulation: Any, closure: bool):
    model, optimizer = run(FORMS["wrapper"], modulation(), torch.optim.AdamW)
    twin, hooked = run(FORMS["hooks"], modulation(), Child)
    train(model, optimizer, batches(model, 3))
    for number in range(3):
        if closure:
            hooked.step(closure_for(twin, hooked, number))
        else:
            train(twin, hooked, [batch(number, twin)])
    assert hooked.stats() == optimizer.stats()
    assert hooked.param_groups[0]["balanceopt_step"] == 3
    assert same_bits(model, twin)


@both_forms
def test_a_step_that_fails_does_not_repeat_a_later_ones_noise(form: Make):
    model, optimizer = run(form)
    base = base_of(optimizer)
    numbers: list[int] = []
    optimizer.listeners.append(lambda step, name, modalities, values: numbers.append(step))

    def fail(*_: Any) -> None:
        raise ArithmeticError("on purpose")

    for number in range(3):
        hook = base.register_step_pre_hook(fail) if number == 1 else None
        backward(model, batch(number, model))
        if hook is None:
            optimizer.step()
        else:
            with pytest.raises(ArithmeticError):
                optimizer.step()
            hook.remove()
    assert list(dict.fromkeys(numbers)) == [0, 1, 2]


def test_under_no_grad_a_closure_still_sees_gradients():
    model, optimizer = modulated()
    with torch.no_grad():
        loss = optimizer.step(closure_for(model, optimizer, 0))  # type: ignore[arg-type]
    assert loss is not None
    assert optimizer.stats()["modulated"] == 1


# -- parameters that come and go ---------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["wrapper", "base"])
def test_add_param_group(on: str):
    model = small_model()
    encoders = model.modalities
    base = sgd([{"params": encoders["audio"].parameters(), "modality": "audio"}])
    optimizer = bo.ModulatedOptimizer(base, watch(model), bo.OGM(0.5, noise=False))
    train(model, optimizer, batches(model, 2))
    target = optimizer if on == "wrapper" else base
    target.add_param_group({"params": list(encoders["visual"].parameters())})
    train(model, optimizer, batches(model, 2))
    assert base.param_groups[1]["balanceopt_step"] == 4
    assert base.param_groups[1]["balanceopt_seed"] == base.param_groups[0]["balanceopt_seed"]


def test_a_group_added_with_an_unknown_tag_is_refused():
    _, optimizer = modulated()
    with pytest.raises(KeyError, match=r"tagged with modality 'smell', the monitor has"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "modality": "smell"})


@both_forms
def test_parameters_that_take_the_place_of_others_are_found(form: Make):
    """As Accelerate puts sharded parameters into the groups of an optimizer that it was given."""
    model = small_model()
    optimizer = form(sgd(model.parameters()), watch(model), bo.OGM(0.5, noise=False))
    train(model, optimizer, batches(model, 1))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    backward(model, batch(1, model))
    weight = next(model.modalities["audio"].parameters())
    before = grad_of(weight).clone()
    optimizer.step()
    assert not torch.equal(grad_of(weight), before)
    assert optimizer.stats()["modulated"] == 2


def test_an_empty_first_group():
    model = small_model()
    groups = [{"params": []}, *groups_of(model)]
    optimizer = bo.ModulatedOptimizer(sgd(groups), watch(model), bo.OGM(0.5, noise=False, apply_to="update"))
    train(model, optimizer, batches(model, 2))
    assert optimizer.param_groups[0]["balanceopt_step"] == 2


# -- several -----------------------------------------------------------------------------------------------------


def test_several_modulations_act_in_order():
    model, optimizer = modulated([bo.OGM(0.5, noise=False), bo.OGM(0.2, noise=False)])
    backward(model, batch(0, model))
    weight = next(model.modalities["audio"].parameters())
    before = grad_of(weight).clone()
    coefficients: list[Tensor] = []
    optimizer.listeners.append(
        lambda step, name, _, x: coefficients.append(x) if name == "coefficient" else None
    )
    optimizer.step()
    first, second = (float(k[0]) for k in coefficients)
    torch.testing.assert_close(grad_of(weight), before * first * second)
    assert first < second < 1


def test_two_optimizers_share_a_monitor():
    model = small_model()
    monitor = watch(model)
    groups = groups_of(model)
    pair = [bo.ModulatedOptimizer(sgd(own), monitor, bo.OGM(0.5)) for own in (groups[:1], groups[1:])]
    for one in batches(model, 3):
        for optimizer in pair:
            optimizer.zero_grad()
        backward(model, one)
        for optimizer in pair:
            optimizer.step()
    assert [o.stats()["modulated"] for o in pair] == [3, 3]


def test_a_single_modality_is_the_base_and_says_so():
    model = small_model(1)
    with pytest.warns(UserWarning, match="single modality 'audio' there is nothing to balance"):
        optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model))
    twin = small_model(1)
    train(model, optimizer, batches(model, 3))
    train(twin, sgd(groups_of(twin)), batches(twin, 3))
    assert same_bits(model, twin)


# -- what is left alone ------------------------------------------------------------------------------------------


@both_forms
def test_a_step_leaves_the_global_random_stream_alone(form: Make):
    model, optimizer = run(form)
    backward(model, batch(0, model))
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


# -- scores that can't be used ---------------------------------------------------------------------------------------


def scored(form: Make, *certainty: float, **options: Any) -> tuple[Concat, Any]:
    model = small_model()
    monitor = watch(model, scores=answering(*certainty))
    return model, form(sgd(groups_of(model)), monitor, bo.OGM(0.5, noise=False), seed=0, **options)


@both_forms
@pytest.mark.filterwarnings("ignore:scores are not finite")
def test_ten_steps_in_a_row_with_unusable_scores_are_an_error_that_names_the_cause(form: Make):
    model, optimizer = scored(form, float("nan"), 0.5)
    train(model, optimizer, [class_zero(model, i) for i in range(9)])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"logits of \['audio'\] alone are not finite.*divides by their norm.*normal"
    ):
        train(model, optimizer, [class_zero(model, 9)])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    stats = optimizer.stats()
    assert (stats["modulated"], stats["unusable_scores"], stats["without_scores"]) == (0, 10, 0)


@pytest.mark.parametrize(
    ("samples", "shift", "cause"),
    [(1, 0.0, "a step of one sample.*larger batches"), (8, 1e4, "many spreads of the targets.*standardise")],
)
@pytest.mark.filterwarnings("ignore:scores are not finite")
def test_the_cause_of_unusable_scores_of_a_regression_is_named(samples: int, shift: float, cause: str):
    model, criterion = small_model(), nn.MSELoss()
    optimizer = bo.ModulatedOptimizer(
        sgd(groups_of(model), lr=0.0), watch(model, loss=criterion), bo.OGM(0.5)
    )
    inputs, _ = batch(0, model)
    inputs = [x[:samples] for x in inputs]
    target = torch.randn(samples, 5) + shift
    for _ in range(9):
        criterion(model(*inputs), target).backward()
        optimizer.step()
    criterion(model(*inputs), target).backward()
    with pytest.raises(RuntimeError, match=cause):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:scores are not finite")
def test_unusable_steps_go_on_where_not_strict_and_count_apart():
    model, optimizer = scored(bo.ModulatedOptimizer, 0.0, 0.0, strict=False)
    train(model, optimizer, [class_zero(model, i) for i in range(12)])
    assert (optimizer.stats()["modulated"], optimizer.stats()["unusable_scores"]) == (0, 12)


@pytest.mark.filterwarnings("ignore:scores are not finite")
def test_a_usable_step_in_between_starts_the_row_anew():
    model = small_model()
    certainty = [0.8, 0.2]
    monitor = watch(model, scores=lambda z: answering(*certainty)(z))
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, bo.OGM(0.5, noise=False))
    for step in range(25):
        certainty[0] = 0.8 if step == 9 or step == 19 else float("inf")
        train(model, optimizer, [class_zero(model, step)])
    assert (optimizer.stats()["modulated"], optimizer.stats()["unusable_scores"]) == (2, 23)


@pytest.mark.filterwarnings("ignore:scores are not finite")
def test_an_unusable_step_of_two_methods_is_one_step():
    model = small_model()
    monitor = watch(model, scores=answering(0.0, 0.0))
    methods = [bo.OGM(0.5, noise=False), bo.OGM(0.1, noise=False)]
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, methods)
    train(model, optimizer, [class_zero(model, i) for i in range(2)])
    assert (optimizer.stats()["modulated"], optimizer.stats()["unusable_scores"]) == (0, 2)


def test_scores_that_tell_nothing_ten_times_in_a_row_are_an_error():
    model = small_model()
    uniform = torch.zeros(8, 5)
    monitor = watch(model, scores=lambda z: dict.fromkeys(z, uniform))
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, bo.OGM(0.5, noise=False))
    train(model, optimizer, [batch(i, model) for i in range(9)])
    with pytest.raises(RuntimeError, match=r"every class the same probability.*contrastive.*scores="):
        train(model, optimizer, [batch(9, model)])


class Similarity(Concat):
    """The logits of InfoNCE: how alike the modalities' features are, sample against sample."""

    def __init__(self) -> None:
        super().__init__()
        self.head = _Similarity()  # type: ignore[assignment]

    def fuse(self, features: list[Tensor]) -> Tensor:
        return cast(Tensor, self.head(*features))


class _Similarity(torch.nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return 10 * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def test_contrastive_learning_is_refused():
    plain, model = small_model(), Similarity()
    optimizer = bo.ModulatedOptimizer(sgd(model.parameters()), watch(model), bo.OGM(0.5, noise=False))

    def steps(n: int) -> None:
        for i in range(n):
            optimizer.zero_grad()
            inputs, _ = batch(i, plain)
            F.cross_entropy(model(*inputs), torch.arange(len(inputs[0]))).backward()
            optimizer.step()

    steps(9)
    with pytest.raises(RuntimeError, match=r"contrastive learning.*UnimodalObjective, re-learning"):
        steps(1)
