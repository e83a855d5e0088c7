"""On an accelerator nothing in a forward asks for a number: the host never waits. The same samples are dropped."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import balanceopt as bo
from tests.dropping import inputs_of
from tests.models import batch, train_step, watch
from tests.training import small_model

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}


class NoWaiting(TorchDispatchMode):
    """Raises where an operation would make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


def run(options, monitor, method=bo.OPM):
    torch.manual_seed(0)
    model = small_model(3)
    modulator = method(watch(model, **monitor), seed=1, **options)
    with inputs_of(model.head) as seen:
        for number in range(4):
            inputs, labels = batch(8, 3)
            modulator.monitor.observe(labels)
            if number < 2:  # the first batch finds the columns by comparing numbers
                train_step(model, inputs, labels)
            else:
                with NoWaiting():
                    train_step(model, inputs, labels)
    return torch.stack(seen)


@pytest.mark.parametrize("monitor", [{}, {"scores": "zero-out"}], ids=["split", "zero-out"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (bo.OPM, {}),
        (bo.OPM, {"rescale": "official"}),
        (bo.ModalityDropout, {"p": 0.5}),
        (bo.ModalityDropout, {"p": "equal"}),
    ],
    ids=str,
)
def test_a_forward_does_not_wait(method, options, monitor):
    on_host = run(options, monitor, method)
    modules = ("_drop", "_modulator")
    patches = [mock.patch(f"balanceopt.prediction.{m}.on_host", return_value=None) for m in modules]
    for patch in patches:
        patch.start()
    try:
        on_device = run(options, monitor, method)
    finally:
        for patch in patches:
            patch.stop()
    assert torch.equal(on_host, on_device)
    assert (on_host == 0).any()
