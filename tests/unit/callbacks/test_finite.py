"""Injected numbers that are not finite reach neither the weights nor a file."""

import csv
import errno
import itertools
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.finite import FiniteGuard, NonFiniteError
from fuchsia_pl.callbacks.outcome import Outcome
from fuchsia_pl.callbacks.run_checkpoint import AtomicCheckpointIO, RunCheckpoint
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.types import ConfigError
from tests.doubles import make_data, make_module, make_trainer


class Poison(Callback):
    """Writes a number into a gradient or into the optimizer state in some steps."""

    def __init__(self, what: str, number: float, *steps: int) -> None:
        self.what, self.number, self.steps = what, number, steps
        self.weights: list[list[torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append([p.detach().clone() for p in pl_module.policy.trainable_parameters()])

    def on_after_backward(self, trainer, pl_module):
        if self.what == "gradient" and trainer.global_step in self.steps:
            pl_module.policy.trainable_parameters()[-1].grad.view(-1)[3] = self.number

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in self.steps and self.what in ("momentum", "variance"):
            key = {"momentum": "exp_avg", "variance": "exp_avg_sq"}[self.what]
            next(iter(optimizer.state.values()))[key].view(-1)[0] = self.number


def fit(tiny_model, root: Path, poison: Poison, guard: FiniteGuard | None = None, **settings):
    module = make_module(tiny_model, settings.pop("loss", None))
    if poison.what == "loss":
        module.training_step = poisoned_loss(module, poison)
    if poison.what == "logprobs":
        module.configure_model()
        module.policy.output = poisoned_output(module, poison)
    callbacks = [guard or FiniteGuard(), poison, Outcome(), AdapterExport(), RunCheckpoint(every_n_steps=1)]
    steps_per_epoch = settings.pop("steps_per_epoch", 10)
    trainer = make_trainer(
        root,
        *callbacks,
        *settings.pop("more", ()),
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=1,
        logger=CSVLogger(root, name="", version=""),
        accumulate_grad_batches=2,
        max_epochs=-1,
        **{"gradient_clip_val": 1.0, "max_steps": 3, **settings},
    )
    try:
        trainer.fit(module, datamodule=make_data(module, batch_size=2, steps_per_epoch=steps_per_epoch))
    finally:
        poison.weights.append([p.detach().clone() for p in module.policy.trainable_parameters()])
    return trainer


def poisoned_loss(module, poison: Poison):
    step = module.training_step
    return lambda batch, batch_idx: (
        step(batch, batch_idx) * (poison.number if module.global_step in poison.steps else 1.0)
    )


def poisoned_output(module, poison: Poison):
    output = module.policy.output

    def poisoned(batch):
        found = output(batch)
        if module.global_step in poison.steps:
            found.logprobs.data.fill_(poison.number)
        return found

    return poisoned


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "metrics.csv").open() as stream:
        return [row for row in csv.DictReader(stream) if row["train/grad_norm"]]


def files_are_finite(root: Path) -> bool:
    state = torch.load(root / "checkpoints/last.ckpt", weights_only=True)
    return all(tensor.isfinite().all() for tensor in state["state_dict"].values())


@pytest.mark.parametrize(
    ("what", "number"),
    [
        *itertools.product(["gradient", "loss"], [math.nan, math.inf, -math.inf]),
        ("logprobs", math.nan),
        ("logprobs", -math.inf),
    ],
)
def test_a_step_with_a_number_that_is_not_finite_is_skipped_and_counted(tiny_model, tmp_path, what, number):
    poison = Poison(what, number, 1)
    trainer = fit(tiny_model, tmp_path, poison)
    assert trainer.global_step == 3
    assert [float(row["train/nonfinite"]) for row in rows(tmp_path)] == [0.0, 1.0, 0.0]
    assert [float(row["train/skipped"]) for row in rows(tmp_path)] == [0.0, 1.0, 0.0]
    # Two micro-batches a step: the weights at the start of each step, and at the end.
    first, second, third, end = (poison.weights[place] for place in (0, 2, 4, 6))
    assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))  # momentum did not move them either
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(third, end, strict=True))
    assert all(weight.isfinite().all() for weight in end)
    assert files_are_finite(tmp_path)


def test_the_run_stops_after_so_many_in_a_row_and_what_was_saved_before_is_whole(tiny_model, tmp_path):
    # Steps 1 and 3 to 5 of 10, counted from 0: a good step between them resets the count.
    with pytest.raises(
        NonFiniteError, match=r"^step 6: the loss or the gradient is not finite.*3 sets of rollouts in a row"
    ):
        fit(tiny_model, tmp_path, Poison("gradient", math.nan, 1, 3, 4, 5), max_steps=10)
    assert files_are_finite(tmp_path)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    # Each may be as large as a checkpoint, so the last three stay.
    assert sorted(file.name for file in (tmp_path / "recorded").iterdir()) == ["step-4.pt", "step-5.pt", "step-6.pt"]
    guard = FiniteGuard(max_nonfinite_steps=1)
    with pytest.raises(NonFiniteError, match=r"^step 2: .*max_nonfinite_steps is 1"):
        fit(tiny_model, tmp_path / "one", Poison("gradient", math.nan, 1), guard)
    with pytest.raises(ConfigError, match=r"finite_guard.max_nonfinite_steps must be 1 or more, got 0"):
        FiniteGuard(max_nonfinite_steps=0)


@pytest.mark.parametrize(
    ("loss", "last"),
    [
        # Phases of four steps, all of them bad but step 5. Counted are steps 1; 6, 9 and 13, counted from 1.
        (LossConfig(num_policy_updates=4), 13),
        # Two passes over two sets of rollouts. Counted are steps 1 and 2; 6, 9 and 10.
        (LossConfig(num_policy_updates=2, mini_batches=2), 10),
    ],
    ids=["updates", "mini-batches"],
)
def test_steps_that_train_the_same_rollouts_count_as_one(tiny_model, tmp_path, loss, last):
    poison = Poison("gradient", math.nan, *range(4), *range(5, 16))
    with pytest.raises(NonFiniteError, match=rf"^step {last}: .*3 sets of rollouts in a row"):
        fit(tiny_model, tmp_path, poison, loss=loss, steps_per_epoch=16, max_steps=16)


@pytest.mark.parametrize("is_scaled", [True, False], ids=["the scaler's search", "the loss itself"])
def test_a_scaler_that_looks_for_its_factor_is_left_to_it(tiny_model, tmp_path, is_scaled):
    """A factor of 2^100 makes the gradients infinite, since half precision ends at 65504, and the next factor is 1."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-100)
    poison, guard = Poison("" if is_scaled else "loss", math.inf, 0), FiniteGuard(max_nonfinite_steps=1)
    module = make_module(tiny_model)
    if not is_scaled:
        module.training_step = poisoned_loss(module, poison)
    plugins, sync = [MixedPrecision("16-mixed", "cpu", scaler)], AdapterSync(tolerance=1.0)
    trainer = make_trainer(tmp_path, guard, poison, plugins=plugins, sync=sync, max_steps=2)
    if is_scaled:
        trainer.fit(module, datamodule=make_data(module, batch_size=2))
        assert trainer.global_step == 2
        assert scaler.get_scale() == 1.0
        first, second = poison.weights
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not (tmp_path / "recorded").exists()
        last = module.policy.trainable_parameters()
        assert not all(torch.equal(a, b) for a, b in zip(second, last, strict=True))
    else:
        with pytest.raises(NonFiniteError, match=r"^step 1: .*losses of the micro-batches inf"):
            trainer.fit(module, datamodule=make_data(module, batch_size=2))
        assert (tmp_path / "recorded/step-1.pt").exists()


def test_a_step_that_finds_no_room_to_be_recorded_is_skipped_all_the_same(tiny_model, tmp_path, monkeypatch, caplog):
    def full(content, stream):
        stream.write(b"a part")
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr("fuchsia_pl.callbacks.recorded_step.torch.save", full)
    trainer = make_trainer(tmp_path, FiniteGuard(), poison := Poison("gradient", math.nan, 0), max_steps=2)
    module = make_module(tiny_model)
    trainer.fit(module, datamodule=make_data(module, batch_size=2))
    assert trainer.global_step == 2
    first, second = poison.weights
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    warned = [record.getMessage() for record in caplog.records if record.name.endswith(".finite")]
    assert [line.partition(" cannot be")[0] for line in warned] == [
        f"step 1 is not recorded: {tmp_path}/recorded/step-1.pt"
    ]
    assert "No space left on device" in warned[0]
    assert "gradient norm nan); it could not be recorded" in caplog.text
    assert not list((tmp_path / "recorded").iterdir())


@pytest.mark.parametrize(
    ("what", "number", "named"),
    [("momentum", math.nan, "policy.model"), ("variance", math.inf, "exp_avg_sq of policy.model")],
)
def test_weights_or_a_state_that_are_not_finite_stop_the_run_before_anything_is_written(
    tiny_model, tmp_path, what, number, named
):
    saver = OnExceptionCheckpoint(tmp_path / "exceptions")
    with pytest.raises(NonFiniteError, match=f"^after step 2 .* are not finite: .*{named}"):
        fit(tiny_model, tmp_path, Poison(what, number, 1), more=[saver])
    assert files_are_finite(tmp_path)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 1
    assert not list((tmp_path / "exceptions").glob("*"))


def test_a_checkpoint_with_such_a_state_is_not_continued_from(tiny_model, tmp_path):
    fit(tiny_model, tmp_path, Poison("", 0.0), max_steps=1)
    file = tmp_path / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].view(-1)[0] = math.inf
    torch.save(checkpoint, file)
    module = make_module(tiny_model)
    trainer = make_trainer(tmp_path / "resumed", FiniteGuard(), max_epochs=-1, max_steps=2)
    with pytest.raises(NonFiniteError, match=r"^after step 1 .* not finite: exp_avg of policy\.model"):
        trainer.fit(module, datamodule=make_data(module), ckpt_path=file)


def test_a_run_whose_steps_were_all_skipped_names_the_cause(tiny_model, tmp_path, caplog):
    fit(tiny_model, tmp_path, Poison("gradient", math.nan, 0), max_steps=1)
    told = [record.getMessage() for record in caplog.records if "nothing was trained" in record.getMessage()]
    assert told == ["nothing was trained: all 1 steps were skipped, since numbers were not finite; see train/nonfinite"]
