"""Writes the answers to the prompts of a file, one line per prompt, in the order of the file."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.callbacks.rollout_log import json_line
from fuchsia_pl.rollouts.in_order import Answers
from fuchsia_pl.types import Rollout, RolloutStatus

TOO_LONG = "the prompt is too long"


class AnswerLog(Callback):
    """Writes a line per row with its id and its completions. With several ranks the first one writes the lines of all.

    Args:
        ids: Id of each row.
        write: Writes lines.
    """

    def __init__(self, ids: Sequence[str | int], write: Callable[[str], None]) -> None:
        self.ids = ids
        self.write = write

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Answers,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the next row of each rank."""
        own = "" if batch.index is None else answer_line(self.ids[batch.index], batch)
        lines = [own]
        if trainer.world_size > 1:  # ranks have consecutive rows
            lines = [""] * trainer.world_size
            torch.distributed.all_gather_object(lines, own)
        if trainer.is_global_zero:
            self.write("".join(lines))


def answer_line(row_id: str | int, answers: Answers) -> str:
    r"""The line of a row.

    >>> answer_line("a", Answers((), {}, index=0))
    '{"id": "a", "completions": [], "error": "the prompt is too long"}\n'
    """
    pairs = zip(answers.rollouts, answers.seeds, strict=True)
    completions = [_completion(rollout, seed, answers.max_turns) for rollout, seed in pairs]
    line: dict[str, Any] = {"id": row_id, "completions": completions}
    if not completions:
        line["error"] = TOO_LONG
    return json_line(line)


def _completion(rollout: Rollout, seed: int, max_turns: int) -> dict[str, Any]:
    """The last turn of a rollout; with several turns also all messages after the prompt."""
    found: dict[str, Any] = {
        "text": rollout.turns[-1].text if rollout.turns else "",
        "finish_reason": finish_reason(rollout, max_turns),
        "tokens": rollout.num_sampled_tokens,
        "seed": seed,
    }
    if len(rollout.all_turns) > 1:
        found["messages"] = rollout.messages[_num_prompt_messages(rollout) :]
    return found


def finish_reason(rollout: Rollout, max_turns: int) -> str:
    """Why a rollout ended: "stop", "length" (no tokens were left), "turns" (no turns), "tool_error" or "env_error"."""
    if rollout.status is RolloutStatus.COMPLETED:
        return "stop"
    if rollout.status is not RolloutStatus.TRUNCATED:
        return str(rollout.status)
    was_cut = not rollout.turns or rollout.turns[-1].completion.finish_reason == "length"
    return "length" if was_cut or len(rollout.all_turns) < max_turns else "turns"


def _num_prompt_messages(rollout: Rollout) -> int:
    """Number of messages before the first turn of the policy. A prompt may have turns of the assistant too."""
    left = len(rollout.turns)
    for position in range(len(rollout.messages) - 1, -1, -1):
        left -= rollout.messages[position]["role"] == "assistant"
        if left == 0:
            return position
    return len(rollout.messages)
