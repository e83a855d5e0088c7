"""What the frameworks' modules say where their framework is not installed."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_framework_names_the_extra(name, monkeypatch):
    module = f"balanceopt.integrations.{name}"
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'balanceopt\[{name}\]'"):
        importlib.import_module(module)


def test_the_package_of_callbacks_needs_no_framework(monkeypatch):
    for name in ("lightning", "transformers", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    assert importlib.import_module("balanceopt.integrations").__all__ == []
