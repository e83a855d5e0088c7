"""OGM and OGM-GE at work inside a wrapper: which gradients change, by what, and what is left alone."""

from __future__ import annotations

import math
from typing import Any

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
    bits,
    class_zero,
    grad_of,
    groups_of,
    modulated,
    same_bits,
    sgd,
    small_model,
    train,
)

INF, NAN = float("inf"), float("nan")


def with_scores(*certainty: float, modulation: bo.OGM | None = None, **options: Any) -> Any:
    """A model and its optimizer, where modality m gives the true class the probability `certainty[m]`."""
    model = small_model(len(certainty), **options)
    monitor = watch(model, scores=answering(*certainty))
    chosen = bo.OGM(0.5, noise=False) if modulation is None else modulation
    return model, bo.ModulatedOptimizer(sgd(groups_of(model)), monitor, chosen, seed=0)


def factors(model: Concat, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """By what each gradient of each encoder was multiplied in a step, tensor by tensor."""
    optimizer.zero_grad()
    backward(model, class_zero(model))
    before = [grad_of(p).clone() for p in model.parameters()]
    optimizer.step()
    names = {id(p): name for name, encoder in model.modalities.items() for p in encoder.parameters()}
    found: dict[str, list[Tensor]] = {name: [] for name in [*model.modalities, "rest"]}
    for p, g in zip(model.parameters(), before, strict=True):
        found[names.get(id(p), "rest")].append((grad_of(p) / g).unique().squeeze())
    return found


# -- the rule ----------------------------------------------------------------------------------------------------


FORMS = {
    "cvpr": lambda rho: 1 - math.tanh(0.5 * rho),
    "cvpr_v0": lambda rho: 1 - math.tanh(0.5 * (rho - 1)),
    "tpami": lambda rho: 1 - 0.5 * math.tanh(rho - 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_dominant_encoders_matrices_are_scaled(form: Any):
    model, optimizer = with_scores(0.8, 0.2, modulation=bo.OGM(0.5, noise=False, form=form))
    found = factors(model, optimizer)
    k = FORMS[form](4.0)
    expected = [k, 1, k, 1]  # weight, bias, weight, bias
    for ratio, want in zip(found["audio"], expected, strict=True):
        torch.testing.assert_close(ratio.mean(), torch.tensor(float(want)), rtol=1e-5, atol=0)
    assert all(torch.equal(ratio, torch.tensor(1.0)) for ratio in found["visual"] + found["rest"])


def test_three_modalities():
    model, optimizer = with_scores(0.6, 0.3, 0.1)
    found = factors(model, optimizer)
    ratios = {"audio": (2 + 6) / 2, "visual": (0.5 + 3) / 2, "text": (1 / 6 + 1 / 3) / 2}
    for name, rho in ratios.items():
        k = 1 - math.tanh(0.5 * rho) if rho > 1 else 1.0
        assert float(found[name][0].mean()) == pytest.approx(k, rel=1e-5)


def test_ratio_of_means():
    model, optimizer = with_scores(0.6, 0.3, 0.1, modulation=bo.OGM(0.5, noise=False, ratio="ratio_of_means"))
    assert float(factors(model, optimizer)["audio"][0].mean()) == pytest.approx(
        1 - math.tanh(0.5 * 3), rel=1e-5
    )


@pytest.mark.parametrize("min_ndim", [0, 1, 2, 3])
def test_min_ndim(min_ndim: int):
    model, optimizer = with_scores(0.8, 0.2, modulation=bo.OGM(0.5, noise=False, min_ndim=min_ndim))
    scaled = [not torch.equal(ratio, torch.tensor(1.0)) for ratio in factors(model, optimizer)["audio"]]
    assert scaled == [p.dim() >= min_ndim for p in model.modalities["audio"].parameters()]


def test_noise_is_on_every_modality():
    model, optimizer = with_scores(0.8, 0.2, modulation=bo.OGM(0.5))
    found = factors(model, optimizer)
    for name in ("audio", "visual"):
        assert [ratio.numel() > 1 for ratio in found[name]] == [True, False, True, False]
    assert all(torch.equal(ratio, torch.tensor(1.0)) for ratio in found["rest"])


def test_equal_scores_leave_gradients_alone():
    model, optimizer = with_scores(0.5, 0.5)
    assert all(torch.equal(r, torch.ones_like(r)) for own in factors(model, optimizer).values() for r in own)


# -- bad numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("certainty", [(NAN, 0.5), (INF, 0.5), (NAN, NAN), (0.0, 0.0)])
def test_unusable_scores_are_the_bases_step(certainty: tuple[float, float], noise: bool):
    model, optimizer = with_scores(*certainty, modulation=bo.OGM(0.5, noise=noise))
    twin = small_model()
    bare = sgd(groups_of(twin))
    with pytest.warns(UserWarning, match="scores are not finite, all zero"):
        train(model, optimizer, [class_zero(model)])
    train(model, optimizer, [class_zero(model, 1)])  # a second warning would be an error
    train(twin, bare, [class_zero(twin), class_zero(twin, 1)])
    assert same_bits(model, twin)
    assert optimizer.stats()["unusable_scores"] == 2
    assert optimizer.param_groups[0]["balanceopt_step"] == 2


def test_one_zero_score_is_clamped():
    model, optimizer = with_scores(0.5, 0.0)
    found = factors(model, optimizer)
    assert not found["audio"][0].any()  # rho = 5e7, k = 0
    assert optimizer.stats()["unusable_scores"] == 0


@pytest.mark.parametrize("noise", [False, True])
def test_nan_in_one_gradient_leaves_that_one_and_modulates_the_rest(noise: bool):
    model, optimizer = with_scores(0.8, 0.2, modulation=bo.OGM(0.5, noise=noise))
    backward(model, class_zero(model))
    first, _, second, _ = map(grad_of, model.modalities["audio"].parameters())
    first[0, 0] = NAN
    left, changed = first.clone(), second.clone()
    with pytest.warns(UserWarning, match="gradients that are not finite were left"):
        optimizer.step()
    assert torch.equal(bits(first), bits(left))
    assert not torch.equal(second, changed)
    assert optimizer.stats()["nonfinite_gradients"] == 1


# -- parameters of all kinds -------------------------------------------------------------------------------------


def test_frozen_and_unused_parameters():
    model, optimizer = modulated(bo.OGM(0.5))
    frozen = next(model.modalities["audio"].parameters()).requires_grad_(False)
    before = frozen.clone()
    train(model, optimizer, [batch(0, model)])
    assert torch.equal(frozen, before)
    assert frozen.grad is None
    assert optimizer.stats()["modulated"] == 1


def test_an_encoder_that_is_all_frozen():
    model, optimizer = modulated(bo.OGM(0.5))
    model.modalities["audio"].requires_grad_(False)
    train(model, optimizer, [batch(0, model)])
    assert optimizer.stats()["modulated"] == 1


def test_all_encoders_frozen_is_said_once():
    model, optimizer = modulated(bo.OGM(0.5))
    model.encoders.requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing was modulated"):
        train(model, optimizer, [batch(0, model)])
    train(model, optimizer, [batch(1, model)])


class Odd(nn.Module):
    """Parameters of unusual shapes around a linear map."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.single = nn.Parameter(torch.ones(1, 1))
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.weight = nn.Parameter(torch.randn(width, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.scalar * self.single + self.empty.sum()


@pytest.mark.parametrize("min_ndim", [0, 2])
def test_scalars_single_elements_and_empty_tensors(min_ndim: int):
    model, optimizer = modulated(bo.OGM(0.5, min_ndim=min_ndim), encoder=Odd)
    train(model, optimizer, [batch(i, model) for i in range(3)])
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.stats() == {
        "modulated": 3,
        "without_scores": 0,
        "outside_window": 0,
        "unusable_scores": 0,
        "nonfinite_gradients": 0,
    }


def test_an_empty_batch_is_the_bases_step():
    model, optimizer = modulated(bo.OGM(0.5))
    before = [p.detach().clone() for p in model.parameters()]
    inputs, labels = batch(0, model, size=0)
    optimizer.zero_grad()
    F.cross_entropy(model(*inputs), labels, reduction="sum").backward()
    optimizer.step()  # zero gradients
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_bfloat16():
    model = small_model().bfloat16()
    optimizer = bo.ModulatedOptimizer(sgd(groups_of(model)), watch(model), bo.OGM(0.5))
    inputs, labels = batch(0, model)
    backward(model, ([x.bfloat16() for x in inputs], labels))
    optimizer.step()
    assert optimizer.stats()["modulated"] == 1
    assert all(p.isfinite().all() for p in model.parameters())


class Lookup(nn.Module):
    """Class labels as words; gradients are sparse."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(inputs, width, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x.argmax(-1))


def lookups(modulation: bo.OGM, make: Any = sgd) -> Any:
    model = small_model(encoder=Lookup)
    encoders = {"params": [p for e in model.modalities.values() for p in e.parameters()]}
    return model, bo.ModulatedOptimizer(make([encoders]), watch(model), modulation)


def test_sparse_gradients_are_scaled():
    model, optimizer = lookups(bo.OGM(0.5, noise=False))
    train(model, optimizer, [batch(i, model) for i in range(3)])
    assert optimizer.stats()["modulated"] == 3
    assert next(model.modalities["audio"].parameters()).grad.is_sparse


def test_sparse_adam():
    model, optimizer = lookups(bo.OGM(0.5, noise=False, apply_to="update"), torch.optim.SparseAdam)
    train(model, optimizer, [batch(i, model) for i in range(3)])
    assert optimizer.stats()["modulated"] == 3


def test_noise_on_sparse_gradients_is_refused_before_anything_is_changed():
    model, optimizer = lookups(bo.OGM(0.5))
    backward(model, batch(0, model))
    before = [grad_of(p).clone() for p in model.encoders.parameters()]
    with pytest.raises(NotImplementedError, match=r"modality 'audio' has sparse gradients.*noise=False"):
        optimizer.step()
    after = [grad_of(p) for p in model.encoders.parameters()]
    assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(after, before, strict=True))


def test_zero_gradients_with_adam_do_not_move():
    model, optimizer = modulated(bo.OGM(0.5), torch.optim.Adam)
    backward(model, batch(0, model))
    for p in model.parameters():
        grad_of(p).zero_()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_gradients_keep_their_storage():
    model, optimizer = modulated(bo.OGM(0.5))
    backward(model, batch(0, model))
    places = [(id(p.grad), grad_of(p).data_ptr()) for p in model.parameters()]
    optimizer.step()
    assert [(id(p.grad), grad_of(p).data_ptr()) for p in model.parameters()] == places


# -- window ------------------------------------------------------------------------------------------------------


def acted(model: Concat, optimizer: bo.ModulatedOptimizer, number: int) -> bool:
    before = optimizer.stats()["modulated"]
    train(model, optimizer, [batch(number, model)])
    return optimizer.stats()["modulated"] > before


def test_the_window_is_inclusive_in_steps():
    model, optimizer = modulated(bo.OGM(0.5, start=2, end=4))
    assert [acted(model, optimizer, i) for i in range(7)] == [False, False, True, True, True, False, False]
    assert optimizer.stats()["outside_window"] == 4


def test_the_window_is_inclusive_in_epochs():
    model, optimizer = modulated(bo.OGM(0.5, start=1, end=2, unit="epoch"))
    seen = []
    for epoch in range(4):
        optimizer.set_epoch(epoch)
        seen.append([acted(model, optimizer, i) for i in range(2)])
    assert seen == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]


def test_epochs_that_are_set_change_no_unit():
    model, optimizer = modulated(bo.OGM(0.5, start=2, end=4))
    optimizer.set_epoch(3)
    assert [acted(model, optimizer, i) for i in range(7)] == [False, False, True, True, True, False, False]


def test_a_step_before_the_first_epoch_is_an_error_where_epochs_are_counted():
    model, optimizer = modulated(bo.OGM(0.5, unit="epoch"))
    with pytest.raises(
        RuntimeError, match=r"none was set yet\. Call set_epoch\(epoch\) when an epoch begins"
    ):
        train(model, optimizer, [batch(0, model)])
    optimizer.set_epoch(0)
    assert acted(model, optimizer, 1)


def test_outside_the_window_steps_are_the_bases_bit_for_bit():
    model, optimizer = modulated(bo.OGM(0.5, start=3))
    twin = small_model()
    train(model, optimizer, [batch(i, model) for i in range(3)])
    train(twin, sgd(groups_of(twin)), [batch(i, twin) for i in range(3)])
    assert same_bits(model, twin)


def test_outside_the_window_no_scores_are_asked_for():
    model, optimizer = modulated(bo.OGM(0.5, end=0))
    train(model, optimizer, [batch(0, model)])
    optimizer.monitor.remove()
    train(model, optimizer, [batch(i, model) for i in range(12)])  # neither a warning nor an error
    assert optimizer.stats()["outside_window"] == 12


# -- construction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, "`alpha` should be a finite number of at least 0. Found alpha = -1."),
        ({"alpha": NAN}, "`alpha` should be a finite number of at least 0. Found alpha = nan"),
        ({"noise_scale": -0.1}, "`noise_scale` should be a finite number of at least 0"),
        ({"noise": "fast"}, "`noise` should be one of .*'compiled'.*, True or False. Found noise = 'fast'"),
        ({"form": "A"}, "`form` should be one of .*'cvpr'.* Found form = 'A'"),
        ({"apply_to": "lr"}, "`apply_to` should be one of"),
        ({"ratio": "sum"}, "`ratio` should be one of"),
        ({"min_ndim": -1}, "`min_ndim` should be a whole number of at least 0"),
        ({"start": -1}, "`start` should be a whole number of at least 0. Found start = -1"),
        ({"start": 3, "end": 2}, "`end` should not be less than `start`. Found start = 3 and end = 2"),
        ({"unit": "steps"}, "`unit` should be one of .* Found unit = 'steps'"),
    ],
)
def test_options_are_checked(options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        bo.OGM(**options)


def test_repr_shows_every_option():
    shown = repr(bo.OGM(0.8, noise=False, end=3))
    assert eval(shown, {"OGM": bo.OGM}).options() == bo.OGM(0.8, noise=False, end=3).options()


HINTED = [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam]


class MyAdam(torch.optim.Adam):
    pass


@pytest.mark.parametrize("make", [*HINTED, MyAdam])
def test_a_hint_where_the_base_cancels_the_coefficient(make: Any, recwarn: pytest.WarningsRecorder):
    modulated(bo.OGM(0.5), make)
    (hint,) = recwarn
    assert hint.category is bo.OptimizerHintWarning
    assert f"{make.__name__} divides a constant gradient factor out" in str(hint.message)


@pytest.mark.parametrize(
    ("modulation", "make"),
    [
        (bo.OGM(0.5), sgd),
        (bo.OGM(0), torch.optim.Adam),
        (bo.OGM(0.5, apply_to="update"), torch.optim.Adam),
    ],
)
def test_no_hint(modulation: bo.OGM, make: Any, recwarn: pytest.WarningsRecorder):
    modulated(modulation, make)
    assert len(recwarn) == 0


def test_the_hint_names_the_users_line(recwarn: pytest.WarningsRecorder):
    model = small_model()
    bo.ModulatedOptimizer(torch.optim.Adam(model.parameters()), watch(model))
    bo.attach(torch.optim.Adam(model.parameters()), watch(model), bo.OGM())
    assert [warning.filename for warning in recwarn] == [__file__, __file__]
