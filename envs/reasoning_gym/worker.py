"""Makes and scores entries of reasoning-gym's datasets. This runs in limited processes, see `LimitedWorkers`."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

OWN_KEYS = ("seed", "size")  # with which an entry is addressed
NUM_NEAR = 3
Answering = Callable[[dict[str, Any]], Any]


def open_library(_: Any) -> Answering:
    """Loads reasoning-gym and returns the function of the calls.

    A request has `do`, `task` (the name of a dataset) and `config` (of this dataset), and what the function of `do` reads.
    """
    import reasoning_gym  # noqa: F401 # an extra, which is loaded once in the process that forks

    functions: dict[str, Answering] = {"names": names, "check": check, "make": make, "score": score}
    return lambda request: functions[request["do"]](request)


def names(_: dict[str, Any]) -> list[str]:
    """The names of all datasets."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def check(request: dict[str, Any]) -> str | None:
    """Describes the fault of a task's name or config; None if entries can be made with them."""
    from reasoning_gym.factory import DATASETS

    name, config = request["task"], request["config"]
    if name not in DATASETS:
        near = difflib.get_close_matches(name, sorted(DATASETS), NUM_NEAR)
        meant = f"similar names are {near}" if near else f"the names are {', '.join(sorted(DATASETS))}"
        return f"reasoning-gym has no dataset of this name: {meant}"
    known = sorted({field.name for field in dataclasses.fields(DATASETS[name][1])} - {*OWN_KEYS})
    unknown = sorted(set(config) - set(known))
    if unknown:
        return f"its config has the keys {unknown}: allowed are {known}"
    try:
        _dataset(request, seed=0)
    except Exception as error:  # each dataset checks its config in its own way
        return f"reasoning-gym refuses its config {config}: {type(error).__name__}: {error}"
    return None


def make(request: dict[str, Any]) -> list[list[Any]]:
    """Question, answer, and score of this answer for each of `seeds`."""
    made = []
    for seed in request["seeds"]:
        dataset = _dataset(request, seed)
        entry = dataset[0]
        made.append([entry["question"], entry["answer"], _own_score(dataset, entry)])
    return made


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Whether the entry of `seed` still has this `question`, and the score of `answer` if it is not None."""
    dataset = _dataset(request, request["seed"])
    entry = dataset[0]
    is_same = entry["question"] == request["question"]
    scores = is_same and request["answer"] is not None
    return {"same": is_same, "score": float(dataset.score_answer(request["answer"], entry)) if scores else None}


def _dataset(request: dict[str, Any], seed: int) -> Any:
    """A dataset of one entry: every entry is addressed by its seed alone."""
    from reasoning_gym import create_dataset

    return create_dataset(request["task"], **request["config"], seed=seed, size=1)


def _own_score(dataset: Any, entry: dict[str, Any]) -> float | None:
    try:
        return float(dataset.score_answer(entry["answer"], entry))
    except Exception:  # reported as an answer that does not score
        return None
