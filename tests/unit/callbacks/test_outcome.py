"""The warning of a run that has trained nothing."""

from types import SimpleNamespace

import pytest

from fuchsia_pl.callbacks.outcome import Outcome
from tests.doubles import Constant, make_data, make_module, make_trainer


def warnings_of(caplog) -> list[str]:
    return [f"warning: {record.getMessage()}" for record in caplog.records if record.name.endswith(".outcome")]


def test_a_resumed_run_that_is_over_already_says_so(tiny_model, tmp_path, caplog):
    module, outcome = make_module(tiny_model), Outcome()
    trainer = make_trainer(tmp_path, outcome, max_steps=2)
    trainer.fit(module, datamodule=make_data(module))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert warnings_of(caplog) == []
    trainer = make_trainer(tmp_path, outcome, max_steps=2, max_epochs=-1)
    trainer.fit(module, datamodule=make_data(module), ckpt_path=tmp_path / "x.ckpt")
    (line,) = warnings_of(caplog)
    assert line == "warning: nothing was trained: trainer.max_steps=2 is reached already, at step 2. Raise it"


@pytest.mark.parametrize(
    ("environment", "settings", "words"),
    [
        (Constant(), {"max_steps": 2}, "all 2 steps were skipped, since no rollout had an advantage"),
        (None, {"limit_train_batches": 0}, "trainer.limit_train_batches is 0. Leave it out"),
        (None, {"max_epochs": 0}, "trainer.max_epochs=0 is reached already, at epoch 0. Raise it"),
    ],
    ids=["no spread", "no batches", "no epochs"],
)
def test_a_finished_run_that_trained_nothing_says_why(tiny_model, tmp_path, caplog, environment, settings, words):
    module = make_module(tiny_model)
    make_trainer(tmp_path, Outcome(), **settings).fit(module, datamodule=make_data(module, environment=environment))
    (line,) = warnings_of(caplog)
    assert line == f"warning: nothing was trained: {words}" or line.startswith(
        f"warning: nothing was trained: {words}; see"
    )


def test_a_run_whose_steps_were_skipped_for_two_causes_counts_both(tiny_model, caplog):
    outcome, trainer = Outcome(), SimpleNamespace(global_step=0, is_global_zero=True, optimizers=[], max_epochs=1)
    trainer.lightning_module = module = make_module(tiny_model)
    module.skip_reason = "a cause"
    outcome.on_train_start(trainer, module)
    for step in range(10):
        trainer.global_step = step + 1
        reason = "no rollout has an advantage" if step < 9 else None
        batch = SimpleNamespace(step=SimpleNamespace(skip_reason=reason))
        outcome.on_train_batch_end(trainer, module, None, batch, step)
    outcome.on_fit_end(trainer, module)
    assert warnings_of(caplog) == [
        "warning: nothing was trained: all 10 steps were skipped: in 9 no rollout had an advantage, see train/skipped and "
        "reward/*; in 1 numbers were not finite, see train/nonfinite"
    ]
