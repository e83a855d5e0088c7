"""When OPM drops, with what probability, and that it leaves everything else alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from tests.dropping import dropping, fused, inputs_of, kept, step, warm
from tests.models import FUSIONS, batch, batch_norm, watch, with_dropout
from tests.training import backward, class_zero, groups_of, same_bits, sgd, small_model, train

Q = 0.5 * (1 + 0.5 * math.tanh(4 - 1))


def still(model):
    """Zero-out looks at the fusion in eval mode: the statistics should not move."""
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.momentum = 0.0


def clean(model, number=1):
    with torch.no_grad():
        return torch.cat(model.encode(*class_zero(model, number)[0]), 1)


def test_the_first_forward_drops_nothing_and_the_next_follows_its_scores():
    model, modulator = dropping()
    assert kept(fused(model, 0)).all()
    step(model)
    assert torch.equal(modulator.q, torch.zeros(2))
    fused(model)
    torch.testing.assert_close(modulator.q, torch.tensor([Q, 0.0]))


def test_what_is_kept_is_bit_for_bit_the_encoders_output():
    model, _ = warm()
    x, z = fused(model), clean(model)
    mask = kept(x)
    assert not mask[0].all()
    assert mask[0].any()
    assert mask[1].all()
    assert torch.equal(x, torch.where(mask.T.repeat_interleave(4, 1), z, 0))


def test_dropped_samples_send_no_gradient_to_their_encoder():
    model, _ = warm(model=small_model(encoder=lambda n, d: torch.nn.Linear(n, d)))
    inputs, labels = class_zero(model)
    inputs = [x.requires_grad_() for x in inputs]
    with inputs_of(model.head) as seen:
        F.cross_entropy(model(*inputs), labels).backward()
    mask = kept(seen[0])
    assert not mask[0].all()
    assert [x.grad.any(1).tolist() for x in inputs if x.grad is not None] == mask.tolist()


@pytest.mark.parametrize("name", FUSIONS)
def test_scores_are_those_of_the_clean_features(name):
    """Of the same weights and batch, a pass that was dropped from contributes what an undropped one does."""
    model = FUSIONS[name]()
    still(model)
    inputs, labels = batch(16)
    monitor = watch(model, labels="observe")
    sums = monitor.scores()

    def scores():
        monitor.observe(labels)
        model.zero_grad()
        backward(model, (inputs, labels))
        taken = sums.take()
        assert taken is not None
        return taken.score

    scores()
    undropped = scores()
    modulator = bo.OPM(monitor, q_base=1, lam=0, seed=0)
    scores()
    torch.testing.assert_close(scores(), undropped)
    assert modulator.stats()["dropping"] == 1


@pytest.mark.parametrize("name", FUSIONS)
def test_any_fusion_gets_the_dropped_features(name):
    model, _ = dropping(model=FUSIONS[name](), q_base=1)
    inputs, labels = batch(16)
    backward(model, (inputs, torch.zeros_like(labels)))

    def logits(audio, visual):
        torch.manual_seed(0)  # of the fusion's own dropout
        return model(audio, visual).detach()

    expected = logits(*inputs)
    assert torch.equal(logits(torch.randn_like(inputs[0]), inputs[1]), expected)
    assert not torch.equal(logits(inputs[0], torch.randn_like(inputs[1])), expected)


def test_nothing_happens_in_eval_mode_or_without_gradients():
    model, modulator = warm(q_base=1)
    forwards = modulator.stats()["forwards"]
    with torch.no_grad():
        assert kept(fused(model)).all()
    with torch.inference_mode():
        assert kept(fused(model)).all()
    model.eval()
    assert kept(fused(model)).all()
    assert modulator.stats()["forwards"] == forwards


def test_an_encoder_in_eval_mode_is_not_dropped():
    model, _ = warm(q_base=1)
    model.encoders["audio"].eval()
    assert kept(fused(model)).all()


def test_a_pass_in_eval_mode_between_forward_and_backward_disturbs_nothing():
    model, modulator = warm()
    inputs, labels = class_zero(model)
    loss = F.cross_entropy(model(*inputs), labels)
    model.eval()
    model(*inputs)
    model.train()
    loss.backward()
    updates = modulator.stats()["updates"]
    fused(model)
    assert modulator.stats()["updates"] == updates + 1


def test_encoders_statistics_are_those_of_training_without_it():
    made = small_model(encoder=batch_norm)
    plain = copy.deepcopy(made)
    model, modulator = warm(model=made)
    step(plain)
    for number in range(1, 4):
        model(*class_zero(model, number)[0])
        plain(*class_zero(plain, number)[0])
    buffers = zip(model.buffers(), plain.buffers(), strict=True)
    assert modulator.stats()["dropping"] == 3
    assert all(torch.equal(a, b) for a, b in buffers)


@pytest.mark.parametrize("options", [{"q_base": 0}, {"p_exe": 0}, {"start": 99}, {"end": 0}], ids=str)
def test_limits_are_plain_training_bit_for_bit(options):
    plain, model = small_model(encoder=with_dropout), small_model(encoder=with_dropout)
    modulator = bo.OPM(watch(model), seed=0, **options)
    for net in (plain, model):
        torch.manual_seed(5)
        train(net, sgd(groups_of(net), momentum=0.9), [class_zero(net, i) for i in range(4)])
    assert same_bits(plain, model)
    assert modulator.stats() == {"forwards": 4, "dropping": 0, "updates": 3, "unusable_scores": 0}


def test_the_global_random_stream_is_the_users():
    model, _ = warm()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    fused(model)
    assert torch.equal(torch.rand(3), expected)


def test_masks_are_a_function_of_seed_and_forward_alone():
    def masks(seed):
        model, _ = warm(seed=seed)
        return torch.stack([kept(fused(model, 5)) for _ in range(3)])

    first = masks(1)
    torch.manual_seed(99)
    assert torch.equal(masks(1), first)
    assert not torch.equal(masks(2), first)
    assert not torch.equal(first[0], first[1])


def test_the_window_counts_forwards():
    model, modulator = dropping(q_base=1, start=2, end=3)
    modulator.set_epoch(7)  # is counted, and changes no unit
    dropped = []
    for number in range(6):
        dropped.append(not kept(fused(model, number)).all())
        step(model)  # a forward too
    assert dropped == [False, True, False, False, False, False]


def test_the_window_counts_epochs():
    model, modulator = dropping(q_base=1, start=2, end=3, unit="epoch")
    with pytest.raises(
        RuntimeError, match=r"none was set yet\. Call set_epoch\(epoch\) when an epoch begins"
    ):
        fused(model)
    dropped = []
    for epoch in range(6):
        modulator.set_epoch(epoch)
        step(model)
        dropped.append(not kept(fused(model, epoch)).all())
    assert dropped == [False, False, True, True, False, False]


def test_p_exe_is_the_part_of_batches_that_drop():
    model, modulator = warm(q_base=1, p_exe=0.7)
    dropped = 0
    for _ in range(200):
        with inputs_of(model.head) as seen:
            step(model)
        dropped += not kept(seen[0]).all()
    assert modulator.stats()["dropping"] == dropped
    assert 120 < dropped < 160


def test_q_stays_when_there_are_no_new_scores():
    model, modulator = warm()
    for number in range(3):
        fused(model, number)
    assert modulator.stats()["updates"] == 1
    torch.testing.assert_close(modulator.q, torch.tensor([Q, 0.0]))


def test_q_stays_when_scores_are_unusable():
    certainty = [0.8, 0.2]
    model, modulator = warm(certainty)
    certainty[0] = float("nan")
    step(model)
    with pytest.warns(UserWarning, match="leaves its drop probabilities as they are"):
        fused(model)
    assert modulator.stats()["unusable_scores"] == 1
    torch.testing.assert_close(modulator.q, torch.tensor([Q, 0.0]))


def test_micro_batches_have_a_q_each():
    """Of the scores of the micro-batch before."""
    inputs, labels = batch(16)
    model = small_model()
    monitor = watch(model)
    sums, modulator = monitor.scores(), bo.OPM(monitor, seed=0)
    for cut in (slice(0, 6), slice(6, 16)):
        backward(model, ([x[cut] for x in inputs], labels[cut]))
        model(*inputs)
        taken = sums.take()
        assert taken is not None
        ratio = bo.functional.discrepancy_ratio(taken.mean_score)
        torch.testing.assert_close(modulator.q, bo.functional.drop_probability(ratio))
        assert modulator.q.any()


def test_scores_of_several_forwards_in_one_backward_add_up():
    """Their q is that of the whole batch."""
    inputs, labels = batch(16)
    qs = []
    for cuts in ([slice(0, 16)], [slice(0, 6), slice(6, 16)]):
        model = small_model()
        modulator = bo.OPM(watch(model), seed=0)
        losses = [F.cross_entropy(model(*[x[cut] for x in inputs]), labels[cut]) for cut in cuts]
        torch.stack(losses).sum().backward()
        model(*inputs)
        qs.append(modulator.q)
    torch.testing.assert_close(qs[0], qs[1])
    assert qs[0].any()


def test_a_loop_that_resets_the_monitor_still_updates_q():
    model, modulator = warm()
    for number in range(3):
        model.zero_grad()
        modulator.monitor.reset()
        backward(model, class_zero(model, number))
    assert modulator.stats()["updates"] == 3


def test_autocast_and_grad_scaler():
    model, modulator = warm(model=small_model())
    optimizer, scaler = sgd(groups_of(model)), torch.amp.GradScaler("cpu")
    for number in range(4):
        optimizer.zero_grad()
        inputs, labels = class_zero(model, number)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(*inputs), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert modulator.stats()["dropping"] == 4
    assert modulator.q.dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in model.parameters())
