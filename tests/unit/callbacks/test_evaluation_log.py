"""Files of evaluations, within runs of the tiny model."""

import json
import logging
from pathlib import Path

import pytest

from fuchsia_pl.callbacks.evaluation_log import EvaluationLog, evaluation_files
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.evaluation.held_out import HeldOut, read_held_out
from fuchsia_pl.rollouts.metrics import over_ranks, reward_fractions
from tests.doubles import TinyEnvironment, make_data, make_module, make_trainer


class Shared(TinyEnvironment):
    """Two of four held-out items are training items. Its answer is the first letter; the text of one item is hostile."""

    def validation_items(self):
        return [{"n": n, "text": "</script>\u2028\ud800\x1b[31m"} for n in (18, 19, 20, 21)]

    def is_correct(self, rollout):
        return rollout.item["n"] == 20 or rollout.completion[:1] == "x"

    def answer(self, rollout):
        return rollout.completion[:1]


class Quiet(Shared):
    def train_items(self):
        raise OSError("no network")


def run(tiny_model, root: Path, verb: str = "fit", environment=None, sampling=None, log=None, **settings):
    log = log or EvaluationLog()
    trainer = make_trainer(
        root, log, RolloutLog(), **{"limit_val_batches": 1.0, "max_steps": 2, "max_epochs": -1, **settings}
    )
    module = make_module(tiny_model)
    data = make_data(module, environment=environment or Shared(), steps_per_epoch=1, sampling=sampling or {})
    getattr(trainer, verb)(module, datamodule=data)
    return trainer


def test_every_evaluation_is_a_line_and_every_item_of_it(tiny_model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = run(tiny_model, tmp_path, num_sanity_val_steps=-1)
    found = read_held_out(tmp_path)
    assert [one.key for one in found] == [(step, "validation", "Shared") for step in (0, 1, 2)]
    assert {(one.num_items, one.num_samples, one.num_shared) for one in found} == {(4, 1, 2)}
    assert "2 of 4 held-out items have the prompt of a training item" in caplog.text
    metrics = {name.removeprefix("validation/") for name in trainer.callback_metrics if name.startswith("validation/")}
    assert set(found[0].figures) == metrics - {"count/reward_errors"}
    items = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["item_index"], line["in_training"]) for line in items] == [
        (step, item, item < 2) for step in (0, 1, 2) for item in range(4)
    ]
    assert all(len(line["samples"]) == 1 for line in items)
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts-validation.jsonl").read_text().splitlines()]
    assert [line["samples"][0]["completion"] for line in items] == [line["completion"] for line in rollouts]
    assert [line["samples"][0]["reward"] for line in items] == [line["reward"] for line in rollouts]


def test_one_sample_is_measured_as_before(tiny_model, tmp_path):
    """The metrics are those of all rollouts, to the last digit, and there are no figures of several samples."""

    class Keeps(EvaluationLog):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, *args)
            self.metrics, self.rollouts = batch.metrics, batch.rollouts

    log = Keeps()
    run(tiny_model, tmp_path, "validate", log=log)
    expected = over_ranks(reward_fractions(log.rollouts, Shared(), world_size=1), add_up=lambda values: values)
    assert log.metrics == expected
    assert list(log.metrics) == list(expected)


def test_several_samples_have_pass_and_majority_figures(tiny_model, tmp_path):
    sampling = {"validation_samples": 3, "validation_temperature": 1.0, "validation_max_completion_tokens": 2}
    trainer = run(tiny_model, tmp_path, "test", sampling=sampling)
    (found,) = read_held_out(tmp_path)
    assert (found.split, found.num_samples, found.num_items) == ("test", 3, 4)
    items = [json.loads(line)["samples"] for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert max(sample["tokens"] for samples in items for sample in samples) == 2
    right = [[sample["correct"] for sample in samples] for samples in items]
    assert right[2] == [True] * 3
    values = {name: figure.value for name, figure in found.figures.items()}
    assert values["pass@3"] == sum(map(any, right)) / 4
    assert values["pass@1"] == values["mean@3"] == values["rollout/accuracy"] == sum(map(sum, right)) / 12
    assert 0.0 < found.figures["pass@3"].low < found.figures["pass@3"].high < 1.0
    assert float(trainer.callback_metrics["test/pass@3"]) == values["pass@3"]
    assert float(trainer.callback_metrics["test/maj@3"]) == pytest.approx(values["maj@3"])
    completions = {sample["completion"] for samples in items for sample in samples}
    assert len(completions) > 4  # siblings have their own seeds


def test_without_answers_there_is_no_majority(tiny_model, tmp_path):
    run(tiny_model, tmp_path, "validate", TinyEnvironment(), {"validation_samples": 2, "validation_temperature": 1.0})
    (found,) = read_held_out(tmp_path)
    assert "pass@2" in found.figures
    assert "maj@2" not in found.figures


def test_a_sanity_check_of_some_items_is_no_evaluation(tiny_model, tmp_path):
    run(tiny_model, tmp_path, num_sanity_val_steps=2)
    assert [one.step for one in read_held_out(tmp_path)] == [1, 2]


def test_a_resumed_run_starts_with_the_evaluations_before_and_repeats_none(tiny_model, tmp_path):
    log = EvaluationLog()
    log.earlier = [HeldOut(step, "validation", 4, 1, "Shared") for step in (0, 1)]
    run(tiny_model, tmp_path, log=log)
    assert [(one.step, bool(one.figures)) for one in read_held_out(tmp_path)] == [(0, False), (1, False), (2, True)]
    assert {json.loads(line)["step"] for line in (tmp_path / "evaluation.jsonl").open()} == {2}
    assert evaluation_files(tmp_path) == [tmp_path / "evaluation.jsonl"]


def test_a_split_is_evaluated_without_training_items(tiny_model, tmp_path):
    run(tiny_model, tmp_path, "validate", Quiet())
    (found,) = read_held_out(tmp_path)
    assert found.num_shared is None
    assert json.loads((tmp_path / "evaluation.jsonl").read_text().splitlines()[0])["in_training"] is None


def test_an_error_of_the_answer_names_its_place(tiny_model, tmp_path):
    class Broken(Shared):
        def answer(self, rollout):
            raise SystemExit("no answer")

    with pytest.raises(Exception, match=r"Broken\.answer raised SystemExit"):
        run(tiny_model, tmp_path, "validate", Broken())
