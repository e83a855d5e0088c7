"""The optimizers of the `pytorch_optimizer` package that step on their own, and where the contract does not hold.

Every exception is a fact about the bare optimizer. Each is tested to be one still, so that a release which mends it is
noticed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_optimizer
import torch

from tests.contract.bases import Base, Groups, classes_of

_CLOSURE = "its step asks for a closure"
_WRAPS = "it wraps an optimizer"
_MODEL = "it takes the model, or steps inside backward"
_PROCESSES = "it needs a process group"
# Not tried: param groups and a step without arguments are not enough for them.
LEFT_OUT = {
    "AliG": _CLOSURE,
    "BSAM": _CLOSURE,
    "LBFGS": "it refuses several param groups",
    "DeMo": _PROCESSES,
    "DistributedMuon": _PROCESSES,
    "SpectralSphere": "it takes matrices alone",
    **dict.fromkeys(("AdaLOMO", "AdamMini", "LOMO"), _MODEL),
    **dict.fromkeys(("FriendlySAM", "GSAM", "LookSAM", "SAM", "WSAM"), f"{_WRAPS}; {_CLOSURE}"),
    **dict.fromkeys(("Lookahead", "OrthoGrad", "PCGrad", "SafeFP16Optimizer"), _WRAPS),
    **dict.fromkeys(("ScheduleFreeWrapper", "TRAC"), _WRAPS),
}

# Their state holds objects that `torch.load(weights_only=True)` refuses.
UNSAFE_STATE = dict.fromkeys(
    ("AdaShift", "Conda", "SCION", "SCIONLight", "ScalableShampoo"), "objects in its state"
)
# Other gradients for one parameter move others too.
GLOBAL = {
    "AdaGC": "clips by a norm over all parameters",
    "Adai": "divides by a mean over all parameters",
    "AdamS": "divides by a sum over all parameters",
    "DAdaptSGD": "one step size from all gradients",
    "LoRARite": "takes parameters for pairs of factors",
}
_ADAPTS = "the step size follows from how far it has moved"
_COPY = "keeps a second copy of its parameters"
# Updates scaled by k move parameters by something else than k.
UPDATE_OTHERWISE = {
    "FTRL": "parameters follow from sums of gradients, wherever they were",
    "LoRARite": "takes parameters for pairs of factors",
    "Nero": "projects parameters after each step",
    **dict.fromkeys(
        ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD", "Prodigy"), _ADAPTS
    ),
    **dict.fromkeys(("A2Grad", "ASGD", "MADGRAD", "Ranger", "Ranger21", "SRMM"), _COPY),
    **dict.fromkeys(("ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD"), _COPY),
}
_OPTIONS: dict[str, dict[str, Any]] = {"A2Grad": {}, "Ranger21": {"lr": 0.01, "num_iterations": 100}}
_MUON = ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")


def _with_muon(groups: Groups) -> Groups:
    """Each group in two: its matrices, and the rest."""
    return [
        {**group, "use_muon": matrices, "params": [p for p in group["params"] if (p.dim() == 2) == matrices]}
        for group in groups
        for matrices in (True, False)
    ]


def make(name: str, groups: Groups) -> torch.optim.Optimizer:
    """One with the options it asks for."""
    kind = getattr(pytorch_optimizer, name)
    made: torch.optim.Optimizer = kind(
        _with_muon(groups) if name in _MUON else groups, **_OPTIONS.get(name, {"lr": 0.01})
    )
    return made


BASES = [
    Base(name, partial(make, name), create_graph=name in ("AdaHessian", "SophiaH"))
    for name in sorted(classes_of(pytorch_optimizer) - set(LEFT_OUT))
]
