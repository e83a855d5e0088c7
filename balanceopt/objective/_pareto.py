"""MMPareto: joint and uni-modal gradients combined so that no encoder's step works against either loss."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from balanceopt._method import Unit
from balanceopt._options import check_choice, check_kind, check_number
from balanceopt._sharding import is_sharded
from balanceopt.functional import combined_gradient, gradient_products, pareto_coefficients
from balanceopt.modulation import Modulation, StepContext
from balanceopt.monitor import ModalityMonitor, Pass, WeakHook, is_differentiable, map_tensors
from balanceopt.objective._objective import UnimodalObjective

Scope = Literal["output", "encoder"]


class MMPareto(Modulation):
    r"""MMPareto: combine each encoder's joint and uni-modal gradient so that a step lowers both losses.

    $$h^m = \gamma \max\left(1, \frac{|j^m + u^m|}{|h_0^m|}\right) h_0^m, \qquad
    h_0^m = 2 a^m j^m + 2 (1 - a^m) u^m$$

    with the joint loss's gradient j, the uni-modal loss's gradient u, and a = 1/2 where they agree; where they
    conflict, \(\langle j, u\rangle \le 0\), h is along the shortest vector between them. Without a conflict this is the
    objective's gradient times \(\gamma\). Heads and fusion are as without it.

    It acts during backward, in steps of its window, for an objective with `inject=True`. Each backward is judged by
    itself: with accumulation each micro-batch, with several ranks each rank's part of the batch.

    Args:
        objective: a `UnimodalObjective(inject=True)` on the optimizer's monitor.
        gamma: factor on the gradients of the encoders, >= 0.
        scope: `"encoder"` compares the gradients of an encoder's parameters, by two more backwards through the encoder;
            `"output"` those at the encoder's output, without any.
        start: first step or epoch of the window, counted from 0.
        end: last step or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"`, or `"epoch"`, set by `set_epoch`.

    Raises:
        ValueError: for an option outside its range, an objective without `inject=True` or with a share `joint` below 1;
            when the optimizer is built, for another monitor than the objective's.
        TypeError: if `objective` is no `UnimodalObjective`.
        NotImplementedError: for `scope="encoder"` with sharded encoders.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b", "head")})
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"}, head="head")
        >>> objective = bo.UnimodalObjective(monitor, out_features=5, inject=True)
        >>> bo.MMPareto(objective, gamma=1.5)
        MMPareto(gamma=1.5, scope='encoder', start=0, end=None, unit='step')

    Reference:
        Wei, Hu, MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance, ICML 2024;
        docs/methods/mmpareto.md.
    """

    needs_scores = False

    def __init__(
        self,
        objective: UnimodalObjective,
        *,
        gamma: float = 1.5,
        scope: Scope = "encoder",
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
    ) -> None:
        check_kind("`objective`", objective, UnimodalObjective, "a UnimodalObjective")
        super().__init__(start=start, end=end, unit=unit)
        check_number("gamma", gamma, at_least=0)
        check_choice("scope", scope, get_args(Scope))
        if objective.injection is None or objective.joint != 1:
            raise ValueError(
                "`objective` should be built with inject=True and joint=1, so that both gradients meet at the "
                f"encoders' outputs. Found inject={objective.inject} and joint={objective.joint:g}."
            )
        params = [p for own in objective.monitor.parameters.values() for p in own]
        if scope == "encoder" and any(is_sharded(p) for p in params):
            raise NotImplementedError(
                "scope='encoder' is not supported for sharded encoders: their gradients are made on other tensors. Use "
                "scope='output'."
            )
        self.gamma = float(gamma)
        self.scope: Scope = scope
        self._objective = objective
        self._weights: dict[str, Tensor] = {}
        self._acted = False
        objective.monitor.hooks.links.add(self._on_output)

    def check(self, optimizer: torch.optim.Optimizer, monitor: ModalityMonitor) -> None:
        """Raise for another monitor than the objective's."""
        if monitor is not self._objective.monitor:
            raise ValueError(
                "`monitor` should be the one that MMPareto's objective was built with. Found another."
            )

    def acts_on(self, objective: UnimodalObjective) -> bool:
        """Whether this method is part of an optimizer, and combines the gradients of `objective`."""
        return self._objective is objective and self.engine is not None and self.engine() is not None

    def modulate(self, step: StepContext) -> None:
        """Report the joint gradients' weights; the gradients themselves were combined in backward."""
        if self._weights:
            half = torch.full((), 0.5, dtype=torch.float32, device=next(iter(self._weights.values())).device)
            weights = [self._weights.get(name, half).to(half) for name in step.modalities]
            step.report("joint_weight", torch.stack(weights))
            self._weights.clear()

    def remove(self) -> None:
        """Remove the hooks; the objective stays. May be called twice."""
        super().remove()
        self._objective.monitor.hooks.links.drop(self._on_output)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is inert, because hooks exist on the original monitor's model only.
        return {**super().__getstate__(), "_weights": {}, "removed": True}

    def _on_output(self, name: str, current: Pass, output: Any) -> Any:
        """Return a copy of an encoder's output, where the joint gradient meets the uni-modal one."""
        engine = None if self.engine is None else self.engine()
        injection = self._objective.injection
        if engine is None or injection is None or not self._objective.weight[name]:
            return output
        if not self.is_open(engine.number):
            return output
        if not self._acted:
            self._refuse_second()
            self._acted = True
        extras, indices = injection.extras_of(current, name), count()

        def hooked(x: Tensor) -> Tensor:
            if not is_differentiable(x):
                return x
            index = next(indices)
            if not x.requires_grad:
                return x
            result = x.clone()  # modules after it may change it in place
            result.register_hook(partial(WeakHook(self._combine, name, extras, index), x))
            return result

        return map_tensors(hooked, output)

    def _refuse_second(self) -> None:
        for link in self._objective.monitor.hooks.links:
            other = getattr(link, "__self__", None)
            if isinstance(other, MMPareto) and other is not self and other.acts_on(self._objective):
                raise RuntimeError(
                    "two MMPareto combine the gradients of one objective. Call remove() on one of them, or on its "
                    "optimizer."
                )

    def _combine(
        self, name: str, extras: list[Tensor | None], index: int, output: Tensor, joint: Tensor
    ) -> Tensor | None:
        """Return the combined gradient at a tensor of an encoder's output; None for no uni-modal gradient there."""
        unimodal = extras[index] if extras else None
        if unimodal is None:
            return None
        extras[index] = None
        unimodal = unimodal.to(joint.dtype)
        if self.scope == "encoder":
            sums = gradient_products(*self._of_parameters(name, output, joint, unimodal))
        else:
            sums = gradient_products([joint], [unimodal])
        of_joint, of_unimodal = pareto_coefficients(*sums, self.gamma)
        self._weights[name] = (of_joint / (of_joint + of_unimodal)).nan_to_num(0.5)
        return combined_gradient(joint, unimodal, of_joint, of_unimodal)

    def _of_parameters(
        self, name: str, output: Tensor, *gradients: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the encoder's parameters' gradients that belong to two gradients at its output."""
        params = [p for p in self._objective.monitor.parameters[name] if p.requires_grad]
        joint, unimodal = (
            torch.autograd.grad(output, params, gradient, retain_graph=True, allow_unused=True)
            for gradient in gradients
        )
        pairs = [(j, u) for j, u in zip(joint, unimodal, strict=True) if j is not None and u is not None]
        if not pairs:
            raise RuntimeError(
                f"the output of the encoder of {name!r} has no gradient to the encoder's parameters in this process. "
                "Use MMPareto(scope='output')."
            )
        return tuple(j for j, _ in pairs), tuple(u for _, u in pairs)
