"""What a run prints: settings, table, completions, held-out figures, summary."""

import io
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.baseline_validation import BaselineValidation
from fuchsia_pl.callbacks.console import ConsoleReport
from fuchsia_pl.callbacks.console_progress import RunConsole
from fuchsia_pl.callbacks.console_summary import (
    Finished,
    change_lines,
    evaluation_line,
    next_lines,
    summary_lines,
)
from fuchsia_pl.callbacks.console_text import conversation_text
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.callbacks.step_timer import StepTimer
from fuchsia_pl.evaluation.figures import Figure
from fuchsia_pl.evaluation.held_out import HeldOut, write_held_out
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.progress import progress
from fuchsia_pl.stopping import Stopped
from fuchsia_pl.types import Rollout
from tests.doubles import Spread, TinyEnvironment, make_data, make_module, make_trainer, written
from tests.screen import screen_of

WIDTH = 80


class Intervals(Callback):
    """Writes an evaluation of each validation, before the console reads it."""

    def on_validation_epoch_end(self, trainer, pl_module):
        step = trainer.global_step
        figures = {"rollout/accuracy": Figure(0.125 + step / 10, 0.05, 0.75)}
        evaluation = HeldOut(step, "validation", 4, 1, "TinyEnvironment", figures)
        write_held_out(Path(trainer.default_root_dir), [evaluation])


def report_on(terminal: bool = False, every_n_steps: int = 2) -> ConsoleReport:
    report = ConsoleReport(every_n_steps=every_n_steps)
    kind = {"force_terminal": True, "_environ": {"TERM": "xterm"}} if terminal else {}
    report.console = RunConsole(file=io.StringIO(), width=WIDTH, highlight=False, **kind)
    return report


def fit(tiny_model, root, report, *callbacks, loss=None, environment=None, **settings):
    module = make_module(tiny_model, loss or LossConfig(beta=0.01))
    callbacks = StepTimer(), BaselineValidation(), RolloutLog(), *callbacks, report, AdapterExport()
    trainer = make_trainer(root, *callbacks, enable_progress_bar=True, **{"max_steps": 3, **settings})
    trainer.fit(module, datamodule=make_data(module, environment=environment))
    return report.console.file.getvalue()


VALIDATED = {"num_sanity_val_steps": -1, "limit_val_batches": 1.0, "accumulate_grad_batches": 2}


@pytest.fixture(scope="module")
def printed(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "a run"
    root.mkdir()
    (root / "config.yaml").write_text("")
    return root, fit(tiny_model, root, report_on(), Intervals(), **VALIDATED)


def test_the_settings_come_first(printed):
    table = {line.split("  ")[0].strip(): line for line in printed[1].splitlines()}
    assert "of" in table["trained"]
    assert "LoRA r=4" in table["trained"]
    assert "20 in 2 micro-batches on 1 rank(s)" in table["rows per step"]
    assert "TinyEngine" in table["engine"]
    assert "computed once for all siblings" in table["prompts"]


def test_every_step_is_a_row_within_the_width_below_its_titles(printed):
    lines = printed[1].splitlines()
    assert all(len(line) <= WIDTH for line in lines if str(printed[0]) not in line)
    assert not re.search(r"[^\n -~─│╭╮╰╯…]", printed[1]), "no control characters without a terminal"
    titles = [number for number, line in enumerate(lines) if line.startswith(" step ")]
    assert lines[titles[0]].split() == ["step", "reward", "accuracy", "kl", "length", "gap", "s/step", "left"]
    rows = {line.split()[0]: number for number, line in enumerate(lines) if re.match(r"    \d ", line)}
    assert list(rows) == ["1", "2", "3"]
    # The completion after step 2 separates the rows of steps 2 and 3, so the titles are repeated.
    assert [rows["1"], rows["2"], rows["3"]] == [titles[0] + 1, titles[0] + 2, titles[1] + 1]
    assert printed[1].count(", sibling ") == 1
    assert all(lines[number].split()[-1].startswith("0:0") for number in rows.values())


def test_held_out_figures_have_their_intervals(printed):
    lines = [line for line in printed[1].splitlines() if line.startswith("held out, ")]
    assert lines[0].startswith("held out, before training: accuracy 0.125 [0.05, 0.75], reward ")
    assert lines[1].startswith("held out, after step 3: accuracy 0.425 [0.05, 0.75], reward ")


def test_the_summary_has_the_change_the_places_and_the_next_commands(printed):
    root, text = printed
    lines = text.splitlines()
    last = lines[[line.startswith("done: ") for line in lines].index(True) :]
    rollouts = [json.loads(line) for line in (root / "rollouts.jsonl").read_text().splitlines()]
    num_tokens = sum(sum(rollout["completion_mask"]) for rollout in rollouts)
    assert re.fullmatch(rf"done: 3 steps in 0:\d\d, {num_tokens:,} tokens sampled", last[0])
    assert last[1:3] == [
        "held out, step 0 -> 3, 4 items:",
        "  accuracy  0.125 [0.050, 0.750] -> 0.425 [0.050, 0.750]",
    ]
    assert f"  adapter   {root}/adapter" in last
    assert f"  rollouts  {root}/rollouts.jsonl" in last
    assert not any("report.html" in line for line in last), "this run has none"
    assert last[-4:] == [
        "next:",
        f"  fuchsia report '{root}'",
        f"  fuchsia eval --run '{root}' --against base",
        f"  fuchsia chat '{root}'",
    ]


def test_tokens_of_replaced_groups_count(tiny_model, tmp_path):
    text = fit(tiny_model, tmp_path, report_on(), loss=LossConfig("dapo", max_refills=3), environment=Spread())
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) > 3 * 5 * 4
    num_tokens = int(re.search(r"([\d,]+) tokens sampled", text)[1].replace(",", ""))
    assert num_tokens == sum(sum(rollout["completion_mask"]) for rollout in rollouts)


def test_a_terminal_shows_the_same_lines_and_no_trace_of_the_progress(tiny_model, tmp_path, monkeypatch):
    """Also while a reward function prints."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", stream)

    def chatty(rollouts, *args, **kwargs):
        print("scoring \x1b[1mnow\x1b[0m")  # noqa: T201
        time.sleep(0.3)  # so that the display is refreshed while the step is sampled
        return [float(rollout.sibling) for rollout in rollouts]

    class Chatty(TinyEnvironment):
        def __init__(self):
            super().__init__()
            self.reward_functions, self.reward_weights = [chatty], {}

    report = report_on(terminal=True)
    written_text = fit(tiny_model, tmp_path, report, environment=Chatty())
    lines = screen_of(written_text)
    assert lines.count("scoring now") == 3 * 5
    assert not any("━" in line for line in lines)
    assert [line.split()[0] for line in lines if re.match(r"    \d ", line)] == ["1", "2", "3"]
    assert "step 1/3  sampling" in re.sub(r"\x1b\[[0-9;]*m", "", written_text)
    assert any(line.startswith("done: 3 steps in ") for line in lines)
    assert progress.line_start == ""


@pytest.mark.parametrize(("error", "word"), [(LookupError("no loss"), "failed"), (Stopped(15), "stopped")])
def test_an_early_end_says_how_far_the_run_came(tiny_model, tmp_path, error, word):
    class Ending(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                raise error

    report = report_on()
    with pytest.raises(type(error)):
        fit(tiny_model, tmp_path, report, Ending())
    text = report.console.file.getvalue()
    assert re.search(rf"^{word}: 2 steps in 0:\d\d, [\d,]+ tokens sampled$", text, re.MULTILINE)
    assert "done: " not in text
    assert progress.current == ()


def test_an_error_before_training_has_no_summary(tiny_model, tmp_path):
    class Failing(TinyEnvironment):
        def messages(self, item):
            raise LookupError("no question")

    report = report_on()
    with pytest.raises(ValueError, match="no question"):
        fit(tiny_model, tmp_path, report, environment=Failing())
    assert report.console.file.getvalue() == ""


def test_other_ranks_print_nothing(tiny_model, tmp_path):
    report = report_on()
    report.check_run(SimpleNamespace(is_global_zero=False, global_step=0))
    report.announce("model", "engine", "runs/a/0")
    assert report.console.quiet
    assert report.console.file.getvalue() == ""


def test_the_time_left_is_bounded_by_the_runs_time_limit(tiny_model, tmp_path):
    """Without a number of steps, it is the rest of `trainer.max_time`."""
    limits = {"max_steps": -1, "max_epochs": -1}
    text = fit(tiny_model, tmp_path, report_on(every_n_steps=0), Timer({"seconds": 2}), **limits)
    left = [line.split()[-1] for line in text.splitlines() if re.match(r" +\d+ ", line)]
    assert left
    assert set(left) <= {"0:00", "0:01", "0:02"}
    assert left == sorted(left, reverse=True)


def test_no_completion_is_shown_with_an_interval_of_zero(tiny_model, tmp_path):
    assert ", sibling " not in fit(tiny_model, tmp_path, report_on(every_n_steps=0), max_steps=2)


def test_a_conversation_is_shown_with_the_environments_answers_and_without_the_prompts_examples():
    rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="What is 2 plus 2?")
    rollout.messages = [
        {"role": "assistant", "content": "an example"},
        {"role": "user", "content": "What is 2 plus 2?"},
    ]
    for text, answer in (("5", "no"), ("4", None)):
        rollout.append(written(text))
        if answer is not None:
            rollout.respond(answer, role="tool")
        rollout.take_responses(max_chars=10)
    assert conversation_text(rollout.rows[-1]) == "5\n[tool] no\n4"


def evaluation(step: int, value: float, environment: str = "A", **settings) -> HeldOut:
    figures = {"rollout/accuracy": Figure(value, value - 0.1, value + 0.1)}
    return HeldOut(step, "validation", 64, 1, environment, figures, **settings)


def test_a_change_names_the_best_step_the_shared_items_and_each_environment():
    assert change_lines([evaluation(0, 0.2), evaluation(10, 0.7), evaluation(25, 0.6, num_shared=3)]) == [
        "held out, step 0 -> 25, 64 items, 3 of them with the prompt of a training item:",
        "  accuracy  0.200 [0.100, 0.300] -> 0.600 [0.500, 0.700] (best 0.700, step 10)",
    ]
    assert change_lines([evaluation(25, 0.6)])[1] == "  accuracy  0.600 [0.500, 0.700]"
    both = [evaluation(step, 0.5, name) for step in (0, 25) for name in ("A", "B")]
    assert [line for line in change_lines(both) if "step" in line] == [
        "held out of A, step 0 -> 25, 64 items:",
        "held out of B, step 0 -> 25, 64 items:",
    ]
    assert change_lines([]) == []


@pytest.mark.parametrize(
    ("width", "rest"),
    [
        (60, ""),
        (80, ", reward 0.123, pass@8 0.123"),
        (95, ", reward 0.123, pass@8 0.123, maj@8 0.123"),
        (
            200,
            ", reward 0.123 [0.10, 0.20], pass@8 0.123 [0.10, 0.20], maj@8 0.123 [0.10, 0.20], cut off 0.12 [0.10, 0.20]",
        ),
    ],
)
def test_an_evaluation_is_one_line_that_fits(width, rest):
    names = "pass@1", "pass@8", "maj@8", "maj@4", "rollout/truncated_fraction", "rollout/accuracy", "reward/mean"
    line = evaluation_line("after step 25", {name: Figure(0.123456, 0.1, 0.2) for name in names}, width)
    assert len(line) <= width
    assert line.startswith(f"held out, after step 25: accuracy 0.123 [0.10, 0.20]{rest}")


def test_only_a_run_of_the_command_has_next_commands(tmp_path):
    assert next_lines(tmp_path) == []
    assert summary_lines(Finished(tmp_path, 2, 0, 61.0, 1234)) == ["done: 2 steps in 1:01, 1,234 tokens sampled"]
