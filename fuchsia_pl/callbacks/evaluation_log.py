"""Files of the evaluations of a run: a line per evaluation, and a line per item."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.callbacks.rollout_log import json_line, turn_fields
from fuchsia_pl.evaluation.held_out import ITEMS_FILE, HeldOut, write_held_out
from fuchsia_pl.evaluation.measures import Grade, HeldOutEvaluation
from fuchsia_pl.files import append_lines
from fuchsia_pl.samples import Evaluation
from fuchsia_pl.types import Rollout, shortened

OWN_NAME = re.compile(rf"{re.escape(ITEMS_FILE)}(\.rank\d+)?")
MAX_ANSWER_CHARS = 1000


class EvaluationLog(Callback):
    """Appends figures with intervals to `held_out.jsonl`, and the samples of each item to `evaluation.jsonl`.

    With several ranks, each writes its items to a file that ends in its rank; the figures are over all ranks. A sanity check of
    the first items only is not an evaluation. A run that resumes another one starts with the evaluations of its steps.
    """

    def __init__(self) -> None:
        self.earlier: Sequence[HeldOut] = ()
        self.latest: HeldOutEvaluation | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the evaluations of the run that this one resumes."""
        self.earlier = trainer.strategy.broadcast(self.earlier)  # only the first rank has read them
        if trainer.is_global_zero:
            write_held_out(Path(trainer.default_root_dir), self.earlier)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Evaluation,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes an evaluation, before its metrics are logged."""
        if not isinstance(batch, HeldOutEvaluation) or not batch.is_whole:
            return
        self.latest = batch
        if batch.held_out.key in {one.key for one in self.earlier}:
            return  # a resumed run repeats an evaluation that the run before it has recorded
        suffix = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        folder = Path(trainer.default_root_dir)
        append_lines(folder / (ITEMS_FILE + suffix), "".join(json_line(line) for line in item_lines(batch)))
        if trainer.is_global_zero:
            write_held_out(folder, [batch.held_out])

    on_test_batch_end = on_validation_batch_end


def evaluation_files(folder: Path) -> list[Path]:
    """Files with a line per item in a run folder, of all ranks."""
    return sorted(path for path in folder.iterdir() if OWN_NAME.fullmatch(path.name) and path.is_file())


def item_lines(evaluation: HeldOutEvaluation) -> Iterator[dict[str, Any]]:
    """A line per item of this rank, in order, with all of its samples."""
    held_out = evaluation.held_out
    judged = list(zip(evaluation.rollouts, evaluation.grades, strict=True))
    for start in range(0, len(judged), held_out.num_samples):
        samples = judged[start : start + held_out.num_samples]
        first = samples[0][0]
        yield {
            "step": held_out.step,
            "split": held_out.split,
            "environment": held_out.environment,
            "item_index": first.item_index,
            "item": dict(first.item),
            "in_training": None if held_out.num_shared is None else first.item_index in evaluation.shared,
            "samples": [_sample(rollout, grade) for rollout, grade in samples],
        }


def _sample(rollout: Rollout, grade: Grade) -> dict[str, Any]:
    return {
        "reward": rollout.reward,
        "rewards": rollout.rewards,
        **turn_fields(rollout),
        "correct": grade.correct,
        "answer": None if grade.answer is None else shortened(grade.answer, MAX_ANSWER_CHARS),
        "status": rollout.status,
        "tokens": rollout.num_sampled_tokens,
        "completion": rollout.completion,
    }
