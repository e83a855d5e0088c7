"""What every test shares: seeds, threads and the settings of property-based tests."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomised: the same examples on every machine. HYPOTHESIS_PROFILE=seeded takes those of --hypothesis-seed,
# HYPOTHESIS_PROFILE=thorough looks for new ones.
settings.register_profile("default", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("seeded", settings.get_profile("default"), derandomize=False)
settings.register_profile(
    "thorough", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# torch.manual_seed formats the caller's stack three times, for devices that may come: more than a training step takes.
if not torch.accelerator.is_available():
    vars(torch)["manual_seed"] = torch.default_generator.manual_seed

# One thread unless asked otherwise: tests run side by side.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Fixed seeds before each test; dtype, gradient mode and determinism as they were after it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)
