"""Steps whose rows fill fewer micro-batches than they may have: Lightning still gets the planned number."""

import csv
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.console import ConsoleReport
from fuchsia_pl.callbacks.console_settings import run_table
from fuchsia_pl.callbacks.finite import FiniteGuard
from fuchsia_pl.callbacks.rollout_log import GAPS_FILE, RolloutLog
from fuchsia_pl.callbacks.step_timer import StepTimer
from fuchsia_pl.cli.replay import replay
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.progress import TRAINING, progress
from tests.doubles import RecordedEngine, TinyEngine, make_data, make_module, make_trainer

SGD = torch.optim.SGD
NUM_GROUPS, GROUP = 5, 4
# A group with the longest rows has 11 + 4 x 5 = 31 tokens. 62 hold two of these, so 3 micro-batches are planned for 5 groups.
# The engine samples 2 to 6 tokens, so that most steps fill two.
BUDGET, PLANNED = 62, 3


class Kept(Callback):
    """Keeps micro-batches, forwards, gradients and the lists of the trainer's logprobs of each step."""

    def __init__(self) -> None:
        self.batches, self.losses, self.gradients, self.logprobs = [[]], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches[-1].append(batch)
        self.losses.append(outputs["loss"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.batches.append([])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = [p.grad.clone().flatten() for p in pl_module.policy.trainable_parameters()]
        self.gradients.append(torch.cat(found))
        self.logprobs.append(list(pl_module.trainer_logprobs))

    @property
    def filled(self) -> list[int]:
        """Micro-batches with rows, of each step."""
        return [sum(batch.has_rows for batch in step) for step in self.batches if step]


def fit(model, root, *callbacks, loss=None, budget: int | None = BUDGET, engine=None, **settings):
    torch.manual_seed(0)
    module = make_module(model, loss)
    module.policy_config.max_tokens_per_micro_batch = budget
    number = 1 if budget else PLANNED
    given = {"sync": AdapterSync(tolerance=100.0), "accumulate_grad_batches": number, "max_steps": 3, **settings}
    trainer = make_trainer(root, *callbacks, **given)
    data = make_data(module, engine or RecordedEngine(), batch_size=NUM_GROUPS)
    trainer.fit(module, datamodule=data)
    assert trainer.accumulate_grad_batches == PLANNED
    return module, trainer


def test_loss_and_gradient_are_those_of_the_planned_number(tiny_model, tmp_path):
    """The same rows, in two or three micro-batches. Without a budget all three have rows."""
    found = []
    for name, budget in (("filled", BUDGET), ("balanced", None)):
        kept, root = Kept(), tmp_path / name
        logger = CSVLogger(root, name="", version="")
        fit(tiny_model, root, kept, StepTimer(), budget=budget, logger=logger, log_every_n_steps=1, max_steps=1)
        with (root / "metrics.csv").open() as stream:
            found.append((kept, next(csv.DictReader(stream))))
    (filled, row), (balanced, expected) = found
    assert (filled.filled, balanced.filled) == ([2], [3])
    assert [batch.has_rows for batch in filled.batches[0]] == [False, True, True]
    norm = balanced.gradients[0].norm()
    assert (filled.gradients[0] - balanced.gradients[0]).norm() <= 1e-6 * norm
    assert norm > 1e-3
    names = [name for name in expected if name.startswith(("train/", "rollout/", "reward/")) and "per_s" not in name]
    assert len(names) > 10
    for name in names:
        assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-6, abs=1e-6), name
    # 2 micro-batches of 62 tokens; the number and the share are logged with a budget only.
    computed = sum(batch.num_computed_tokens(True) for batch in filled.batches[0])
    assert float(row["perf/micro_batches"]) == 2
    assert float(row["perf/budget_used"]) == pytest.approx(computed / (2 * BUDGET))
    assert "perf/micro_batches" not in expected


def test_nothing_is_computed_for_a_micro_batch_without_rows_and_lightning_warns_of_nothing(
    tiny_model, tmp_path, monkeypatch, caplog
):
    kept, forwards = Kept(), []
    original = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, batch: forwards.append(batch.has_rows) or original(self, batch))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tiny_model, tmp_path, kept, loss=LossConfig(beta=0.1))
    assert sum(kept.filled) < 3 * PLANNED
    assert forwards == [True] * (2 * sum(kept.filled))  # of the policy and of its reference
    assert not any("training_step" in str(warning.message) for warning in caught)
    assert "training_step" not in caplog.text


def test_trainer_logprobs_stay_those_of_their_micro_batch_over_all_updates(tiny_model, tmp_path):
    kept = Kept()
    still = make_module(tiny_model, LossConfig("grpo", num_policy_updates=2), lambda p: SGD(p, lr=0.0))
    still.policy_config.max_tokens_per_micro_batch = BUDGET
    trainer = make_trainer(tmp_path, kept, sync=AdapterSync(tolerance=100.0), max_epochs=-1, max_steps=4)
    trainer.fit(still, datamodule=make_data(still, RecordedEngine(), batch_size=NUM_GROUPS, steps_per_epoch=4))
    assert kept.filled[0] == kept.filled[1]
    assert min(kept.filled) < PLANNED
    for step, logprobs in zip(kept.batches, kept.logprobs, strict=False):
        assert [each.shape for each in logprobs] == [batch.loss_mask.shape for batch in step]
    assert all(torch.equal(*pair) for pair in zip(kept.logprobs[0], kept.logprobs[1], strict=True))


def test_the_step_is_recorded_and_replayed_bit_for_bit(tiny_model, tmp_path, capsys):
    kept = Kept()
    fit(tiny_model, tmp_path, FiniteGuard(record_steps=(1,)), kept, max_steps=1)
    assert replay([str(tmp_path / "recorded/step-1.pt")]) == 0
    out = capsys.readouterr().out
    assert [line.partition(":")[0] for line in out.splitlines() if line.startswith("micro-batch")] == [
        f"micro-batch {number + 1}" for number in range(kept.filled[0])
    ]
    assert kept.filled[0] < PLANNED


def test_the_console_counts_the_micro_batches_that_the_rows_fill(tiny_model, tmp_path):
    kept, ends, tables = Kept(), [], []

    class Watch:
        def started(self, activity):
            pass

        def ended(self, activity, is_complete):
            if activity.name == TRAINING:
                ends.append((activity.done, activity.total, is_complete))

    class Table(Callback):
        def on_train_start(self, trainer, pl_module):
            tables.append(" ".join(str(cell) for column in run_table(trainer).columns for cell in column.cells))

    console, watch = ConsoleReport(every_n_steps=0), Watch()
    console.disable()
    progress.watch(watch)
    try:
        fit(tiny_model, tmp_path, console, kept, Table(), enable_progress_bar=True)
    finally:
        progress.unwatch(watch)
    assert ends == [(number, number, True) for number in kept.filled]
    assert "20 in at most 3 micro-batches on 1 rank(s)" in tables[0]


def test_a_run_with_a_budget_is_probed(tiny_model, tmp_path):
    kept, sync = Kept(), AdapterSync(tolerance=10.0)
    fit(tiny_model, tmp_path, kept, engine=TinyEngine(), sync=sync, budget=68)
    assert sync.agreement is not None
    assert sync.agreement.slope == pytest.approx(1.0, abs=0.05)


def test_gaps_are_written_for_every_row(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, RolloutLog(), loss=LossConfig(beta=0.1), max_steps=2)
    assert len((tmp_path / GAPS_FILE).read_text().splitlines()) == 2 * NUM_GROUPS * GROUP


@pytest.mark.parametrize("loss", [LossConfig("ppo", advantage="gae"), LossConfig(kl_in="reward", beta=0.1)])
def test_signals_of_all_rows_are_computed_before_the_advantages(tiny_model, tmp_path, loss):
    kept = Kept()
    fit(tiny_model, tmp_path, kept, loss=loss)
    assert min(kept.filled) < PLANNED
    assert all(gradient.isfinite().all() for gradient in kept.gradients)


def test_a_scaler_of_half_precision_gets_no_wrong_scale(tiny_model, tmp_path):
    """A constant as the first loss of a step: gradients are those without a scaler."""
    found = []
    for name in ("scaled", "plain"):
        kept = Kept()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if name == "scaled" else []
        more = {"plugins": plugins} if plugins else {}
        fit(tiny_model, tmp_path / name, kept, FiniteGuard(), max_steps=1, **more)
        assert kept.filled == [2]
        found.append(kept.gradients[0])
    assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()
