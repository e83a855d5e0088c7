"""Tensors inside what modules return."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from balanceopt.monitor._outputs import feature_tensors, first_tensor, map_tensors, named_tensors, tensors_in
from tests.models import EncoderOutput, Named


@dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    name: str = "x"


@dataclass
class WithDerived:
    hidden: Tensor
    norm: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.norm = self.hidden.norm()


class LikeHuggingFace(OrderedDict):
    """Keys are attributes too."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        for key, value in items.items():
            object.__setattr__(self, key, value)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


X = torch.ones(2, 3)
KINDS: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, None, "text"),
    "list": [None, X],
    "dict": {"mask": None, "x": X},
    "integer keys": {0: X},
    "ordered": OrderedDict(a=X),
    "default": defaultdict(list, a=X),
    "user": UserDict(a=X),
    "read-only": MappingProxyType({"a": X}),
    "attributes": LikeHuggingFace(a=X),
    "named": Named(X, torch.ones(2, dtype=torch.bool)),
    "frozen": Frozen(X),
    "derived": WithDerived(X),
    "nested": {"a": ([X], Frozen(X))},
}


@pytest.mark.parametrize("kind", KINDS)
def test_map_keeps_types_and_structure(kind):
    value = KINDS[kind]
    changed = map_tensors(lambda x: x * 0, value)
    assert type(changed) is (dict if kind == "read-only" else type(value))
    assert len(list(tensors_in(changed))) == len(list(tensors_in(value))) > 0
    assert not any(x.any() for x in tensors_in(changed))
    assert any(x.any() for x in tensors_in(value))
    found = first_tensor(value)
    assert found is X


def test_attributes_follow_keys():
    changed = map_tensors(torch.zeros_like, KINDS["attributes"])
    assert changed.a is changed["a"]


def test_packed_sequences():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    changed = map_tensors(lambda x: torch.zeros_like(x) if x.is_floating_point() else x, packed)
    assert type(changed) is type(packed)
    assert not changed.data.any()
    assert torch.equal(changed.batch_sizes, packed.batch_sizes)


@pytest.mark.parametrize("value", [None, 3, "text", object(), [], {}, Frozen])
def test_nothing_in_it(value):
    assert first_tensor(value) is None
    assert feature_tensors(value) == {}
    assert map_tensors(torch.zeros_like, value) == value


def test_each_tensor_has_a_name():
    y = torch.zeros(2, 5)
    assert [path for path, _ in named_tensors((EncoderOutput(X, y), {"a": [y, None]}, X))] == [
        "0.last_hidden_state",
        "0.pooler_output",
        "1.a.0",
        "2",
    ]
    assert list(feature_tensors({"loss": X.sum(), "mask": X > 0, "z": X})) == ["z"]
