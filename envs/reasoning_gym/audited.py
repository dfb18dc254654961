"""The audit of reasoning-gym's datasets, see `AuditTask`. The functions run in limited processes."""

from collections.abc import Callable, Mapping
from typing import Any

from fuchsia_pl.envs.audit import AuditTask
from fuchsia_pl.envs.audit.task import ANSWER, score_each
from fuchsia_pl.envs.rewards import last_answer
from fuchsia_pl.envs.thinking import without_thinking
from fuchsia_pl.library.reasoning_gym.entries import FIRST_INDEX, Split, Task, seed_of
from fuchsia_pl.library.reasoning_gym.worker import dataset_of

FUNCTION = f"{__name__}.open_audit"
FORM = f"<answer>{ANSWER}</answer>"
# The environment removes held-out items that repeat training questions. Few different questions leave none.
MAX_REPEATED = 0.25


def audit_task(task: Task, seed: int) -> AuditTask:
    """The audit of a dataset.

    Args:
        task: The dataset.
        seed: The seed of the environment.
    """
    argument = {"task": task.name, "config": task.config, "levels": task.levels, "seed": seed}
    return AuditTask(task.name, FUNCTION, argument, opening={}, repeats=MAX_REPEATED)


def open_audit(_: Any) -> Callable[[Mapping[str, Any]], Any]:
    """Loads reasoning-gym and returns the function of the audit."""
    import reasoning_gym  # noqa: F401 # an extra, which is loaded once in the process that forks

    return answer_request


def answer_request(request: Mapping[str, Any]) -> Any:
    """The function of the audit."""
    argument = request["argument"]
    if request["do"] == "score":
        split, index = request["item"]
        (made,) = _entries(argument, split, range(index, index + 1))
        return _scores(*made, request["answers"])
    split, number = request["split"], request["num"]
    entries = _entries(argument, split, range(number))
    if request["do"] == "survey":
        return [[entry["question"], _gold_score(dataset, entry)] for dataset, entry in entries]
    return [
        {
            "item": [split, index],
            "question": entry["question"],
            "gold": entry["answer"] if isinstance(entry["answer"], str) else None,
            "forms": [FORM],
        }
        for index, (_, entry) in enumerate(entries)
    ]


def _gold_score(dataset: Any, entry: Mapping[str, Any]) -> Any:
    """The score of the stored answer. One that is no text cannot be written, so it earns nothing."""
    gold = entry["answer"]
    if not isinstance(gold, str):
        return {"reward": None, "correct": False}
    return _scores(dataset, entry, [[FORM.replace(ANSWER, gold)]])[0]


def _scores(dataset: Any, entry: Mapping[str, Any], answers: list[list[str]]) -> list[Any]:
    """The scores of answers as the environment reads them."""

    def score(turns: list[str]) -> tuple[float, bool]:
        answer = last_answer(without_thinking(turns[-1]))
        reward = 0.0 if answer is None else float(dataset.score_answer(answer, entry))
        return reward, reward >= 1.0

    return score_each(score, answers)


def _entries(argument: Mapping[str, Any], split: Split, indices: range) -> list[tuple[Any, Any]]:
    """Entries of a split, each with its dataset. Some take seconds to load, so one dataset makes all entries of a level."""
    task = Task(argument["task"], config=argument["config"], levels=argument["levels"])
    first = FIRST_INDEX[split]
    settings, seed = {"task": task.name, "config": task.config}, seed_of(argument["seed"], first)
    levels = {index: task.level_of(first + index) for index in indices}
    datasets = {level: dataset_of(settings, level, seed, indices.stop) for level in set(levels.values())}
    return [(datasets[level], datasets[level][index]) for index, level in levels.items()]
