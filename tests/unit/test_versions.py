"""`show_versions`, which an issue asks for."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError

import pytest
import torch

import balanceopt as bo
from balanceopt import _versions


def lines() -> dict[str, str]:
    return dict(line.split(": ", 1) for line in bo.show_versions().splitlines())


def test_versions_and_processor():
    shown = lines()
    assert shown["balanceopt"] == bo.__version__
    assert shown["Python"].startswith(platform.python_version())
    assert shown["torch"].startswith(torch.__version__)
    assert torch.backends.cpu.get_cpu_capability() in shown["processor"]


def test_frameworks_that_are_not_installed(monkeypatch):
    def version(package):
        if package == "lightning":
            return "2.6.6"
        raise PackageNotFoundError(package)

    monkeypatch.setattr(_versions, "version", version)
    shown = lines()
    assert shown["lightning"] == "2.6.6"
    assert shown["transformers"] == shown["accelerate"] == "not installed"


@pytest.mark.parametrize(
    ("kind", "names", "expected"),
    [(None, [], "cpu"), ("mps", [], "1 x mps"), ("cuda", ["H100", "H100"], "2 x cuda H100")],
)
def test_devices(monkeypatch, kind, names, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(names) or 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    assert lines()["devices"] == expected
