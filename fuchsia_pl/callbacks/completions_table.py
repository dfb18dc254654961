"""Tables of completions in Weights & Biases and TensorBoard."""

import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from fuchsia_pl.batch import Batch
from fuchsia_pl.samples import Evaluation
from fuchsia_pl.types import ConfigError, Rollout

TRAIN_TABLE = "completions/train"
VALIDATION_TABLE = "completions/validation"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]|[\ud800-\udfff]")

Row = dict[str, Any]


class CompletionsTable(Callback):
    """Logs a table of completions every few optimizer steps, and one per validation, to the loggers that show tables.

    The rows are spread over the ranking of rewards: the best and the worst rollout of the step are among them. They are those of
    the first rank. `rollouts.jsonl` has all rollouts.

    Args:
        every_n_steps: Optimizer steps between two tables; 0 logs none.
        max_rows: Rows of a table.
        max_chars: Characters of a prompt or a completion. Of longer ones the beginning and the end are shown.

    Raises:
        ConfigError: `every_n_steps` is below 0, `max_rows` below 1, or `max_chars` below 20.
    """

    def __init__(self, every_n_steps: int = 10, max_rows: int = 8, max_chars: int = 2000) -> None:
        if every_n_steps < 0:
            raise ConfigError(f"completions_table.every_n_steps must be 0 or more, got {every_n_steps}")
        if max_rows < 1:
            raise ConfigError(
                f"completions_table.max_rows must be 1 or more, got {max_rows}; every_n_steps 0 turns tables off"
            )
        if max_chars < 20:
            raise ConfigError(f"completions_table.max_chars must be 20 or more, got {max_chars}")
        self.every_n_steps = every_n_steps
        self.max_rows = max_rows
        self.max_chars = max_chars
        self._rollouts: list[tuple[Rollout, float | None]] = []  # of the step
        self._held_out: list[tuple[Rollout, float | None]] = []
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the rollouts of an earlier run."""
        self._rollouts, self._held_out, self._last_step = [], [], trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Collects the rollouts of a step that is logged."""
        if not self._is_due(trainer.global_step + 1) or not _table_loggers(trainer):
            return
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        samples = [*batch.samples, *(batch.step.zero_advantage if is_first else ())]
        self._rollouts += [(sample.rollout, sample.mean_advantage) for sample in samples if sample.is_first]
        self._rollouts += [(rollout, None) for rollout in (batch.step.unused if is_first else ())]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Logs the table if this micro-batch completed an optimizer step."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            rollouts, self._rollouts = self._rollouts, []
            self._log(trainer, TRAIN_TABLE, rollouts)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Evaluation,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects the first held-out rollouts."""
        room = self.max_rows - len(self._held_out)
        if self.every_n_steps and _table_loggers(trainer):
            self._held_out += [(rollout, None) for rollout in batch.rollouts[: max(room, 0)]]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the held-out table."""
        rollouts, self._held_out = self._held_out, []
        self._log(trainer, VALIDATION_TABLE, rollouts)

    def _is_due(self, step: int) -> bool:
        return self.every_n_steps > 0 and step % self.every_n_steps == 0

    def _log(self, trainer: Trainer, name: str, rollouts: list[tuple[Rollout, float | None]]) -> None:
        """Logs rollouts under the step of the metrics that Lightning logs at this time."""
        if not rollouts or not trainer.is_global_zero:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        rows = [table_row(rollout, advantage, self.max_chars) for rollout, advantage in spread(rollouts, self.max_rows)]
        for logger in _table_loggers(trainer):
            log_table(logger, name, rows, step)


def spread(rollouts: Sequence[tuple[Rollout, float | None]], number: int) -> list[tuple[Rollout, float | None]]:
    """At most `number` rollouts, at even distances in the order of their rewards, best first. Unscored ones are last.

    >>> rollouts = [Rollout({}, 0, sibling, 1.0, "", reward=float(sibling)) for sibling in range(5)]
    >>> [rollout.reward for rollout, _ in spread([(rollout, None) for rollout in rollouts], 3)]
    [4.0, 2.0, 0.0]
    """

    def place(pair: tuple[Rollout, float | None]) -> tuple[bool, float, int, int]:
        rollout = pair[0]
        return rollout.reward is None, -(rollout.reward or 0.0), rollout.item_index, rollout.sibling

    ordered = sorted(rollouts, key=place)
    if len(ordered) <= number:
        return ordered
    if number == 1:
        return ordered[:1]
    return [ordered[round(index * (len(ordered) - 1) / (number - 1))] for index in range(number)]


def table_row(rollout: Rollout, advantage: float | None, max_chars: int) -> Row:
    """The row of a rollout, with the columns that every table has first."""
    return {
        "item": rollout.item_index,
        "sibling": rollout.sibling,
        "reward": rollout.reward,
        "advantage": advantage,
        "status": str(rollout.status),
        "tokens": rollout.num_sampled_tokens,
        "prompt": shown(rollout.prompt, max_chars),
        "completion": shown(rollout.completion, max_chars),
        **{f"reward/{name}": value for name, value in rollout.rewards.items()},
    }


def shown(text: str, max_chars: int) -> str:
    r"""A text of bounded length, in which characters that control a display are written as escapes.

    >>> shown("a\x1b[2J\u202eb", max_chars=100)
    'a\\x1b[2J\\u202eb'
    >>> shown("0123456789" * 10, max_chars=20)
    '0123456789 … (80 characters) … 0123456789'
    """
    if len(text) > max_chars:
        half = max_chars // 2
        text = f"{text[:half]} … ({len(text) - 2 * half} characters) … {text[-half:]}"
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def log_table(logger: Logger, name: str, rows: Sequence[Row], step: int) -> None:
    """Logs rows as a table of Weights & Biases, or as a text of TensorBoard."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if isinstance(logger, WandbLogger):
        logger.log_table(name, columns, [[row.get(column) for column in columns] for row in rows], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, markdown(rows), step)


def markdown(rows: Sequence[Row]) -> str:
    """Rows as Markdown, which TensorBoard renders. Indentation makes the texts code, so that nothing in them is markup.

    >>> print(markdown([{"item": 3, "prompt": "2+2", "completion": "# 4"}]))
    **item** 3
    <BLANKLINE>
        2+2
    <BLANKLINE>
        # 4
    <BLANKLINE>
    """
    texts = ("prompt", "completion")
    parts = []
    for row in rows:
        parts.append("  ".join(f"**{name}** {_number(value)}" for name, value in row.items() if name not in texts))
        parts += ["\n".join(f"    {line}" for line in str(row[name]).split("\n")) for name in texts]
    return "\n\n".join(parts) + "\n"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def _table_loggers(trainer: Trainer) -> list[Logger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
