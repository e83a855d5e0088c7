"""Callbacks for training frameworks, each in a module of its own that imports its framework.

`balanceopt.integrations.lightning.BalanceCallback`, `balanceopt.integrations.transformers.BalanceCallback`. Fabric and
Accelerate leave the loop to you and take a `ModulatedOptimizer` as it is: docs/integrations.md.
"""

__all__: list[str] = []
