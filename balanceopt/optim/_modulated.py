"""ModulatedOptimizer: any optimizer, with a method in front of its step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from balanceopt.modulation import OGM, Modulation
from balanceopt.monitor import ModalityMonitor
from balanceopt.optim._wrapper import WrappedOptimizer


class ModulatedOptimizer(WrappedOptimizer):
    r"""Drop-in wrapper that balances modalities with any `torch.optim.Optimizer`.

    $$\theta \leftarrow \text{step}(\theta, \text{modulation}(g; \text{scores}))$$

    Before each step of the base optimizer the modulation changes the gradients of the modalities' encoders, in place,
    by the scores that the monitor saw in the passes these gradients came from. Where there is none, the step is the
    base optimizer's.

    Args:
        optimizer: the base. Its groups may carry `"modality"` tags; without them a parameter belongs to the encoder
            that holds it.
        monitor: a `ModalityMonitor` on the model that the optimizer trains, built with a head.
        modulation: the method, `OGM()` (that is OGM-GE) by default, or several to act in order.
        seed: of all randomness, which is a function of (seed, step, parameter); None for what an earlier wrapper or a
            checkpoint left in the groups, else `torch.initial_seed()` of the first rank, read now.
        strict: raise after ten steps in a row without any score; False to warn only.

    Raises:
        ValueError: if the optimizer is modulated already, or does not train the monitor's model.
        KeyError: if groups are tagged with modalities that the monitor does not have.
        NotImplementedError: for differentiable, in-backward and FSDP1 optimizers.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b", "head")})
        >>> encoders = {"a": model["a"], "b": model["b"]}
        >>> optimizer = torch.optim.SGD(bo.modality_groups(model, encoders), lr=0.1)
        >>> monitor = bo.ModalityMonitor(model, encoders, head=model["head"])
        >>> isinstance(bo.ModulatedOptimizer(optimizer, monitor, bo.OGM(noise=False)), torch.optim.Optimizer)
        True

    Reference:
        docs/concepts.md; the method's own reference.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        monitor: ModalityMonitor,
        modulation: Modulation | Sequence[Modulation] | None = None,
        *,
        seed: int | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__(
            optimizer, monitor, OGM() if modulation is None else modulation, seed=seed, strict=strict
        )
