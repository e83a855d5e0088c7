"""What holds for OGM at any scores, gradients and options."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.modulation import Slot, StepContext
from balanceopt.monitor import Scores
from tests.training import bits

MODALITIES = ("audio", "visual", "text", "depth")

scores = st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=4)
any_number = st.one_of(
    st.floats(0.0, 1.0), st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, 1e-30, 1e30])
)
shapes = st.lists(st.integers(0, 5), max_size=3)
options = st.fixed_dictionaries(
    {
        "alpha": st.floats(0.0, 2.0),
        "form": st.sampled_from(["cvpr", "cvpr_v0", "tpami"]),
        "ratio": st.sampled_from(["mean_of_ratios", "ratio_of_means"]),
        "min_ndim": st.integers(0, 3),
    }
)


class Situation:
    """One step as a modulation sees it: gradients of the given shapes in each modality, all from one seed."""

    def __init__(self, score: list[float], sizes: list[list[int]], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.names = MODALITIES[: len(score)]
        self.slots: dict[str, list[Slot]] = {name: [] for name in self.names}
        index = 0
        for name in self.names:
            for size in sizes:
                parameter = nn.Parameter(torch.zeros(size))
                parameter.grad = torch.randn(size, generator=generator)
                if parameter.numel():
                    self.slots[name].append(Slot(index, parameter))
                index += 1
        ones = torch.ones(len(score))
        self.sums = Scores(torch.tensor(score), ones, ones, ones, torch.ones(5))
        self.reported: dict[str, Tensor] = {}
        self.counted: dict[str, Tensor] = {}

    @property
    def grads(self) -> list[Tensor]:
        return [slot.grad for own in self.slots.values() for slot in own]

    def modulate(self, modulation: bo.OGM) -> Situation:
        base = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        step = StepContext(
            scores=self.sums,
            modalities=self.names,
            slots=self.slots,
            optimizer=base,
            seed=3,
            number=7,
            report=self.reported.__setitem__,
            count=self.counted.__setitem__,
        )
        modulation.modulate(step)
        return self


def coefficient(found: Situation) -> Tensor:
    return found.reported["coefficient"]


@given(scores, options)
def test_coefficients_lie_in_the_unit_interval_and_the_weakest_keeps_its_own(score: list[float], chosen: Any):
    k = coefficient(Situation(score, []).modulate(bo.OGM(noise=False, **chosen)))
    assert bool(((k >= 0) & (k <= 1)).all())
    assert (
        k[torch.tensor(score).argmin()] > 1 - 1e-3
    )  # a ratio of 1 up to rounding may count as dominant in form A
    assert k[torch.tensor(score).argmax()] == k.min()


@given(scores, options, st.floats(0.01, 100))
def test_only_ratios_matter(score: list[float], chosen: Any, factor: float):
    k = coefficient(Situation(score, []).modulate(bo.OGM(noise=False, **chosen)))
    scaled = coefficient(Situation([s * factor for s in score], []).modulate(bo.OGM(noise=False, **chosen)))
    assume(
        min(abs(s / t - 1) for s in score for t in score if s != t) > 1e-3 if len(set(score)) > 1 else False
    )
    torch.testing.assert_close(k, scaled, rtol=1e-4, atol=1e-5)


@given(scores, options, st.randoms(use_true_random=False))
def test_renaming_modalities_renames_coefficients(score: list[float], chosen: Any, random: Any):
    order = list(range(len(score)))
    random.shuffle(order)
    assume(len(set(score)) == len(score))
    k = coefficient(Situation(score, []).modulate(bo.OGM(noise=False, **chosen)))
    moved = coefficient(Situation([score[i] for i in order], []).modulate(bo.OGM(noise=False, **chosen)))
    torch.testing.assert_close(k[torch.tensor(order)], moved, rtol=1e-4, atol=1e-5)


@given(scores, st.lists(shapes, max_size=3), options)
def test_gradients_are_products(score: list[float], sizes: list[list[int]], chosen: Any):
    before = [g.clone() for g in Situation(score, sizes).grads]
    found = Situation(score, sizes).modulate(bo.OGM(noise=False, **chosen))
    owner = [m for m, own in enumerate(found.slots.values()) for _ in own]
    for g, b, m in zip(found.grads, before, owner, strict=True):
        k = coefficient(found)[m] if g.dim() >= chosen["min_ndim"] else 1.0
        torch.testing.assert_close(g, b * k, rtol=1e-6, atol=0)


@given(scores, st.lists(shapes, max_size=3), options)
def test_at_alpha_zero_nothing_changes(score: list[float], sizes: list[list[int]], chosen: Any):
    before = Situation(score, sizes).grads
    found = Situation(score, sizes).modulate(bo.OGM(**{**chosen, "alpha": 0.0}, noise=False))
    assert all(torch.equal(bits(g), bits(b)) for g, b in zip(found.grads, before, strict=True))


@given(st.lists(any_number, min_size=2, max_size=4), st.lists(shapes, max_size=3), options, st.booleans())
def test_any_numbers_give_finite_gradients(score: Any, sizes: Any, chosen: Any, noise: bool):
    before = Situation(score, sizes).grads
    found = Situation(score, sizes).modulate(bo.OGM(noise=noise, **chosen))
    assert all(bool(g.isfinite().all()) for g in found.grads)
    given_scores = torch.tensor(score)
    if not bool(given_scores.isfinite().all()) or not bool((given_scores > 0).any()):
        assert not bool(found.sums.usable.any())
        assert all(torch.equal(bits(g), bits(b)) for g, b in zip(found.grads, before, strict=True))
    else:
        assert bool(found.sums.usable.all())


@given(scores, st.lists(shapes, min_size=1, max_size=3), st.floats(0.0, 2.0), st.floats(0.0, 3.0))
def test_noise_adds_to_the_scaled_gradient_and_is_linear_in_its_scale(
    score: list[float], sizes: list[list[int]], alpha: float, scale: float
):
    def run(noise_scale: float) -> list[Tensor]:
        return Situation(score, sizes).modulate(bo.OGM(alpha, noise_scale=noise_scale)).grads

    without, once, more = run(0.0), run(1.0), run(scale)
    for a, b, c in zip(without, once, more, strict=True):
        torch.testing.assert_close(c, a + scale * (b - a), rtol=1e-4, atol=1e-5)


@given(scores, st.lists(shapes, min_size=1, max_size=3), st.integers(0, 20))
def test_the_same_step_again_is_the_same(score: list[float], sizes: list[list[int]], seed: int):
    first = Situation(score, sizes, seed).modulate(bo.OGM(0.5)).grads
    again = Situation(score, sizes, seed).modulate(bo.OGM(0.5)).grads
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@given(scores, st.lists(shapes, min_size=2, max_size=3), st.integers(0, 100), st.booleans())
def test_a_broken_gradient_is_left_and_the_others_do_not_notice(
    score: list[float], sizes: list[list[int]], which: int, noise: bool
):
    modulation = bo.OGM(0.5, noise=noise, min_ndim=0)
    whole = Situation(score, sizes).modulate(modulation).grads
    assume(whole)
    broken = Situation(score, sizes)
    spoilt = broken.grads[which % len(whole)]
    spoilt.view(-1)[0] = float("nan")
    before = bits(spoilt).clone()
    broken.modulate(modulation)
    assert torch.equal(bits(spoilt), before)
    for a, b in zip(whole, broken.grads, strict=True):
        assert b is spoilt or torch.equal(a, b)
    assert sum(int(v) for k, v in broken.counted.items() if k == "nonfinite_gradients") <= 1
