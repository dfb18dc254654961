"""`fuchsia eval` on the tiny model, in this process."""

import json
from pathlib import Path

import pytest
import yaml

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.evaluate import evaluate
from fuchsia_pl.envs import SingleTurnEnvironment
from fuchsia_pl.evaluation.held_out import read_held_out
from fuchsia_pl.run_record import read_record
from tests.doubles import TinyEngine, tiny_config

HERE = "tests.unit.cli.test_evaluate"


class CountedEngine(TinyEngine):
    starts = 0

    def start(self, spec):
        if self._model is None:
            CountedEngine.starts += 1
        super().start(spec)


class Letters(SingleTurnEnvironment):
    """Correct is an answer with a letter before "n"; three held-out items are training items."""

    def __init__(self):
        super().__init__()
        self.reward_functions = [early]

    def train_items(self):
        return [{"n": n} for n in range(20)]

    def validation_items(self):
        return [{"n": n} for n in range(17, 25)]

    def messages(self, item):
        return [{"role": "user", "content": f"{item['n']}?"}]

    def answer(self, rollout):
        return rollout.completion[:1] or None


def early(rollouts, *args, **kwargs):
    return [float(r.completion[:1] < "n") for r in rollouts]


class Others(Letters):
    def validation_items(self):
        return [{"n": n} for n in range(30, 35)]


@pytest.fixture
def config(tiny_model, command_folder, monkeypatch) -> Path:
    monkeypatch.setattr(CountedEngine, "starts", 0)
    file = command_folder / "tiny.yaml"
    file.write_text(tiny_config(tiny_model, f"{HERE}.Letters", f"{HERE}.CountedEngine", lr=0.3))
    return file


def newest(root: Path) -> Path:
    return max(root.glob("runs/tiny/*"), key=lambda folder: folder.stat().st_ctime_ns)


def test_a_run_is_compared_with_its_base_on_one_engine(config, tmp_path, capsys):
    FuchsiaCLI(["fit", "--config", str(config)])
    CountedEngine.starts = 0
    capsys.readouterr()
    assert evaluate(["--run", "tiny/0", "--against", "base", "--samples", "4"]) == 0
    printed = capsys.readouterr().out
    folder = newest(tmp_path)
    (own,), (base,) = read_held_out(folder), read_held_out(folder / "against")
    assert read_record(folder).step == own.step == 2
    assert CountedEngine.starts == 1
    assert (own.step, base.step, own.num_items, own.num_samples, own.num_shared) == (2, 0, 8, 4, 3)
    assert own.figures["rollout/accuracy"] != base.figures["rollout/accuracy"]
    assert set(own.figures) >= {"mean@4", "pass@1", "pass@2", "pass@4", "maj@4", "reward/early"}
    found = json.loads((folder / "comparison.json").read_text())["environments"]["Letters"]["rollout/accuracy"]
    assert found["value"] == own.figures["rollout/accuracy"].value
    assert found["difference"] == found["value"] - base.figures["rollout/accuracy"].value
    assert "3 of 8 held-out items have the prompt of a training item" in " ".join(printed.split())
    assert printed.count("pass@2") == 1 + 1  # once in the table, once in the comparison
    assert "\nagainst base:\n" in printed
    assert "CountedEngine" in printed
    assert "KeptEngine" not in printed
    assert "temperature 1" in printed  # four greedy samples would be alike
    assert f"{found['value']:.3f} against {found['against']:.3f}: " in printed
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    correct = [[sample["correct"] for sample in line["samples"]] for line in lines]
    assert [len(samples) for samples in correct] == [4] * 8
    assert sum(map(sum, correct)) / 32 == own.figures["rollout/accuracy"].value
    assert [line["in_training"] for line in lines] == [True] * 3 + [False] * 5


def test_base_is_the_model_itself(config, tmp_path):
    """Also of a run whose config loads an adapter."""
    FuchsiaCLI(["fit", "--config", str(config)])
    adapter = str(tmp_path / "runs/tiny/0/adapter")
    evaluate(["--config", str(config)])
    (plain,) = read_held_out(newest(tmp_path))
    evaluate(["--config", str(config), "--adapter", adapter, "--against", "base"])
    (trained,), (base,) = read_held_out(newest(tmp_path)), read_held_out(newest(tmp_path) / "against")
    assert base.figures == plain.figures
    assert trained.figures != base.figures
    evaluate(["--config", str(config), "--against", adapter])
    assert read_held_out(newest(tmp_path))[0].figures == plain.figures
    assert read_held_out(newest(tmp_path) / "against")[0].figures == trained.figures
    evaluate(["--run", "tiny/0", "--against", "tiny/0"])  # a checkpoint and its export
    assert (
        json.loads((newest(tmp_path) / "comparison.json").read_text())["environments"]["Letters"]["rollout/accuracy"][
            "p_value"
        ]
        == 1.0
    )
    assert read_held_out(newest(tmp_path))[0].figures == trained.figures


def test_several_environments_are_evaluated_on_one_engine(config, tmp_path):
    other = yaml.safe_load(config.read_text())
    other["data"]["environment"]["class_path"] = "tests.unit.cli.test_evaluate.Others"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    evaluate(["--config", str(config), "--also", str(tmp_path / "other.yaml"), "--against", "base"])
    found = read_held_out(newest(tmp_path))
    assert [(one.environment, one.num_items) for one in found] == [("Letters", 8), ("Others", 5)]
    assert [one.environment for one in read_held_out(newest(tmp_path) / "against")] == ["Letters", "Others"]
    assert CountedEngine.starts == 1


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (["--num_items", "3"], lambda one: one.num_items == 3),
        (["--max_completion_tokens", "2"], lambda one: one.figures["rollout/completion_tokens"].value == 2.0),
        (["--samples", "2", "--temperature", "0.5"], lambda one: one.num_samples == 2),
    ],
)
def test_options_change_the_evaluation(config, tmp_path, options, changes):
    evaluate(["--config", str(config)])
    (plain,) = read_held_out(newest(tmp_path))
    assert not changes(plain)
    evaluate(["--config", str(config), *options])
    (changed,) = read_held_out(newest(tmp_path))
    assert changes(changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "tiny/0", "--adapter", "x"], "--run and --adapter both choose the weights"),
        (["--run", "none/0"], "'none/0' is no run"),
        (["--adapter", "nowhere"], "nowhere is not the folder of a PEFT adapter"),
        (["--num_items", "0"], "--num_items must be 1 or more, got 0"),
        (["--samples", "0"], "validation_samples must be 1 or more, got 0"),
        (["--samples", "4", "--temperature", "0"], "greedy samples are all alike"),
        (["--max_completion_tokens", "40"], "validation_max_completion_tokens must be above 0 and below max_length=40"),
        (["--num_items", "3", "--trainer.limit_val_batches", "4"], "both limit the items: give one"),
        (["--also", "missing.yaml"], "'missing.yaml' is no file"),
        (["--also", "tiny.yaml"], "--also names another Letters"),
        (["--against", "other/0"], "'other/0' is no run"),
    ],
)
def test_bad_options_are_refused_in_one_line(config, capsys, options, message):
    words = [] if "--run" in options else ["--config", str(config)]
    try:
        code = evaluate([*words, *options])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert said.count("error: ") == 1
    assert CountedEngine.starts == 0
