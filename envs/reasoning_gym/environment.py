"""Procedural datasets of reasoning-gym (arXiv:2505.24760), chosen by name and mixed by weight.

item    {"task": "chain_sum", "index": 3, "question": "State the final answer to …: 57 + 87 + 70 =", "answer": "214"},
        with "level": 0 if the task has levels
prompt  a system message that requests <answer>…</answer>, worked examples if there are any, and the question
gold    <answer>214</answer>
"""

import importlib.util
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from fuchsia_pl.envs import ConfigError, Difficulty, Item, Message, RewardFunction, Rollout, SingleTurnEnvironment
from fuchsia_pl.envs.audit import AuditSettings, AuditTask, FindingKind, refuse_unsound
from fuchsia_pl.envs.bounded import call_in_thread
from fuchsia_pl.envs.limited import QUEUE_TIMEOUT_S, WorkerFailure, WorkerTimeout
from fuchsia_pl.envs.rewards import last_answer, last_turn
from fuchsia_pl.library.reasoning_gym.audited import audit_task
from fuchsia_pl.library.reasoning_gym.entries import INSTALL, LEVEL, MAX_ITEMS, Entries, Split, Task

SYSTEM = (
    "Think step by step. Then give the final answer alone between <answer> and </answer>, in the form that the question "
    "asks for."
)
SCORE = "score"  # in the state of a rollout
SCORE_TIMEOUT, SCORE_ERROR = "score_timeout", "score_error"
# Some datasets depend on the hashes of strings. All processes that make and score entries have the same seed of hashes.
TOLERATED = (FindingKind.NOT_REPEATABLE,)
MAX_EXAMPLES = 64
NUM_AUDITED = 2  # items of each task on which the audit plays its texts

logger = logging.getLogger(__name__)


class ReasoningGym(SingleTurnEnvironment):
    """Questions of reasoning-gym's datasets. The reward `score` is that of the dataset's `score_answer`, from 0 to 1.

    Entry `index` of a task is made with a seed of its own; held-out entries have the indices from 2**30 on. Held-out items whose
    question is also a training question, or an earlier held-out one, are removed, and a warning contains their number.

    The answer is the last `<answer>…</answer>` of the turn, without its thinking; without one, the score is 0. For each answer
    `score_answer` runs in a process of its own with limits of time and memory. An answer that exceeds them, or on which the
    dataset raises an exception, scores 0 and is counted as `score_timeout` or `score_error`. With several tasks, the reward
    `accuracy_<task>`, with weight 0, is the share of answers with score 1.

    Args:
        tasks: The datasets, with weights and settings.
        num_items: Number of training items of all tasks together.
        num_validation: Number of held-out items of all tasks together, before repeated ones are removed.
        seed: Another seed gives other items. The seed of the run decides only their order.
        score_timeout_s: CPU seconds for the score of one answer.
        system_prompt: System message. The answer is always read between `<answer>` and `</answer>`.
        num_examples: Worked examples of the same task before each question, for models that do not write the tags without them.
            They are entries of no split. One whose question is that of the item is left out.
        allow_unsound: Whether to train on tasks in which the audit of the rewards finds faults, with a warning.

    Raises:
        ConfigError: A setting is out of range, a task is listed twice, or reasoning-gym is not installed.
    """

    def __init__(
        self,
        tasks: list[Task],
        num_items: int = 2000,
        num_validation: int = 128,
        seed: int = 0,
        score_timeout_s: float = 2.0,
        system_prompt: str = SYSTEM,
        num_examples: int = 0,
        allow_unsound: bool = False,
    ) -> None:
        super().__init__()
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ConfigError(f"ReasoningGym needs a package that is not installed: {INSTALL}")
        for name, number in {"num_items": num_items, "num_validation": num_validation}.items():
            if not 1 <= number <= MAX_ITEMS:
                raise ConfigError(f"ReasoningGym requires {name} from 1 to {MAX_ITEMS}, got {number}")
        if not 0 <= num_examples <= MAX_EXAMPLES:
            raise ConfigError(f"ReasoningGym requires num_examples from 0 to {MAX_EXAMPLES}, got {num_examples}")
        self._entries = Entries(tasks, seed, score_timeout_s, allow_unsound)
        self.allow_unsound = allow_unsound
        self._is_audited = False
        self._numbers: dict[Split, int] = {"train": num_items, "validation": num_validation}
        self._made: dict[Split, list[Item]] = {}
        self._num_examples = num_examples
        self.system_prompt = system_prompt
        self.counters = [SCORE_TIMEOUT, SCORE_ERROR]
        self.timeout_s = QUEUE_TIMEOUT_S
        self.reward_functions = [self.score]
        if len(tasks) > 1:
            accuracies = [accuracy_of(task.name) for task in tasks]
            self.reward_functions += accuracies
            self.reward_weights = {accuracy.__name__: 0.0 for accuracy in accuracies}

    def train_items(self) -> list[Item]:
        """The training items, made on the first call."""
        if "train" not in self._made:
            self._made["train"] = self._entries.make("train", self._numbers["train"])
        return self._made["train"]

    def validation_items(self) -> list[Item]:
        """The held-out items that `unseen` keeps."""
        if "validation" not in self._made:
            made = self._entries.make("validation", self._numbers["validation"])
            shown = [example for examples in self._examples.values() for example in examples]
            self._made["validation"] = unseen(made, [*self.train_items(), *shown])
        return self._made["validation"]

    def messages(self, item: Item) -> list[Message]:
        """The instructions, the worked examples and the question."""
        messages: list[Message] = [{"role": "system", "content": self.system_prompt}]
        for example in self._examples.get(item["task"], ()) if self._num_examples else ():
            if example["question"] != item["question"]:
                messages += [
                    {"role": "user", "content": example["question"]},
                    {"role": "assistant", "content": gold(example)},
                ]
        return [*messages, {"role": "user", "content": item["question"]}]

    def gold_turns(self, item: Item) -> list[str]:
        """The answer of the entry."""
        return [gold(item)]

    def difficulty(self, item: Item) -> Difficulty | None:
        """The task and reasoning-gym's own level, if the task has `levels`."""
        return Difficulty(item["task"], item[LEVEL]) if LEVEL in item else None

    def score(self, rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
        """The dataset's own score of the answers."""
        with ThreadPoolExecutor(self._entries.workers.num_workers) as threads:
            scores = list(threads.map(self._score, rollouts))
        for rollout, score in zip(rollouts, scores, strict=True):
            rollout.state[SCORE] = score
        return scores

    def audit_tasks(self, all_tasks: bool) -> Sequence[AuditTask]:
        """The configured datasets, or all datasets of reasoning-gym, those that are not configured with their defaults."""
        configured = self._entries.tasks
        names = self._entries.all_names() if all_tasks else list(configured)
        return [audit_task(configured.get(name, Task(name)), self._entries.seed) for name in names]

    async def prepare(self) -> None:
        """Audits the rewards of the tasks, once.

        Raises:
            ConfigError: A task is unknown, or a reward has a fault and `allow_unsound` is False.
        """
        await super().prepare()
        if not self._is_audited:
            await call_in_thread(self._audit, timeout_s=self.prepare_timeout_s)
            self._is_audited = True

    async def close(self) -> None:
        """Ends the worker processes."""
        await super().close()
        self._entries.workers.close()

    @cached_property
    def _examples(self) -> dict[str, list[Item]]:
        return self._entries.examples(self._num_examples) if self._num_examples else {}

    def _audit(self) -> None:
        self._entries.check_tasks()
        settings = AuditSettings(num_items=NUM_AUDITED, timeout_s=self._entries.score_timeout_s)
        tasks, where = self.audit_tasks(all_tasks=False), type(self).__name__
        refuse_unsound(where, tasks, self.allow_unsound, settings, tolerated=TOLERATED)

    def _score(self, rollout: Rollout) -> float:
        answer = last_answer(last_turn(rollout))
        if answer is None:
            return 0.0
        try:
            return self._entries.score(rollout.item, answer)
        except WorkerTimeout:
            rollout.counts[SCORE_TIMEOUT] += 1
        except WorkerFailure:
            rollout.counts[SCORE_ERROR] += 1
        return 0.0


def gold(item: Item) -> str:
    """A turn with the answer of an entry."""
    return f"<answer>{item['answer']}</answer>"


def unseen(items: list[Item], train: list[Item]) -> list[Item]:
    """The held-out items whose question occurs once and in no training item.

    Raises:
        ConfigError: A task has none left.
    """
    seen = {(item["task"], item["question"]) for item in train}
    kept: list[Item] = []
    for item in items:
        if (item["task"], item["question"]) not in seen:
            seen.add((item["task"], item["question"]))
            kept.append(item)
    left, made = (Counter(item["task"] for item in some) for some in (kept, items))
    removed = {task: number - left[task] for task, number in made.items() if number > left[task]}
    if removed:
        logger.warning("held-out items are left out, whose question is asked twice or in training too: %s", removed)
    gone = [task for task in made if not left[task]]
    if gone:
        raise ConfigError(
            f"ReasoningGym: all held-out questions of {gone} are also training questions: there are too few different ones. "
            "Lower num_items, or choose a `config` with more of them"
        )
    return kept


def accuracy_of(task: str) -> RewardFunction:
    """A reward with weight 0, for the logs: 1.0 if an answer to this task has score 1; None for the other tasks."""

    def accuracy(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float | None]:
        scores = (r.state[SCORE] if r.item["task"] == task else None for r in rollouts)  # `score` is called before
        return [None if value is None else float(value >= 1.0) for value in scores]

    accuracy.__name__ = f"accuracy_{task}"
    return accuracy
