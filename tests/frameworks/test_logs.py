"""Logs where people look, with the real packages: Lightning, Transformers, Accelerate, TensorBoard."""

from __future__ import annotations

import copy
import csv
from typing import Any

import pytest
import torch

import balanceopt as bo
from tests.frameworks.loops import STEPS, model_and_batches
from tests.models import watch
from tests.training import batches, same_bits, sgd, small_model, train

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings(
        "ignore:::lightning",
        "ignore:::transformers",
        "ignore:::accelerate",
        "ignore:::torch",
        "ignore:.*LeafSpec:FutureWarning",
        "ignore:::tensorboard",
    ),
]

QUANTITIES = [
    "score",
    "ratio",
    "gradient_norm",
    "gradient_share",
    "update_ratio",
    "feature_norm",
    "effective_rank",
    "agreement",
    "coefficient",
]
NAMES = {f"balance/{quantity}/{name}" for quantity in QUANTITIES for name in ("audio", "visual")}


def recorded() -> dict[str, float]:
    """The last values of a plain loop with the same model, data and method."""
    model, given = model_and_batches(STEPS)
    monitor = watch(model)
    optimizer = bo.ModulatedOptimizer(sgd(model.parameters(), lr=0.1), monitor, bo.OGM(0.5, noise=False))
    recorder = bo.Recorder(monitor, optimizer)
    train(model, optimizer, given)
    return {f"balance/{row.quantity}/{row.modality}": row.value for row in recorder.rows()}


class TestLightning:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("lightning")

    def fitted(self, folder: Any, **options: Any) -> tuple[Any, list[dict[str, str]]]:
        from lightning.pytorch.loggers import CSVLogger

        from tests.frameworks.under_lightning import Lit, callback, fit

        lit = Lit(make=lambda module: sgd(module.parameters(), lr=0.1))
        balance = callback(bo.OGM(0.5, noise=False), **options)
        logger = CSVLogger(folder, flush_logs_every_n_steps=1)
        fit(lit, balance, logger=logger, log_every_n_steps=1)
        path = f"{logger.log_dir}/metrics.csv"
        try:
            with open(path, newline="") as file:
                return lit, list(csv.DictReader(file))
        except FileNotFoundError:
            return lit, []

    def test_any_logger_gets_the_values_of_each_step(self, tmp_path):
        _, lines = self.fitted(tmp_path)
        assert {name for name in lines[0] if name.startswith("balance/")} == NAMES
        assert len(lines) == STEPS
        expected = recorded()
        for name in NAMES:
            assert float(lines[-1][name]) == pytest.approx(expected[name], rel=1e-4), name

    def test_logging_changes_no_bit(self, tmp_path):
        with_logs, _ = self.fitted(tmp_path / "with")
        without, lines = self.fitted(tmp_path / "without", log=False)
        assert same_bits(with_logs, without)
        assert not any(name.startswith("balance/") for line in lines for name in line)

    def test_without_a_logger_nothing_is_computed(self):
        from tests.frameworks.under_lightning import Lit, callback, fit

        balance = callback()
        fit(Lit(), balance, count=2)
        assert balance._signals is None
        assert balance._logged == {}

    def test_a_recorder_of_the_callback_has_the_signals(self):
        from tests.frameworks.under_lightning import Lit, callback, fit

        balance = callback(modulation=bo.OGM(0.5, noise=False))
        recorder = bo.Recorder(balance)
        fit(Lit(), balance)
        assert {f"balance/{row.quantity}/{row.modality}" for row in recorder.rows()} == NAMES
        assert {row.step for row in recorder.rows()} == set(range(STEPS))


class TestTransformers:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("transformers")

    def test_the_trainers_log_gets_the_values_beside_the_loss(self, tmp_path):
        from tests.frameworks.under_transformers import Net, callback, trainer

        balance = callback(bo.OGM(0.5, noise=False))
        run = trainer(tmp_path, Net(), balance, logging_strategy="steps", logging_steps=2)
        balance.log_to(run)
        run.train()
        history = run.state.log_history
        ours = [line for line in history if "balance/ratio/audio" in line]
        assert [line["step"] for line in ours] == list(range(2, STEPS + 1, 2))
        assert ours[0].keys() >= NAMES
        assert [line["step"] for line in history if "loss" in line] == list(range(2, STEPS + 1, 2))

    def test_logging_changes_no_bit(self, tmp_path):
        from tests.frameworks.under_transformers import Net, callback, trainer

        models = []
        for logs in (True, False):
            model, balance = Net(), callback(bo.OGM(0.5))
            run = trainer(tmp_path, model, balance, logging_strategy="steps", logging_steps=1)
            if logs:
                balance.log_to(run)
            run.train()
            models.append(model)
        assert same_bits(*models)

    def test_only_a_trainer_logs(self):
        from tests.frameworks.under_transformers import callback

        with pytest.raises(TypeError, match=r"`trainer` should be a transformers\.Trainer\. Found 3"):
            callback().log_to(3)


def test_accelerates_trackers(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.tracking import GeneralTracker

    logged: list[tuple[str, float, int]] = []

    class Tracker(GeneralTracker):
        name = "list"
        requires_logging_directory = False

        @property
        def tracker(self) -> Any:
            return logged

        def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
            logged.extend((name, value, step or 0) for name, value in values.items())

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            pass

    accelerator = accelerate.Accelerator(cpu=True, log_with=Tracker())
    accelerator.init_trackers("run")
    model = small_model()
    monitor = watch(model)
    net, optimizer = accelerator.prepare(model, sgd(model.parameters()))
    recorder = bo.Recorder(monitor, log=lambda name, value, step: accelerator.log({name: value}, step=step))
    for inputs, labels in batches(model, 3):
        optimizer.zero_grad()
        accelerator.backward(torch.nn.functional.cross_entropy(net(*inputs), labels))
        optimizer.step()
    assert logged == [(f"balance/{r.quantity}/{r.modality}", r.value, r.step) for r in recorder.rows()]
    assert {name for name, _, _ in logged} == {name for name in NAMES if "coefficient" not in name}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = small_model()
    twin = copy.deepcopy(model)
    writer = SummaryWriter(str(tmp_path))
    recorder = bo.Recorder(watch(model), log=writer.add_scalar)
    train(model, sgd(model.parameters()), batches(model, 3))
    train(twin, sgd(twin.parameters()), batches(twin, 3))
    writer.close()
    assert same_bits(model, twin)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {name for name in NAMES if "coefficient" not in name}
    scalars = events.Scalars("balance/ratio/audio")
    steps, values = recorder.series("ratio")["audio"]
    assert [event.step for event in scalars] == steps
    assert [event.value for event in scalars] == pytest.approx(values, rel=1e-6)
