"""CompetitionObjective: batches with little in them, absent modalities, odd loops, resumes, and what is refused."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.functional import permutation_divergence
from tests.models import Concat, Gated, MLPHead, SumHeads, Tokens, batch, watch
from tests.objectives import permutation_of
from tests.relearning import random_streams
from tests.training import batches, grad_of, same_bits, sgd, small_model


def competition_of(model: Any, **options: Any) -> bo.CompetitionObjective:
    return bo.CompetitionObjective(watch(model), **{"seed": 0, **options})


def gradients_of(term: Tensor, params: Any) -> list[Tensor]:
    params = list(params)
    found = torch.autograd.grad(term, params, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


class TestBatches:
    def test_a_weight_of_0_is_a_plain_0(self):
        model, plain = small_model(), small_model()
        competition = competition_of(model, weight=0)
        for one in (model, plain):
            optimizer = sgd(one.parameters(), momentum=0.9)
            for inputs, labels in batches(one, 3):
                optimizer.zero_grad()
                loss = F.cross_entropy(one(*inputs), labels)
                term = competition()
                assert not term.requires_grad
                (loss + term if one is model else loss).backward()
                optimizer.step()
        assert same_bits(model, plain)

    @pytest.mark.parametrize("size", [0, 1])
    def test_without_another_sample_no_gradient_changes(self, size):
        model, plain = small_model(), small_model()
        competition = competition_of(model)
        inputs, labels = batches(model, 2)[0]
        model(*inputs)  # shows the columns, as an empty batch does not
        inputs, labels = [x[:size] for x in inputs], labels[:size]
        (F.cross_entropy(model(*inputs), labels, reduction="sum") + competition()).backward()
        F.cross_entropy(plain(*inputs), labels, reduction="sum").backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(grad_of(p), grad_of(q))

    @pytest.mark.parametrize("make", [Concat, SumHeads])
    def test_a_modality_without_a_part_in_the_logits_gets_nothing(self, make):
        model = make(3)
        with torch.no_grad():
            (model.own_heads["visual"].weight if make is SumHeads else model.head.weight[:, 4:8]).zero_()
        competition = competition_of(model, strategy="independent")
        model(*batch(8, 3)[0])
        term = competition()
        assert not any(g.any() for g in gradients_of(term, model.encoders["visual"].parameters()))
        assert all(g.any() for g in gradients_of(term, model.encoders["text"].parameters()))

    def test_labels_play_no_role(self):
        values = []
        for labels in (None, torch.full((8,), -100)):
            model = small_model()
            competition = competition_of(model)
            if labels is not None:
                competition.monitor.observe(labels)
            model(*batches(model, 1)[0][0])
            values.append(competition().detach())
        assert torch.equal(*values)

    def test_half_precision_is_reckoned_in_float32(self):
        model = small_model()
        expected = competition_of(model)
        inputs, _ = batches(model, 1)[0]
        model(*inputs)
        value = expected().detach()
        half = small_model().bfloat16()
        competition = competition_of(half)
        half(*(x.bfloat16() for x in inputs))
        terms = [competition()]
        terms[0].backward()
        assert all(bool(grad_of(p).isfinite().all()) for p in half.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            cast = small_model()
            competition = competition_of(cast)
            cast(*inputs)
            terms.append(competition())
        for term in terms:
            assert term.dtype is torch.float32
            # Logits with eight bits: relative errors of some 2^-8 each.
            torch.testing.assert_close(term.detach(), value, rtol=0.1, atol=1e-3)

    def test_one_logit_of_two_classes(self):
        model = Concat(classes=1).double()
        competition = competition_of(model, strategy="collaborative")
        inputs = [x.double() for x in batch()[0]]
        model(*inputs)
        term = competition()
        z = model.encode(*inputs)
        expected: Any = 0.0
        for m in range(2):
            permuted = [x[permutation_of(m, 8)] if i == m else x for i, x in enumerate(z)]
            pairs = [F.pad(model.fuse(features), (1, 0)) for features in (z, permuted)]
            expected = expected - permutation_divergence(*pairs).mean()
        torch.testing.assert_close(term, expected)

    def test_columns_of_no_encoder_stay(self):
        class WithMore(Concat):
            def forward(self, *inputs: Tensor) -> Tensor:
                return self.fuse([*self.encode(*inputs), 5 * inputs[0][:, :2]])

            def fuse(self, features: list[Tensor]) -> Tensor:
                return self.head(torch.cat(features, 1))

        model = WithMore(joint_width=10).double()
        competition = competition_of(model, strategy="collaborative")
        inputs = [x.double() for x in batch()[0]]
        model(*inputs)
        term = competition()
        z = [*model.encode(*inputs), 5 * inputs[0][:, :2]]
        joint, expected = model.fuse(z), torch.zeros(())
        for m in range(2):
            permuted = [x[permutation_of(m, 8)] if i == m else x for i, x in enumerate(z)]
            expected = expected - permutation_divergence(joint, model.fuse(permuted)).mean()
        torch.testing.assert_close(term, expected)
        params = list(model.encoders.parameters())
        assert_same(gradients_of(term, params), gradients_of(expected, params))


class WithGaps(Concat):
    """Zeros stand in for absent features; an encoder runs on all samples, or only on those that have the modality."""

    present: dict[str, Tensor]
    compact = False

    def forward(self, *inputs: Tensor) -> Tensor:
        features = []
        for name, x in zip(self.names, inputs, strict=True):
            here = self.present.get(name, torch.ones(len(x), dtype=torch.bool))
            if not here.any():
                features.append(x.new_zeros(len(x), 4))
            elif self.compact:
                z = self.encoders[name](x[here])
                features.append(z.new_zeros(len(x), 4).index_put((here.nonzero()[:, 0],), z))
            else:
                features.append(torch.where(here.unsqueeze(1), self.encoders[name](x), 0))
        return self.fuse(features)


class TestAbsentModalities:
    @pytest.mark.parametrize("compact", [False, True])
    def test_only_samples_that_have_it_are_permuted(self, compact):
        model = WithGaps(3).double()
        model.present = {}
        competition = competition_of(model, strategy="collaborative")
        inputs, labels = batch(8, 3)
        inputs = [x.double() for x in inputs]
        model(*inputs)
        model.compact = compact
        model.present = {
            "visual": torch.tensor([1, 0, 1, 1, 0, 0, 1, 1]).bool(),
            "text": torch.arange(8) == 3,  # a single one: no other stands in
        }
        joint = model(*inputs)
        competition.monitor.observe(labels, present=model.present)
        term = competition()
        z = model.encode(*inputs)
        expected = torch.zeros(())
        for m, name in enumerate(model.names[:2]):
            here = model.present.get(name, torch.ones(8, dtype=torch.bool))
            index = permutation_of(m, 8, present=here)
            weight = model.head.weight[:, 4 * m : 4 * m + 4]
            moved = torch.where(here.unsqueeze(1), (z[m][index] - z[m]) @ weight.T, 0)
            expected = expected - permutation_divergence(joint, joint + moved).sum() / here.sum()
        torch.testing.assert_close(term, expected)
        params = [*model.encoders.parameters(), model.head.weight]
        assert_same(gradients_of(term, params), gradients_of(expected, params))
        alone = bo.CompetitionObjective(competition.monitor, strategy="independent", seed=0)
        model(*inputs)
        competition.monitor.observe(labels, present=model.present)
        assert not any(g.any() for g in gradients_of(alone(), model.encoders["text"].parameters()))

    def test_an_encoder_that_was_not_called(self):
        model = WithGaps(2).double()
        model.present = {}
        competition = competition_of(model)
        inputs = [x.double() for x in batch()[0]]
        model(*inputs)
        model.present = {"visual": torch.zeros(8, dtype=torch.bool)}
        model(*inputs)
        term = competition()
        z = model.encoders["audio"](inputs[0])
        joint, permuted = (model.fuse([x, torch.zeros_like(x)]) for x in (z, z[permutation_of(0, 8)]))
        expected = -permutation_divergence(joint, permuted).mean()
        torch.testing.assert_close(term, expected)
        params = [*model.encoders.parameters(), model.head.weight]
        assert_same(gradients_of(term, params), gradients_of(expected, params))


class TestLoops:
    def test_the_latest_training_forward_counts(self):
        model = small_model()
        first, second = (inputs for inputs, _ in batches(model, 2))
        competition = competition_of(model)
        model(*second)
        expected = competition().detach()
        model = small_model()
        again = competition_of(model)
        model(*first)
        model(*second)
        model.eval()
        with torch.no_grad():
            model(*first)
        model.train()
        assert torch.equal(again().detach(), expected)

    def test_each_call_draws_anew_and_leaves_the_global_streams(self):
        model = small_model()
        competition = competition_of(model)
        model(*batches(model, 1)[0][0])
        before = random_streams()
        values = [competition().detach() for _ in range(2)]
        assert random_streams() == before
        assert competition.calls == 2
        assert not torch.equal(*values)

    def test_gradients_of_micro_batches_add_up(self):
        model, both = small_model(), []
        competition = competition_of(model)
        for inputs, _ in batches(model, 2):
            model(*inputs)
            both.append(gradients_of(competition(), model.parameters()))
        again = competition_of(small_model())
        for inputs, _ in batches(model, 2):
            again.monitor.model(*inputs)
            again().backward()
        assert_same(
            [a + b for a, b in zip(*both, strict=True)],
            [grad_of(p) for p in again.monitor.model.parameters()],
        )

    def test_beside_opm_features_are_clean(self):
        model = small_model()
        competition = competition_of(model)
        opm = bo.OPM(competition.monitor, q_base=1.0, seed=0)
        for inputs, labels in batches(model, 3):
            loss = F.cross_entropy(model(*inputs), labels)
            (loss + competition()).backward()
        assert opm.stats()["dropping"] > 0
        assert all(bool(grad_of(p).isfinite().all()) for p in model.parameters())


class TestState:
    def test_a_resumed_run_draws_the_same(self):
        def run(steps: range, model: Any, competition: Any, optimizer: Any) -> None:
            for inputs, labels in batches(model, len(steps), first=steps.start):
                optimizer.zero_grad()
                (F.cross_entropy(model(*inputs), labels) + 5 * competition()).backward()
                optimizer.step()

        model = small_model()
        parts = model, competition_of(model, samples=2), sgd(model.parameters(), momentum=0.9)
        run(range(3), *parts)
        stored = io.BytesIO()
        torch.save([part.state_dict() for part in parts], stored)
        run(range(3, 6), *parts)
        stored.seek(0)
        fresh = small_model()
        resumed: tuple[Any, ...] = (
            fresh,
            competition_of(fresh, samples=2, seed=9),
            sgd(fresh.parameters(), momentum=0.9),
        )
        for part, state in zip(resumed, torch.load(stored, weights_only=True), strict=True):
            part.load_state_dict(state)
        run(range(3, 6), *resumed)
        assert same_bits(fresh, model)

    def test_a_module_that_holds_it_carries_its_state(self):
        first, second = competition_of(small_model(), seed=3), competition_of(small_model())
        first.calls = 7
        nn.ModuleList([second]).load_state_dict(nn.ModuleList([first]).state_dict())
        assert (second.calls, second.seed) == (7, 3)

    def test_an_unknown_entry_is_refused(self):
        competition = competition_of(small_model())
        state = {**competition.state_dict(), "weight": torch.ones(1)}
        with pytest.raises(KeyError, match=r"'_extra_state'\] only"):
            competition.load_state_dict(state)

    def test_a_copy_is_inert(self):
        model = small_model()
        competition = competition_of(model)
        inputs = batches(model, 1)[0][0]
        model(*inputs)
        twin = copy.deepcopy(competition)
        twin.monitor.model(*inputs)
        with pytest.raises(RuntimeError, match="no features came by"):
            twin()

    def test_removed_or_collected_it_leaves_no_hook(self):
        model = small_model()
        monitor = watch(model)

        def hooks() -> list[int]:
            accumulated = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
            return [len(monitor.hooks.outputs), *accumulated]

        before = hooks()
        with bo.CompetitionObjective(monitor):
            assert hooks() != before
        assert hooks() == before
        held = bo.CompetitionObjective(monitor)
        del held
        gc.collect()
        assert hooks() == before


class TestRefusals:
    def test_calls_without_a_training_forward(self):
        model = small_model()
        competition = competition_of(model)
        inputs = batches(model, 1)[0][0]
        with pytest.raises(RuntimeError, match="no features came by"):
            competition()
        model(*inputs)
        with torch.no_grad(), pytest.raises(RuntimeError, match="Leave it out of the loss in validation"):
            competition()
        model.eval()
        model(*inputs)
        with pytest.raises(RuntimeError, match="joint logits of a training forward"):
            competition()
        assert competition.calls == 0

    def test_positions(self):
        model = Concat(encoder=Tokens)
        competition = competition_of(model)
        model(*batch()[0])
        with pytest.raises(ValueError, match="24 rows for 8 samples"):
            competition()

    def test_fusions_that_are_no_sum(self):
        with pytest.raises(ValueError, match=r"a sum over modalities.*Found 'zero-out'"):
            competition_of(MLPHead())
        model = Gated()  # its linear head shows in the first forward only that features are not concatenated
        competition = competition_of(model)
        model(*batch()[0])
        with pytest.raises(ValueError, match=r"a sum over modalities.*Found 'zero-out'"):
            competition()

    def test_no_head(self):
        model = Concat()
        with pytest.raises(ValueError, match="needs uni-modal scores"):
            bo.CompetitionObjective(bo.ModalityMonitor(model, model.modalities))

    @pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), nn.MSELoss()], ids=str)
    def test_losses_of_no_class(self, loss):
        with pytest.raises(ValueError, match="distributions over classes"):
            bo.CompetitionObjective(watch(Concat(), loss=loss))
