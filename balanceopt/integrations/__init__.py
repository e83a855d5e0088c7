"""Callbacks for training frameworks, in one module for each framework.

`balanceopt.integrations.lightning.BalanceCallback`, `balanceopt.integrations.transformers.BalanceCallback`. Fabric and
Accelerate leave the training loop to the user and take a `ModulatedOptimizer` without a callback: docs/integrations.md.
"""

__all__: list[str] = []
