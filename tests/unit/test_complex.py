"""Complex weights and features are numbers: every method acts on them as on their pairs of reals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo


class Spectrum(nn.Module):
    """A linear layer with complex weights, kept as such or as pairs of reals; returns moduli, or complex features."""

    def __init__(self, *, complex_weight: bool, complex_output: bool) -> None:
        super().__init__()
        pairs = 0.3 * torch.randn(8, 5, 2, generator=torch.Generator().manual_seed(5))
        self.complex_weight, self.complex_output = complex_weight, complex_output
        self.weight = nn.Parameter(torch.view_as_complex(pairs) if complex_weight else pairs)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.complex_weight else torch.view_as_complex(self.weight)
        z = x.to(torch.complex64) @ weight.T
        return z if self.complex_output else z.abs()


class TwoEncoders(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.spectrum, self.plain, self.head = Spectrum(**options), nn.Linear(7, 6), nn.Linear(14, 4)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        features = self.spectrum(x)
        return self.head(torch.cat([features.abs(), self.plain(z)], 1))


def data(number: int, count: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(number)
    labels = torch.randint(4, (count,), generator=draw)
    x = torch.randn(count, 5, generator=draw)
    x[:, :4] += 2 * F.one_hot(labels, 4)
    return x, torch.randn(count, 7, generator=draw), labels


METHODS: dict[str, Callable[[], bo.Modulation]] = {
    "OGM": lambda: bo.OGM(0.3, noise=False),
    "OGM-GE": lambda: bo.OGM(0.3),
    "OGM by update": lambda: bo.OGM(0.3, noise=False, apply_to="update"),
    "AMSS": bo.AMSS,
    "AMSS+": lambda: bo.AMSS(scale="unbiased"),
    "AMSS official": lambda: bo.AMSS(scale="official"),
}


def trained(method: str, **options: bool) -> Tensor:
    """The weights as pairs of reals, after some steps."""
    model = TwoEncoders(**options)
    monitor = bo.ModalityMonitor(model, {"spectrum": "spectrum", "plain": "plain"}, head="head")
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    held: Any = None
    if method in METHODS:
        optimizer = bo.ModulatedOptimizer(optimizer, monitor, METHODS[method](), seed=1)
    elif method == "OPM":
        held = bo.OPM(monitor, seed=1)
    elif method == "re-learning":
        held = bo.ReLearnScheduler(
            optimizer, monitor, [data(9, 60)], [data(8, 30)], every=2, seed=0, epochs=99
        )
    else:
        held = bo.UnimodalObjective(monitor, 4, seed=1, inject=method.endswith("injected"))
        optimizer.add_param_group({"params": list(held.parameters())})
    for number in range(4):
        x, z, labels = data(number)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, z), labels)
        if method == "uni-modal":
            loss = loss + held(labels)
        loss.backward()
        optimizer.step()
        if method == "re-learning":
            held.step()
    weight = model.spectrum.weight.detach()
    return torch.view_as_real(weight) if weight.is_complex() else weight


@pytest.mark.parametrize("complex_output", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "OPM", "re-learning", "uni-modal", "uni-modal injected"])
def test_every_method_acts_on_complex_weights_as_on_pairs_of_reals(method, complex_output):
    expected = trained(method, complex_weight=False, complex_output=complex_output)
    found = trained(method, complex_weight=True, complex_output=complex_output)
    # Four steps of float32; their sums are taken in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    start = TwoEncoders(complex_weight=False, complex_output=False).spectrum.weight
    assert (found - start).abs().amax() > 0.01


@pytest.mark.parametrize("pool", ["auto", "mean", "max", "flatten"])
def test_complex_features_are_pooled_as_their_parts(pool):
    from balanceopt._pooling import pool_features

    for shape in [(4,), (4, 3), (4, 5, 3), (4, 3, 2, 2)]:
        z = torch.randn(shape, dtype=torch.complex64)
        pooled = pool_features(z, pool)
        assert not pooled.is_complex()
        assert pooled.shape[0] == 4
        parts = [pool_features(part, pool) for part in (z.real, z.imag)]
        # Sums of up to five numbers, in two orders.
        found, expected = (x.flatten().sort().values for x in (pooled, torch.cat(parts, 1)))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
