"""A log of all rollouts as JSON lines."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import data_of, module_of
from fuchsia_pl.files import append_lines
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.samples import Evaluation
from fuchsia_pl.types import Rollout, Row

TRAIN_FILE = "rollouts.jsonl"
GAPS_FILE = "gaps.jsonl"
SPLITS = {
    RunningStage.SANITY_CHECKING: "validation",
    RunningStage.VALIDATING: "validation",
    RunningStage.TESTING: "test",
    RunningStage.PREDICTING: "predict",
}
# Control characters, which JSON writes as they are above 0x7e, line and paragraph separators, and marks that reorder text.
INVISIBLE = {
    code: f"\\u{code:04x}"
    for code in (*range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
}
OWN_NAME = re.compile(rf"(rollouts(-({'|'.join(sorted(set(SPLITS.values())))}))?|gaps)\.jsonl(\.rank\d+)?")
DECIMALS = 5  # of logprobs and advantages per token; a float32 logprob of -10 has six


class RolloutLog(Callback):
    """Appends a line per row of a rollout to `rollouts.jsonl`, or to `rollouts-<split>.jsonl` for held-out splits.

    With several ranks, each writes its rollouts to a file that ends in its rank.

    Args:
        tokens: Whether the lines contain the text, the logprob and, where they differ, the advantage of each sampled token, and
            `gaps.jsonl` the difference between the trainer's logprobs and these. The report colours tokens by them. This takes
            about 8 microseconds per token on the first core: turn it off for millions of tokens per step.
    """

    def __init__(self, tokens: bool = True) -> None:
        self.tokens = tokens

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Writes the rows of a micro-batch before they are trained, so that the log contains the rows at which a run fails."""
        if batch.step.policy_update > 0:
            return
        is_first = batch_idx % trainer.accumulate_grad_batches == 0  # of its step: logs the facts of the step once
        samples = [*batch.samples, *(batch.step.zero_advantage if is_first else ())]
        unused = batch.step.unused if is_first else ()
        lines = [
            {
                **row_line(sample.rollout, sample.row_number, trainer.global_step, sample.mean_advantage),
                **self._token_fields(trainer, sample.row, sample.advantages),
            }
            for sample in samples
        ]
        lines += [line for rollout in unused for line in self._untrained(trainer, rollout, trainer.global_step)]
        self._append(trainer, TRAIN_FILE, lines)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Writes the gaps of a micro-batch, whose logprobs the trainer has computed by now."""
        if self.tokens and batch.step.policy_update == 0 and batch.samples:
            logprobs = module_of(trainer).trainer_logprobs[batch_idx % trainer.accumulate_grad_batches]
            self._append(trainer, GAPS_FILE, gap_lines(batch, logprobs))

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
        name = {"environment": type(data_of(trainer).environment).__name__}  # `fuchsia eval` may evaluate on several
        lines = [
            {**line, **name}
            for rollout in batch.rollouts
            for line in self._untrained(trainer, rollout, rollout.policy_version)
        ]
        self._append(trainer, f"rollouts-{SPLITS[trainer.state.stage]}.jsonl", lines)

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def _untrained(self, trainer: Trainer, rollout: Rollout, step: int) -> Iterator[dict[str, Any]]:
        """Lines of the rows of a rollout that has no advantage."""
        for number, row in enumerate(rollout.rows):
            yield {**row_line(rollout, number, step, None), **self._token_fields(trainer, row, ())}

    def _token_fields(self, trainer: Trainer, row: Row, advantages: Sequence[float]) -> dict[str, Any]:
        return token_fields(row, advantages, data_of(trainer).chat) if self.tokens else {}

    def _append(self, trainer: Trainer, name: str, lines: list[dict[str, Any]]) -> None:
        suffix = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = Path(trainer.default_root_dir) / (name + suffix)
        append_lines(file, "".join(json_line(line) for line in lines))


def log_files(folder: Path) -> list[Path]:
    """Files of RolloutLog in a run folder, of all splits and ranks."""
    return sorted(path for path in folder.iterdir() if OWN_NAME.fullmatch(path.name) and path.is_file())


def json_line(line: dict[str, Any]) -> str:
    r"""A log line as JSON, in which characters that end a line, control a terminal or reorder text are escapes.

    An item that JSON cannot represent, such as one with a tuple as a key, is written as its `repr`.

    >>> json_line({"step": 1, "item": {(0, 1): "a"}})
    '{"step": 1, "item": "{(0, 1): \'a\'}"}\n'
    >>> json_line({"completion": "a\u2028\x9b"})
    '{"completion": "a\\u2028\\u009b"}\n'
    """
    try:
        written = json.dumps(line, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        written = json.dumps({**line, "item": repr(line["item"])}, ensure_ascii=False, default=str)
    return written.translate(INVISIBLE) + "\n"


def row_line(rollout: Rollout, number: int, step: int, advantage: float | None) -> dict[str, Any]:
    """Log line of a row of a rollout; most rollouts are one row.

    Args:
        rollout: The rollout.
        number: Number of the row.
        step: The optimizer step.
        advantage: Mean advantage of the row's tokens, None if it is not trained on.
    """
    row = rollout.rows[number]
    num_prompt_tokens = row.num_prompt_tokens
    return {
        "step": step,
        "item_index": rollout.item_index,
        "item": dict(rollout.item),
        **({"part": rollout.part} if rollout.part else {}),
        "sibling": rollout.sibling,
        **({"row": number} if rollout.earlier_rows else {}),
        "prompt": row.prompt,
        "completion": row.completion,
        "messages": row.messages,
        "prompt_ids": row.token_ids[:num_prompt_tokens],
        "completion_ids": row.token_ids[num_prompt_tokens:],
        "completion_mask": [int(kept) for kept in row.loss_mask[num_prompt_tokens:]],
        "rewards": rollout.rewards,
        **turn_fields(rollout),
        "reward": rollout.reward,
        "advantage": advantage,
        "status": rollout.status,
        "counts": rollout.counts,
        "policy_version": rollout.policy_version,
        "policy_versions": row.policy_versions[num_prompt_tokens:],
    }


def turn_fields(rollout: Rollout) -> dict[str, Any]:
    """Field of a log line with the numbers of reward functions that score turns; none without such functions."""
    return {"turn_rewards": rollout.turn_rewards} if rollout.turn_rewards else {}


def token_fields(row: Row, advantages: Sequence[float], chat: Chat) -> dict[str, Any]:
    """Fields of a log line about the sampled tokens.

    Args:
        row: The row.
        advantages: One per sampled token, or none.
        chat: Tokenizer of the run.

    Returns:
        `tokens`: a list of texts for each turn; `logprobs`: one per sampled token; `advantages`: the same, if they differ.
    """
    pairs = zip(row.sampling_logprobs, row.loss_mask, strict=True)
    fields: dict[str, Any] = {
        "tokens": [chat.pieces(turn.completion.token_ids) for turn in row.turns],
        "logprobs": _rounded(logprob for logprob, kept in pairs if kept),
    }
    if len(set(advantages)) > 1:
        fields["advantages"] = _rounded(advantages)
    return fields


def gap_lines(batch: Batch, logprobs: torch.Tensor) -> list[dict[str, Any]]:
    """Lines with the trainer's minus the sampling logprob of each sampled token, one line per row.

    Args:
        batch: The micro-batch. Its rows are those of its samples, in order.
        logprobs: The trainer's logprobs, float32 [B, T].
    """
    gaps, mask = (logprobs.float() - batch.sampling_logprobs).cpu(), batch.loss_mask.cpu()
    return [
        {
            "step": batch.step.step,
            "item_index": sample.rollout.item_index,
            "sibling": sample.rollout.sibling,
            **({"row": sample.row_number} if sample.rollout.earlier_rows else {}),
            "gaps": _rounded(gaps[place, mask[place]].tolist()),
        }
        for place, sample in enumerate(batch.samples)
    ]


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Values with five decimals; None in place of those that are not finite, which JSON does not have."""
    return [round(value, DECIMALS) + 0.0 if math.isfinite(value) else None for value in values]  # 0.0 in place of -0.0
