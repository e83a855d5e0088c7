"""Base optimizers whose update does not depend on a constant factor of the gradients."""

from __future__ import annotations

import torch

from balanceopt._undo import optimizers_in

# Optimizers that normalise by the gradient's size, element by element (Adam and similar) or as a matrix (Muon).
_CANCELLING = frozenset(
    {
        "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop",
        "Adafactor", "Muon", "AdaBelief", "AdaBound", "AdaMod", "AdamP", "DiffGrad", "Lamb",
        "LARS", "MADGRAD", "NovoGrad", "QHAdam", "Ranger", "RangerQH", "RangerVA", "SWATS", "Shampoo", "Yogi", "Lion",
        "A2GradExp", "A2GradInc", "A2GradUni",
    }
)  # fmt: skip

# Such optimizers of the `pytorch_optimizer` package, measured by tests/contract/test_pytorch_optimizer.py.
_CANCELLING_TOO = frozenset(
    {
        "A2Grad", "ADOPT", "APOLLO", "AdEMAMix", "AdaDelta", "AdaFactor", "AdaGC", "AdaGO", "AdaMax", "AdaMuon",
        "AdaNorm", "AdaPNM", "AdaShift", "AdaSmooth", "AdaTAM", "Adalite", "AdamC", "AdamG", "AdamS", "AdamWSN",
        "Adan", "Aida", "Alice", "Amos", "Ano", "BCOS", "CAME", "Conda", "DASH", "DAdaptAdaGrad", "DAdaptAdam",
        "DAdaptAdan", "DAdaptLion", "DualAdam", "EXAdam", "EmoFact", "EmoLynx", "EmoNavi", "FAdam", "FOCUS",
        "FTRL", "Fira", "FlashAdamW", "Fromage", "GaLore", "Grams", "Gravity", "GrokFastAdamW", "Kate",
        "LaProp", "LoRARite", "MARS", "Nero", "NorMuon", "PAdam", "Prodigy", "RACS", "ROSE", "Ranger21",
        "SCION", "SCIONLight", "SM3", "SOAP", "SPAM", "SPlus", "SaRA", "ScheduleFreeAdamW", "ScheduleFreeRAdam",
        "SignSGD", "SimplifiedAdEMAMix", "SophiaH", "StableAdamW", "StableSPAM", "Tiger", "VSGD",
    }
)  # fmt: skip


def cancels_constant_factor(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a constant factor on every gradient leaves the optimizer's update unchanged."""
    kinds = [kind for inner in optimizers_in(optimizer) for kind in type(inner).__mro__]
    return any(kind.__name__ in _CANCELLING | _CANCELLING_TOO for kind in kinds)
