"""Training over ranks that the distributed tests share: a batch cut unevenly, and what may befall a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.models import Concat, Gated, Multimodal, watch
from tests.training import batch, groups_of, sgd, small_model

ROWS = 12
# How many rows of a batch each rank gets. The last one gets a single row: the second of two micro-batches has none.
CUTS = {1: (12,), 2: (11, 1), 4: (6, 3, 2, 1)}
NOTHING = -100

Rows = Sequence[int]
# What befalls the last rank in a step: `(inputs, labels, present)` to the same of its rows.
Part = tuple[list[Tensor], Tensor, dict[str, Tensor]]
Fate = Callable[[int, Part], Part]

METHODS: dict[str, Callable[[], list[bo.modulation.Modulation]]] = {
    "OGM": lambda: [bo.OGM(0.5, noise=False)],
    "OGM-GE": lambda: [bo.OGM(0.5)],
    "OGM update": lambda: [bo.OGM(0.5, noise=False, apply_to="update")],
    "AGM": lambda: [bo.AGM(0.5)],
    "MLB": lambda: [bo.MLB(0.5)],
    "InfoReg": lambda: [bo.InfoReg(scale=0.2)],
    "Fixed": lambda: [bo.FixedModulation({"audio": 0.5, "visual": 1.5})],
    "OPM": list,
    "Dropout": list,
    "AMSS": lambda: [bo.AMSS()],
    "AMSS+": lambda: [bo.AMSS(scale="unbiased")],
    "all": lambda: [bo.OGM(0.5), bo.AMSS()],
}
DROPPING = {"OPM": bo.OPM, "all": bo.OPM, "Dropout": bo.ModalityDropout}


def rows_of(rank: int, ranks: int) -> Rows:
    """The rows of a batch that a rank gets."""
    first = sum(CUTS[ranks][:rank])
    return range(first, first + CUTS[ranks][rank])


def whole(x: Tensor) -> Tensor:
    """A copy of a tensor that may be sharded."""
    full = getattr(x, "full_tensor", None)
    return (x if full is None else full()).detach().clone()


def misfortunes(number: int, given: Part) -> Part:
    """In turn: nothing, no valid label, a modality that no sample has."""
    inputs, labels, present = given
    if number % 4 == 1:
        labels = torch.full_like(labels, NOTHING)
    if number % 4 == 2:
        inputs = [inputs[0], torch.zeros_like(inputs[1])]
        present = {"visual": torch.zeros(len(labels), dtype=torch.bool)}
    return inputs, labels, present


class Run:
    """One model in training by a method.

    Args:
        method: of `METHODS`, or "bare".
        wrap: what makes the module to call, and may shard the model in place.
        rank: whose rows it trains on.
        ranks: over how many the batch is cut.
        base: makes the base optimizer.
        model: to train.
        monitor: options of the monitor.
        options: of the modulator.
    """

    def __init__(
        self,
        method: str,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
        *,
        rank: int = 0,
        ranks: int = 1,
        base: Any = sgd,
        model: Multimodal | None = None,
        monitor: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        seed: int | None = 5,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.model = small_model() if model is None else model
        self.caller: Any = wrap(self.model)
        self.monitor = watch(self.model, **(monitor or {}))
        drops = DROPPING.get(method)
        self.modulator = None if drops is None else drops(self.monitor, seed=seed, **(options or {}))
        self.optimizer: torch.optim.Optimizer = base(groups_of(self.model), momentum=0.9)
        modulations = METHODS.get(method, list)()
        if modulations:
            self.optimizer = bo.ModulatedOptimizer(self.optimizer, self.monitor, modulations, seed=seed)
        self.qs: list[Tensor] = []

    def train(self, steps: int, *, first: int = 0, fate: Fate | None = misfortunes) -> Run:
        for number in range(first, first + steps):
            if number % 5 == 0 and isinstance(self.optimizer, bo.ModulatedOptimizer):
                self.optimizer.set_epoch(number // 5)
            self.optimizer.zero_grad()
            micro = 2 if number % 4 == 3 else 1  # every fourth step accumulates two micro-batches
            for place in range(micro):
                last = place == micro - 1
                with nullcontext() if last else self.without_sync():
                    self.backward(self.part(number, slice(place, None, micro), fate))
            self.optimizer.step()
            if isinstance(self.modulator, bo.OPM):
                self.qs.append(self.modulator.q)
        return self

    def part(self, number: int, rows: slice, fate: Fate | None) -> Part:
        """This rank's rows of a batch; all ranks' where it is alone."""
        inputs, labels = batch(number, self.model, size=ROWS)
        parts: list[Part] = []
        ranks = self.ranks if self.ranks > 1 else self.alone_for
        for rank in range(ranks):
            own = list(rows_of(rank, ranks))
            part: Part = ([x[own] for x in inputs], labels[own], {"visual": torch.ones(len(own)).bool()})
            parts.append(fate(number, part) if fate is not None and rank == ranks - 1 else part)
        chosen = parts[self.rank : self.rank + 1] if self.ranks > 1 else parts
        return (
            [torch.cat([part[0][m][rows] for part in chosen]) for m in range(len(inputs))],
            torch.cat([part[1][rows] for part in chosen]),
            {"visual": torch.cat([part[2]["visual"][rows] for part in chosen])},
        )

    alone_for = 1

    def backward(self, given: Part) -> None:
        """A sum over the rows of all ranks: DDP takes the mean over ranks."""
        inputs, labels, present = given
        if present:
            self.monitor.observe(labels, present=present)
        loss = F.cross_entropy(self.caller(*inputs), labels, reduction="sum")
        (loss * self.ranks / ROWS).backward()

    @contextmanager
    def without_sync(self) -> Iterator[None]:
        """A micro-batch whose gradients stay on this rank."""
        if isinstance(self.caller, DistributedDataParallel):
            with self.caller.no_sync():
                yield
            return
        sync = getattr(self.caller, "set_requires_gradient_sync", lambda wanted: None)
        sync(False)
        yield
        sync(True)

    def parameters(self) -> dict[str, Tensor]:
        return {name: whole(p) for name, p in self.model.named_parameters()}

    def told(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters(),
            "q": torch.stack(self.qs) if self.qs else torch.zeros(1),
            "stats": getattr(self.optimizer, "stats", dict)(),
        }


def alone(
    method: str, steps: int, ranks: int, *, fate: Fate | None = misfortunes, **options: Any
) -> dict[str, Any]:
    """What one process makes of the batches that `ranks` ranks had between them."""
    run = Run(method, **options)
    run.alone_for = ranks
    return run.train(steps, fate=fate).told()


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest of any parameter."""
    return max(float((a["parameters"][n] - b["parameters"][n]).abs().max()) for n in a["parameters"])


COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast",
    "broadcast_object_list",
    "reduce_scatter_tensor",
    "barrier",
)


@contextmanager
def counting_collectives() -> Iterator[list[tuple[str, int]]]:
    """Names of the collectives called from Python inside, and how many numbers went through each."""
    calls: list[tuple[str, int]] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, tensor.numel() if isinstance(tensor, Tensor) else -1))
            return function(tensor, *args, **kwargs)

        return call

    own: dict[str, Any] = {name: noted(name, getattr(dist, name)) for name in COLLECTIVES}
    with mock.patch.multiple(dist, **own):
        yield calls


def gated() -> Gated:
    """A fusion whose uni-modal logits take `zero-out`; the same one each time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return Gated()


class MayLack(Concat):
    """Runs no encoder for a modality whose input has no columns: its features are zeros."""

    def encode(self, *inputs: Tensor) -> list[Tensor]:
        pairs = zip(self.encoders.values(), inputs, self.widths, strict=True)
        return [encoder(x) if x.shape[1] else torch.zeros(len(inputs[0]), d) for encoder, x, d in pairs]


def shard(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """`fully_shard` on each encoder, the head and the whole: shards that are uneven, and some that are empty."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for part in (*model.get_submodule("encoders").children(), model.get_submodule("head"), model):
        fully_shard(part, mesh=mesh, **options)
    return model


def shard_encoders(model: Any) -> Any:
    """`fully_shard` on each encoder and the whole, which has the head as its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.modalities.values(), model):
        fully_shard(part, mesh=mesh)
    return model
