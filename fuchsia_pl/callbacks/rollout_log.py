"""A log of all rollouts as JSON lines."""

import json
import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

from fuchsia_pl.batch import Batch
from fuchsia_pl.files import append_lines
from fuchsia_pl.types import Evaluation, Rollout

TRAIN_FILE = "rollouts.jsonl"
SPLITS = {
    RunningStage.SANITY_CHECKING: "validation",
    RunningStage.VALIDATING: "validation",
    RunningStage.TESTING: "test",
    RunningStage.PREDICTING: "predict",
}
OWN_NAME = re.compile(rf"rollouts(-({'|'.join(sorted(set(SPLITS.values())))}))?\.jsonl(\.rank\d+)?")


class RolloutLog(Callback):
    """Appends a line per rollout to `rollouts.jsonl`, or to `rollouts-<split>.jsonl` for held-out splits.

    With several ranks, each writes its rollouts to a file that ends in its rank.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Writes the rows of a micro-batch before they are trained, so that the log contains the rows at which a run fails."""
        if batch.step.policy_update > 0:
            return
        is_first = batch_idx % trainer.accumulate_grad_batches == 0  # of its step: logs the facts of the step once
        samples = [*batch.samples, *(batch.step.zero_advantage if is_first else ())]
        unused = batch.step.unused if is_first else ()
        lines = [rollout_line(sample.rollout, trainer.global_step, sample.mean_advantage) for sample in samples]
        lines += [rollout_line(rollout, trainer.global_step, None) for rollout in unused]
        self._append(trainer, TRAIN_FILE, lines)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Evaluation,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the rollouts of a held-out split."""
        assert trainer.state.stage is not None
        lines = [rollout_line(rollout, rollout.policy_version, None) for rollout in batch.rollouts]
        self._append(trainer, f"rollouts-{SPLITS[trainer.state.stage]}.jsonl", lines)

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def _append(self, trainer: Trainer, name: str, lines: list[dict[str, Any]]) -> None:
        suffix = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = Path(trainer.default_root_dir) / (name + suffix)
        append_lines(file, "".join(json_line(line) for line in lines))


def log_files(folder: Path) -> list[Path]:
    """Files of RolloutLog in a run folder, of all splits and ranks."""
    return sorted(path for path in folder.iterdir() if OWN_NAME.fullmatch(path.name) and path.is_file())


def json_line(line: dict[str, Any]) -> str:
    r"""A log line as JSON. An item that JSON cannot represent, such as one with a tuple as a key, is written as its `repr`.

    >>> json_line({"step": 1, "item": {(0, 1): "a"}})
    '{"step": 1, "item": "{(0, 1): \'a\'}"}\n'
    """
    try:
        return json.dumps(line, ensure_ascii=False, default=str) + "\n"
    except (TypeError, ValueError, RecursionError):
        return json.dumps({**line, "item": repr(line["item"])}, ensure_ascii=False, default=str) + "\n"


def rollout_line(rollout: Rollout, step: int, advantage: float | None) -> dict[str, Any]:
    """Log line of a rollout. The advantage is None if the rollout is not trained on."""
    num_prompt_tokens = rollout.num_prompt_tokens
    return {
        "step": step,
        "item_index": rollout.item_index,
        "item": dict(rollout.item),
        "sibling": rollout.sibling,
        "prompt": rollout.prompt,
        "completion": rollout.completion,
        "messages": rollout.messages,
        "prompt_ids": rollout.token_ids[:num_prompt_tokens],
        "completion_ids": rollout.token_ids[num_prompt_tokens:],
        "completion_mask": [int(kept) for kept in rollout.loss_mask[num_prompt_tokens:]],
        "rewards": rollout.rewards,
        "reward": rollout.reward,
        "advantage": advantage,
        "status": rollout.status,
        "counts": rollout.counts,
        "policy_version": rollout.policy_version,
        "policy_versions": rollout.policy_versions[num_prompt_tokens:],
    }
