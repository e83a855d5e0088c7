"""UnimodalObjective.predict: the joint head and the modalities' heads vote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.functional import vote
from tests.models import CLASSES, Concat, ConcatOfWrapped, MLPHead, Signal, SumHeads, Tokens, batch, watch
from tests.objectives import objective_of


class Partial(Concat):
    """Sees the modalities that are there, and zeros for the others."""

    def forward(self, *inputs: Tensor | None) -> Tensor:
        rows = next(len(x) for x in inputs if x is not None)
        pairs = zip(self.encoders.values(), inputs, self.widths, strict=True)
        return self.fuse([torch.zeros(rows, d) if x is None else encoder(x) for encoder, x, d in pairs])


class Some(Concat):
    """Runs the first encoder on the samples in `self.having` alone."""

    having: Tensor | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        first, *others = self.encoders.values()
        if self.having is None:
            z = first(inputs[0])
        else:
            z = torch.zeros(len(inputs[0]), self.widths[0])
            z[self.having] = first(inputs[0][self.having])
        return self.fuse([z, *(encoder(x) for encoder, x in zip(others, inputs[1:], strict=True))])


def trained(model: Any, *, inject: bool = False, **options: Any) -> bo.UnimodalObjective:
    """An objective after one training pass, the model in eval mode."""
    objective = objective_of(model, inject=inject, **options)
    inputs, labels = batch(8, len(model.names))
    loss = F.cross_entropy(model(*inputs), labels)
    (loss if inject else loss + objective(labels)).backward()
    model.eval()
    return objective


def heads_of(objective: Any, model: Any, inputs: Any) -> dict[str, Tensor]:
    """Each own head's logits, one by one."""
    return {
        name: objective.head_of(name)(encoder.forward(x)).detach()
        for (name, encoder), x in zip(model.modalities.items(), inputs, strict=True)
    }


@pytest.mark.parametrize("make", [Concat, SumHeads, MLPHead])
@pytest.mark.parametrize("inject", [False, True])
def test_all_heads_vote(make, inject):
    model = make(3)
    objective = trained(model, inject=inject)
    inputs, _ = batch(6, 3)
    with torch.no_grad():
        joint = model(*inputs)
    expected = vote(torch.stack([joint, *heads_of(objective, model, inputs).values()]))
    torch.testing.assert_close(objective.predict(joint), expected)
    torch.testing.assert_close(objective.predict(joint), expected)  # may be asked twice


def test_parts_of_the_shared_head_vote():
    model = Concat()
    objective = trained(model, heads="shared")
    inputs, _ = batch(6)
    with torch.no_grad():
        joint = model(*inputs)
        weights = model.head.weight.split(model.widths, 1)
        features = [e.forward(x) for e, x in zip(model.encoders.values(), inputs, strict=True)]
        parts = [F.linear(z, w, model.head.bias / 2) for z, w in zip(features, weights, strict=True)]
    torch.testing.assert_close(objective.predict(joint), vote(torch.stack([joint, *parts])))


@pytest.mark.parametrize("flat", [False, True])
def test_one_logit_and_labels_give_logits(flat):
    classes = 1 if flat else 3
    model = Concat(classes=classes)
    objective = bo.UnimodalObjective(watch(model, loss=nn.BCEWithLogitsLoss()), classes)
    inputs, _ = batch()
    model(*inputs)
    objective(torch.ones(8, classes))
    model.eval()
    joint = model(*inputs).detach()
    given = joint.squeeze(1) if flat else joint
    expected = torch.stack([joint, *heads_of(objective, model, inputs).values()]).mean(0)
    torch.testing.assert_close(objective.predict(given), expected.view(given.shape))


def test_a_modality_that_did_not_come_leaves_the_vote():
    model = Partial()
    objective = trained(model)
    inputs, _ = batch(6)
    model(*inputs)  # a batch with both, whose features must not be taken for the next one's
    for name, given in (("visual", (None, inputs[1])), ("audio", (inputs[0], None))):
        expected = heads_of(objective, model, inputs)[name].log_softmax(1)
        torch.testing.assert_close(objective.predict(model(*given).detach()), expected)


@pytest.mark.parametrize("selects", [False, True])
def test_samples_that_lack_a_modality(selects):
    model = Some()
    objective = trained(model)
    inputs, _ = batch(6)
    having = torch.tensor([True, False, True, True, False, False])
    model.having = having if selects else None
    joint = model(*inputs).detach()
    parts = heads_of(objective, model, inputs)
    present = torch.stack([having, having, having | True])
    expected = vote(torch.stack([joint, parts["audio"], parts["visual"]]), present)
    torch.testing.assert_close(objective.predict(joint, present={"audio": having}), expected)


def test_the_joint_head_votes_where_nobody_else_is_left():
    model = Concat()
    objective = trained(model, weight={"audio": 1.0})
    joint = model(*batch(6)[0]).detach()
    nobody = torch.zeros(6, dtype=torch.bool)
    expected = joint.log_softmax(1)
    torch.testing.assert_close(objective.predict(joint, present={"audio": nobody}), expected)


def test_a_modality_of_weight_0_has_no_vote():
    model = Concat()
    objective = trained(model, weight={"visual": 2.0})
    inputs, _ = batch()
    joint = model(*inputs).detach()
    visual = objective.head_of("visual")(model.encoders["visual"].forward(inputs[1])).detach()
    torch.testing.assert_close(objective.predict(joint), vote(torch.stack([joint, visual])))


def test_features_are_pooled_as_in_training():
    model = Concat(encoder=Signal, between=lambda z: z.amax(2))
    objective = trained(model)
    inputs, _ = batch(6)
    joint = model(*inputs).detach()
    parts = [
        objective.head_of(n)(z.amax(2)).detach()
        for n, z in zip(model.names, model.encode(*inputs), strict=True)
    ]
    torch.testing.assert_close(objective.predict(joint), vote(torch.stack([joint, *parts])))


def test_each_position_has_a_vote():
    model = Concat(encoder=Tokens)
    objective = objective_of(model)
    inputs, _ = batch(6)
    model(*inputs)
    objective(torch.zeros(6, 3, dtype=torch.int64))
    model.eval()
    joint = model(*inputs).detach()
    expected = vote(torch.stack([joint, *heads_of(objective, model, inputs).values()]))
    torch.testing.assert_close(objective.predict(joint), expected)


def test_outputs_that_are_more_than_a_tensor():
    model = ConcatOfWrapped("tuple")
    objective = trained(model)
    inputs, _ = batch(6)
    joint = model(*inputs).detach()
    parts = [
        objective.head_of(n)(model.unwrap(z)).detach()
        for n, z in zip(model.names, model.encode(*inputs), strict=True)
    ]
    torch.testing.assert_close(objective.predict(joint), vote(torch.stack([joint, *parts])))


class Twice(Concat):
    """Calls its first encoder on two frames, and fuses the second one's features."""

    def encode(self, *inputs: Tensor) -> list[Any]:
        self.encoders["audio"](-inputs[0])
        first, second = super().encode(*inputs)
        return [self.encoders["audio"](inputs[0]), second + 0 * first]


def test_an_encoder_that_is_called_twice_takes_no_other_from_the_vote():
    model = Twice()
    objective = trained(model)
    inputs, _ = batch(6)
    joint = model(*inputs).detach()
    expected = vote(torch.stack([joint, *heads_of(objective, model, inputs).values()]))
    torch.testing.assert_close(objective.predict(joint), expected)


def test_a_loaded_objective_votes_before_any_training():
    model = Concat()
    objective = trained(model)
    fresh = objective_of(model, seed=9)
    fresh.load_state_dict(objective.state_dict())
    joint = model(*batch(6)[0]).detach()
    assert torch.equal(fresh.predict(joint), objective.predict(joint))


def test_half_precision_votes_in_float32():
    model = Concat()
    objective = trained(model)
    inputs, _ = batch(6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        joint = model(*inputs)
        result = objective.predict(joint)
    assert joint.dtype == torch.bfloat16
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.exp().sum(1), torch.ones(6))


def run(*, predicts: bool) -> list[Tensor]:
    """Weights and scores after three steps; before each loss the model may predict another batch."""
    torch.manual_seed(0)
    model = Concat()
    monitor = watch(model)
    objective = bo.UnimodalObjective(monitor, CLASSES, seed=0)
    params = [{"params": model.parameters()}, {"params": objective.parameters()}]
    optimizer = bo.ModulatedOptimizer(torch.optim.SGD(params, lr=0.1), monitor, bo.OGM(noise=False))
    recorder = bo.Recorder(optimizer)
    for step in range(3):
        inputs, labels = batch()
        loss = F.cross_entropy(model(*inputs), labels)
        if predicts and step:
            model.eval()
            with torch.no_grad():
                objective.predict(model(*(x + 1 for x in inputs)))
            model.train()
        optimizer.zero_grad()
        (loss + objective(labels)).backward()
        optimizer.step()
    return [*model.parameters(), *objective.parameters(), torch.tensor(recorder.series("score")["audio"][1])]


def test_training_goes_on_as_if_nobody_had_predicted():
    for without, with_ in zip(run(predicts=False), run(predicts=True), strict=True):
        assert torch.equal(without, with_)


class TestRefusals:
    def test_without_a_forward_in_eval_mode(self):
        model = Concat()
        objective = trained(model).train()
        model.train()
        joint = model(*batch()[0]).detach()
        with pytest.raises(RuntimeError, match="call the model in eval mode"):
            objective.predict(joint)

    def test_after_remove(self):
        model = Concat()
        objective = trained(model)
        objective.remove()
        with pytest.raises(RuntimeError, match="call the model in eval mode"):
            objective.predict(model(*batch()[0]).detach())

    def test_before_any_training(self):
        model = Concat().eval()
        objective = objective_of(model)
        with pytest.raises(RuntimeError, match="head of 'audio' was never trained"):
            objective.predict(model(*batch()[0]).detach())

    @pytest.mark.parametrize("loss", [nn.MSELoss(), lambda p, y: (p - y).square().mean(1)])
    def test_numbers_and_functions(self, loss):
        model = Concat().eval()
        objective = objective_of(model, monitor=watch(model, loss=loss))
        with pytest.raises(ValueError, match=r"numbers do not vote|needs to know the task"):
            objective.predict(model(*batch()[0]).detach())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x[:, :-1], r"of shape \(B, 5\)"),
            (lambda x: x.T, r"of shape \(B, 5\)"),
            (lambda x: x.argmax(1, keepdim=True).expand(-1, 5), "floating"),
            (lambda x: x[:-1], "8 rows for 7 samples"),
        ],
    )
    def test_logits_of_another_shape(self, change, message):
        model = Concat()
        objective = trained(model)
        joint = model(*batch()[0]).detach()
        with pytest.raises(ValueError, match=message):
            objective.predict(change(joint))

    def test_flags_of_another_batch(self):
        model = Concat()
        objective = trained(model)
        joint = model(*batch()[0]).detach()
        with pytest.raises(ValueError, match="one flag for each of the 8 samples"):
            objective.predict(joint, present={"audio": torch.ones(4, dtype=torch.bool)})
        with pytest.raises(KeyError, match="Found \\['touch'\\]"):
            objective.predict(joint, present={"touch": torch.ones(8, dtype=torch.bool)})
