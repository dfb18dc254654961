"""Tables of completions, and the summary of a run, in loggers that show them."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import WandbLogger

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.completions_table import CompletionsTable, markdown, shown, spread, table_row
from fuchsia_pl.callbacks.run_summary import RunSummary
from fuchsia_pl.types import ConfigError, Rollout
from tests.doubles import make_data, make_module, make_trainer
from tests.unit.callbacks.test_health import Rewarded, Scripted, by_sibling

HOSTILE = "<script>alert(1)</script>\n# title\n```\n    code\n\x1b[2J\x00\u202egnp\ud800"


class FakeRun:
    """What WandbLogger and our callbacks use of a run of Weights & Biases."""

    def __init__(self) -> None:
        self.id = "abc"
        self.summary: dict[str, float] = {}
        self.config = SimpleNamespace(update=lambda *args, **kwargs: None)
        self.logged: list[dict] = []
        self.artifacts: list = []

    def log(self, values) -> None:
        self.logged.append(values)

    def log_artifact(self, artifact) -> None:
        self.artifacts.append(artifact)


def fit(tiny_model, root, *callbacks, steps=4, **settings) -> FakeRun:
    run = FakeRun()
    module = make_module(tiny_model, enabled=False)
    data = make_data(module, Scripted(), Rewarded(by_sibling), batch_size=2, steps_per_epoch=steps)
    sync = AdapterSync(tolerance=1e6)
    trainer = make_trainer(
        root, *callbacks, sync=sync, max_steps=steps, logger=WandbLogger(experiment=run, save_dir=root), **settings
    )
    trainer.fit(module, datamodule=data)
    return run


def tables_of(run: FakeRun, name: str) -> list[tuple[int, object]]:
    return [(values["trainer/global_step"], values[name]) for values in run.logged if name in values]


def test_a_table_is_logged_every_few_steps_and_after_each_validation(tiny_model, tmp_path):
    table = CompletionsTable(every_n_steps=2, max_rows=3)
    run = fit(tiny_model, tmp_path, table, limit_val_batches=2, check_val_every_n_epoch=1)
    found = tables_of(run, "completions/train")
    assert [step for step, _ in found] == [1, 3]  # the second and the fourth step, counted from 0 as all metrics
    for _, wandb_table in found:
        assert wandb_table.columns[:4] == ["item", "sibling", "reward", "advantage"]
        assert len(wandb_table.data) == 3
        assert [row[2] for row in wandb_table.data] == [0.75, 0.25, 0.0]  # of 8 rewards, 2 each of 0.75, 0.5, 0.25, 0
    ((step, held_out),) = tables_of(run, "completions/validation")
    assert (step, len(held_out.data)) == (3, 2)


def test_settings_of_the_table_change_it(tiny_model, tmp_path):
    assert tables_of(fit(tiny_model, tmp_path, CompletionsTable(every_n_steps=0)), "completions/train") == []
    run = fit(tiny_model, tmp_path, CompletionsTable(every_n_steps=4, max_rows=5, max_chars=20), steps=4)
    ((_, table),) = tables_of(run, "completions/train")
    assert len(table.data) == 5


@pytest.mark.parametrize("settings", [{"every_n_steps": -1}, {"max_rows": 0}, {"max_chars": 19}])
def test_settings_without_a_meaning_are_refused(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=f"^completions_table.{name} must be "):
        CompletionsTable(**settings)


def test_the_rows_are_spread_over_the_ranking_with_the_best_and_the_worst():
    rewards = [None, 3.0, 1.0, 7.0, 5.0, 0.0]
    rollouts = [(Rollout({}, 0, n, 1.0, "", reward=reward), None) for n, reward in enumerate(rewards)]
    assert [r.reward for r, _ in spread(rollouts, 3)] == [7.0, 3.0, None]
    assert [r.reward for r, _ in spread(rollouts, 9)] == [7.0, 5.0, 3.0, 1.0, 0.0, None]
    assert [r.reward for r, _ in spread(rollouts, 1)] == [7.0]


def test_a_hostile_completion_is_neither_markup_nor_a_control_sequence():
    text = shown(HOSTILE, max_chars=1000)
    assert not any(character in text for character in "\x1b\x00\u202e\ud800")
    text.encode()  # no lone surrogate is left
    lines = markdown([{"item": 1, "prompt": text, "completion": text}]).split("\n")
    assert lines[0] == "**item** 1"
    assert all(line == "" or line.startswith("    ") for line in lines[1:])  # all of it is code
    assert len(shown("x" * 1_000_000, max_chars=100)) < 130


def test_a_row_has_every_reward():
    rollout = Rollout({}, 3, 1, 1.0, "2+2", reward=0.5, rewards={"right": 0.5, "form": None})
    row = table_row(rollout, 0.25, max_chars=100)
    assert (row["item"], row["sibling"], row["advantage"], row["reward/right"], row["reward/form"]) == (
        3,
        1,
        0.25,
        0.5,
        None,
    )


def evaluated(summary: RunSummary, run: FakeRun, step: int, **metrics: float) -> None:
    trainer = SimpleNamespace(
        global_step=step,
        sanity_checking=False,
        is_global_zero=True,
        loggers=[WandbLogger(experiment=run)],
        callback_metrics={name.replace("__", "/"): value for name, value in metrics.items()},
    )
    summary.on_validation_end(trainer, None)


def test_the_summary_has_the_best_and_the_last_held_out_figures():
    summary, run = RunSummary(), FakeRun()
    evaluated(summary, run, 5, validation__reward__mean=0.4, validation__rollout__turns=2.0, reward__mean=9.0)
    evaluated(summary, run, 10, validation__reward__mean=0.7, validation__rollout__turns=4.0)
    resumed = RunSummary()
    resumed.load_state_dict(summary.state_dict())
    evaluated(resumed, run, 15, validation__reward__mean=0.6, validation__rollout__turns=3.0)
    assert run.summary == {
        "last/validation/reward/mean": 0.6,
        "last/validation/rollout/turns": 3.0,
        "best/validation/reward/mean": 0.7,
        "best_step/validation/reward/mean": 10,
    }


@pytest.mark.parametrize("is_wanted", [True, False])
def test_the_adapter_is_an_artifact_only_by_a_setting(tiny_model, tmp_path, is_wanted):
    run = fit(tiny_model, tmp_path, AdapterExport(), RunSummary(adapter_artifact=is_wanted), steps=1)
    assert len(run.artifacts) == is_wanted
    if is_wanted:
        (artifact,) = run.artifacts
        exported = {file.name for file in (tmp_path / "adapter").iterdir()}
        assert set(artifact.manifest.entries) == exported
        assert (artifact.type, artifact.metadata["optimizer_steps"]) == ("model", 1)
