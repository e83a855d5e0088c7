"""What a fusion keeps of its forward is that of the unwatched model: a replay and a live head leave no trace."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import balanceopt as bo
from tests.models import Gated, MLPHead, SumHeads, batch, watch


class Keeping(Gated):
    """A fusion that calls `keep(self, fused)` and may use what it kept."""

    keep = staticmethod(lambda self, fused: None)

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.own = Memory()
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("late", None)
        self.state = torch.zeros(4)
        self.step = 0
        self.terms: list[Any] = []
        self.shared = self.terms
        self.by_name = {"a": [], "b": {"c": [0]}}
        self.ordered = OrderedDict(x=1, y=2)
        self.counter: Counter[str] = Counter()
        self.groups = defaultdict(list)
        self.recent: deque[int] = deque(maxlen=2)
        self.kinds: set[Any] = {"none"}
        self.pair: tuple[list[Any], dict[str, Any]] = ([], {})
        self.array = np.zeros(2)
        self.torch_stream = torch.Generator().manual_seed(3)
        self.python_stream = random.Random(3)
        self.numpy_stream = np.random.default_rng(3)

    def fuse(self, features):
        features = [z + 0 for z in features]
        type(self).keep(self, features[0])
        return super().fuse(features)


class Memory:
    """A plain object of the model's own file."""

    def __init__(self):
        self.calls, self.terms, self.rows = 0, [], torch.zeros(2)

    def note(self, x):
        self.calls += 1
        self.terms.append(x.mean())
        self.rows += x.mean().detach()


def aux(self, x):
    p = self.router(x).softmax(-1)
    return 3 * (p.mean(0) ** 2).sum()


def keep_attribute(self, x):
    self.aux = aux(self, x)


def keep_in_list(self, x):
    self.terms.append(aux(self, x))


def keep_in_dict(self, x):
    self.by_name["aux"] = aux(self, x)
    self.by_name["a"].append(aux(self, x))
    self.by_name["b"]["c"][0] += 1


def count_in_buffer(self, x):
    with torch.no_grad():
        self.seen += torch.bincount(self.router(x).argmax(-1), minlength=3)


def new_buffer(self, x):
    self.seen = self.seen * 0.5 + x.detach().mean()


def late_buffer(self, x):
    self.late = x.detach().mean(0) if self.late is None else self.late.lerp(x.detach().mean(0), 0.5)


def buffer_through_data(self, x):
    self.seen.data.add_(x.detach().mean())


def carry_state(self, x):
    x += self.state
    self.state = 0.5 * x.detach().mean(0)


def state_in_place(self, x):
    self.state.mul_(0.5).add_(x.detach().mean(0))


def count_plain(self, x):
    self.step += 1


def forget(self, x):
    self.__dict__.pop("scratch", None)
    if not self.training:
        self.scratch = x
        del self.step


def other_containers(self, x):
    self.counter["calls"] += 1
    self.groups[self.counter["calls"]].append(x.mean())
    self.recent.append(self.counter["calls"])
    self.kinds.add(self.counter["calls"])
    self.pair[0].append(1)
    self.pair[1]["last"] = x.mean()
    self.ordered.move_to_end("x" if self.counter["calls"] % 2 else "y")


def arrays(self, x):
    self.array += float(x.detach().mean())


def streams(self, x):
    x *= (
        torch.rand((), generator=self.torch_stream) + self.python_stream.random() + self.numpy_stream.random()
    )


def own_object(self, x):
    self.own.note(x)


def weights(self, x):
    with torch.no_grad():  # as nn.Embedding(max_norm=) does
        self.router.bias.mul_(0.9).add_(x.mean())


KEEPS = [
    keep_attribute, keep_in_list, keep_in_dict, count_in_buffer, new_buffer, late_buffer, buffer_through_data,
    carry_state, state_in_place, count_plain, forget, other_containers, arrays, streams, own_object, weights,
]  # fmt: skip


def plain(value):
    """A value in which tensors are numbers."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist(), value.requires_grad
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [plain(item) for item in value]
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, Memory):
        return plain(vars(value))
    return None if isinstance(value, nn.Module) else value


def after_training(make, watched, act):
    """What a model keeps, its gradients and logits, after three steps in which the loop uses the kept terms."""
    torch.manual_seed(0)
    model = make()
    monitor = watch(model) if watched else None
    scores = monitor.scores() if monitor else None
    logits = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        inputs, labels = batch(8)
        optimizer.zero_grad()
        logits.append(model(*inputs))
        loss = F.cross_entropy(logits[-1], labels)
        terms = [v for v in (getattr(model, "aux", None), *model.terms[-1:]) if v is not None]
        (loss + 5.0 * sum(terms) if terms else loss).backward()
        assert scores is None or scores.take() is not None
        optimizer.step()
    if watched and act is not None:
        act(model, monitor)
    kept = {k: plain(v) for k, v in vars(model).items() if "hooks" not in k}
    return {**kept, "weights": plain(model.state_dict()), "logits": plain(logits)}


@pytest.mark.parametrize("keep", KEEPS)
def test_a_replay_leaves_no_trace(keep):
    make = type("Kept", (Keeping,), {"keep": staticmethod(keep)})
    make.__module__ = __name__
    unwatched = after_training(make, False, None)
    watched = after_training(make, True, None)
    for name, value in unwatched.items():
        assert watched[name] == value, name


@pytest.mark.parametrize("keep", KEEPS[:-1])  # a weight that a forward writes to changes in any validation
def test_a_diagnosis_leaves_no_trace(keep):
    def diagnose(model, monitor):
        inputs, labels = batch(8)
        loader = [(*inputs, labels.clamp(max=1))]
        before = copy.deepcopy({k: plain(v) for k, v in vars(model).items() if "hooks" not in k})
        bo.diagnose(loader, loader, monitor=monitor, seed=0)
        assert {k: plain(v) for k, v in vars(model).items() if "hooks" not in k} == before

    make = type("Kept", (Keeping,), {"keep": staticmethod(keep)})
    make.__module__ = __name__
    after_training(make, True, diagnose)


def test_originals_stay_the_same_objects():
    model = type("Kept", (Keeping,), {"keep": staticmethod(other_containers)})()
    inputs, labels = batch(8)
    model(*inputs)
    before = {**vars(model), **model._buffers}
    with watch(model) as monitor:
        scores = monitor.scores()
        F.cross_entropy(model(*inputs), labels).backward()
        assert scores.take() is not None
    assert all(value is before[name] for name, value in {**vars(model), **model._buffers}.items())


def test_each_modality_is_scored_from_the_same_state():
    class Carried(Gated):
        state = 0.0

        def fuse(self, features):
            fused = super().fuse([z + self.state for z in features])
            if not self.training:
                self.state = self.state + 100.0
            return fused

    model = Carried()
    inputs, labels = batch(8)
    with watch(model) as monitor:
        scores = monitor.scores()
        F.cross_entropy(model(*inputs), labels).backward()
        taken = scores.take()
    assert taken is not None
    model.eval()
    a, b = model.encode(*inputs)
    for i, features in enumerate(([a, torch.zeros_like(b)], [torch.zeros_like(a), b])):
        model.state = 0.0
        expected = model.fuse(features).softmax(-1).gather(1, labels[:, None]).sum()
        torch.testing.assert_close(taken.score[i], expected.detach())


@pytest.mark.parametrize("where", ["attribute", "list", "input"])
def test_what_can_not_be_put_back_is_refused(where):
    class Writing(Gated):
        def __init__(self):
            super().__init__()
            self.mark, self.marks = torch.zeros(3), [torch.zeros(3)]

        def forward(self, *inputs):
            if not self.training:
                {"attribute": self.mark, "list": self.marks[0], "input": inputs[0]}[where].add_(1)
            return super().forward(*inputs)

    model = Writing()
    name = {"attribute": "Writing.mark", "list": "Writing.marks.0", "input": "its inputs"}[where]
    inputs, _ = batch(8)
    with watch(model) as monitor:
        monitor.scores()
        held = monitor.scores()
        with pytest.raises(RuntimeError, match=rf"changes {name} in place in eval mode.*Make it a buffer"):
            model(*inputs)
        assert held.take() is None
    assert all(module.training for module in model.modules())


def test_inputs_that_are_written_to_are_those_of_one_forward():
    class Scaling(Gated):
        def forward(self, *inputs):
            return super().forward(*(x.mul_(0.5) for x in inputs))

    model = Scaling()
    inputs, labels = batch(8)
    expected = [x * 0.5 for x in inputs]
    with watch(model) as monitor:
        scores = monitor.scores()
        F.cross_entropy(model(*inputs), labels).backward()
        assert scores.take() is not None
    torch.testing.assert_close(inputs, expected)


def test_an_encoder_output_that_the_model_writes_into():
    """As Transformers' CLIP does: the projected features stand where the encoder's own stood."""

    class Projecting(Gated):
        def __init__(self):
            super().__init__(encoder=lambda n, d: Boxed(nn.Linear(n, 6)))
            self.project = nn.Linear(6, 4)

        def encode(self, *inputs):
            outputs = [encoder(x) for encoder, x in zip(self.encoders.values(), inputs, strict=True)]
            for output in outputs:
                output["features"] = self.project(output["features"])
            return [output["features"] for output in outputs]

    class Boxed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return {"features": self.inner(x)}

    model: Any = Projecting()
    inputs, labels = batch(8)
    with watch(model) as monitor:
        scores = monitor.scores()
        for _ in range(2):
            F.cross_entropy(model(*inputs), labels).backward()
            taken = scores.take()
    assert taken is not None
    raw = [encoder.inner(x) for encoder, x in zip(model.encoders.values(), inputs, strict=True)]
    for i in range(2):
        alone = [model.project(z if j == i else torch.zeros_like(z)) for j, z in enumerate(raw)]
        expected = model.fuse(alone).softmax(-1).gather(1, labels[:, None]).sum()
        torch.testing.assert_close(taken.score[i], expected.detach())


def test_a_live_head_leaves_no_trace():
    """The shared head that UnimodalObjective runs once more in training mode."""

    class Late(SumHeads):
        def __init__(self):
            super().__init__()
            for name in self.names:
                head = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), Counting(4, 5))
                self.own_heads[name] = head

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            self.kept = super().forward(x)
            return self.kept

    found = []
    for added in (False, True):
        torch.manual_seed(0)
        model: Any = Late()
        with watch(model) as monitor:
            objective = bo.UnimodalObjective(monitor, 5, heads="shared")
            for _ in range(2):
                inputs, labels = batch(8)
                loss = F.cross_entropy(model(*inputs), labels)
                if added and monitor.stats()["passes"]:
                    extra = objective(labels)
                    assert extra.requires_grad
                loss.backward()
        heads = model.own_heads.values()
        found.append(SimpleNamespace(
            buffers=plain(list(model.buffers())),
            calls=[head[2].calls for head in heads],
            kept=[head[2].kept.requires_grad and plain(head[2].kept) for head in heads],
            stream=torch.get_rng_state().tolist(),
        ))  # fmt: skip
    assert found[0] == found[1]


def test_dropout_in_an_mlp_head_draws_as_without_a_monitor():
    streams = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = MLPHead()
        monitor = watch(model) if watched else None
        scores = monitor.scores() if monitor else None
        inputs, labels = batch(8)
        F.cross_entropy(model(*inputs), labels).backward()
        streams.append(torch.get_rng_state().tolist())
        assert scores is None or scores.take() is not None
    assert streams[0] == streams[1]


def test_a_scripted_layer_is_in_eval_mode_and_trains_again():
    class Scripted(Gated):
        def __init__(self):
            super().__init__()
            self.drop = torch.jit.script(nn.Dropout(0.5))

        def fuse(self, features):
            return super().fuse([self.drop(z) for z in features])

    model = Scripted()
    inputs, labels = batch(8)
    with watch(model) as monitor:
        scores = monitor.scores()
        for _ in range(2):
            F.cross_entropy(model(*inputs), labels).backward()
            taken = scores.take()
    assert model.drop.training
    model.drop.eval()
    a, b = model.encode(*inputs)
    expected = model.fuse([a, torch.zeros_like(b)]).softmax(-1).gather(1, labels[:, None]).sum()
    assert taken is not None
    torch.testing.assert_close(taken.score[0], expected.detach())
