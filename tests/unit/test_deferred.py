"""Counters that live on a device: read at once on the host, and elsewhere only when they have arrived."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from balanceopt._deferred import DeferredCounts, on_host


def test_on_host_reads_in_place():
    x = torch.ones(2, requires_grad=True)
    host = on_host(x)
    assert host is not None
    with torch.no_grad():
        x.zero_()
    assert host.tolist() == [0, 0]
    assert on_host(torch.ones(2, device="meta")) is None


def test_half_precision():
    half = on_host(torch.ones(2, dtype=torch.bfloat16))
    assert half is not None
    assert half.tolist() == [1, 1]


def counter() -> tuple[DeferredCounts, list[dict[str, int]]]:
    seen: list[dict[str, int]] = []
    return DeferredCounts(("rows", "odd"), seen.append), seen


def test_any_name_is_counted():
    counts = DeferredCounts()
    counts.add(new=torch.tensor(2))
    counts.add(new=torch.tensor(1), other=torch.tensor(True))
    assert counts.read() == {"new": 3, "other": 1}


def test_on_the_host_they_are_seen_at_once():
    counts, seen = counter()
    assert counts.read() == {"rows": 0, "odd": 0}
    counts.add(rows=torch.tensor(3), odd=torch.tensor(True))
    counts.add(rows=torch.tensor(2), odd=torch.tensor(False))
    assert seen == [{"rows": 3, "odd": 1}, {"rows": 5, "odd": 1}]
    assert counts.read() == seen[-1]


class Event:
    """An accelerator's event that is done when the test says so."""

    done = False

    def __init__(self, device: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return Event.done


@pytest.fixture
def _accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr("balanceopt._deferred.on_host", lambda tensor: None)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(Event, "done", False)


@pytest.mark.usefixtures("_accelerator")
def test_elsewhere_they_are_seen_when_they_have_arrived():
    counts, seen = counter()
    for _ in range(3):
        counts.add(rows=torch.tensor(1), odd=torch.tensor(0))
    assert seen == []
    Event.done = True
    counts.add(rows=torch.tensor(1), odd=torch.tensor(0))
    assert seen == [{"rows": 1, "odd": 0}]  # what was sent first
    counts.add(rows=torch.tensor(1), odd=torch.tensor(0))
    assert seen[-1] == {"rows": 4, "odd": 0}
    assert counts.read() == {"rows": 5, "odd": 0}


@pytest.mark.usefixtures("_accelerator")
def test_a_copy_waits_for_nothing():
    counts, _ = counter()
    counts.add(rows=torch.tensor(1), odd=torch.tensor(0))
    twin = copy.deepcopy(counts)
    twin.add(rows=torch.tensor(1), odd=torch.tensor(0))
    assert twin.read()["rows"] == 2
    assert counts.read()["rows"] == 1
