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
# What they keep beside `param_groups` the wrapper puts into its copies, but not this.
NOT_COPIED = {
    "ADOPT": "keeps a function",
    "AdaShift": "keeps a function",
    "Magma": "is around another optimizer",
}
# Other gradients for one parameter move others too.
GLOBAL = {
    "AdaGC": "clips by a norm over all parameters",
    "Adai": "divides by a mean over all parameters",
    "AdamS": "divides by a sum over all parameters",
    "DAdaptSGD": "one step size from all gradients",
    "LoRARite": "takes parameters for pairs of factors",
}
_GROUP_LISTS = "keeps a list with an entry for each group"
# `apply_to="lr"` is refused, saying why.
LR_REFUSED = {
    "A2Grad": "no learning rate",
    "AdaBound": _GROUP_LISTS,
    "AdaFactor": "makes its own learning rate",
    "ApolloDQN": "warms up to a learning rate of its own",
    "SRMM": _GROUP_LISTS,
    "ScheduleFreeAdamW": _GROUP_LISTS,
    "ScheduleFreeSGD": _GROUP_LISTS,
}
_ADAPTS = "the step size follows from how far it has moved"
# A learning rate times k moves parameters by something else than k.
LR_OTHERWISE = {
    "ASGD": "it sets its learning rate anew in each step",
    "AdaGO": "a lower bound of the step",
    "Gravity": "the learning rate sets how its momentum begins",
    "LoRARite": "takes parameters for pairs of factors",
    "MADGRAD": "moves by the power 2/3",
    **dict.fromkeys(("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "Prodigy"), _ADAPTS),
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
