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

    A request has `do`, `task` (the name of a dataset), `config` (of this dataset), `levels` (the number of its levels in use, or
    None), and what the function of `do` reads.
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
    levels = request["levels"]
    if levels is not None:
        problem = _level_problem(name, config, levels)
        if problem is not None:
            return problem
    for level in range(levels) if levels is not None else (None,):
        where = "" if level is None else f" at level {level}"
        try:
            dataset_of(request, level, seed=0, size=1)
        except Exception as error:  # each dataset checks its config in its own way
            return f"reasoning-gym refuses its config {config}{where}: {type(error).__name__}: {error}"
    return None


def _level_problem(name: str, config: dict[str, Any], levels: int) -> str | None:
    from reasoning_gym.factory import CURRICULA, create_curriculum

    if name not in CURRICULA:
        return "reasoning-gym has no levels for this dataset: leave `levels` out"
    curriculum = create_curriculum(name)
    attributes = curriculum.attributes.values()
    made = []
    for level in range(max(len(attribute.levels) for attribute in attributes)):
        curriculum.set_global_level(level)
        made.append(curriculum.generate_configuration())
    number = sum(settings not in made[:place] for place, settings in enumerate(made))  # the last two may be the same
    if levels > number:
        return f"it has {number} levels, got levels={levels}"
    set_by_levels = {
        getattr(attribute, field)
        for attribute in attributes
        for field in ("field_name", "lower_field_name", "upper_field_name")
        if hasattr(attribute, field)
    }
    twice = sorted(set(config) & set_by_levels)
    return f"its levels set {twice}: leave them out of its config, or leave `levels` out" if twice else None


def make(request: dict[str, Any]) -> list[list[Any]]:
    """Question, answer, and score of this answer for each pair of a seed and a level in `entries`."""
    made = []
    for seed, level in request["entries"]:
        dataset = dataset_of(request, level, seed, size=1)
        entry = dataset[0]
        made.append([entry["question"], entry["answer"], _own_score(dataset, entry)])
    return made


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Whether the entry of `seed` and `level` still has this `question`, and the score of `answer` if it is not None."""
    dataset = dataset_of(request, request["level"], request["seed"], size=1)
    entry = dataset[0]
    is_same = entry["question"] == request["question"]
    scores = is_same and request["answer"] is not None
    return {"same": is_same, "score": float(dataset.score_answer(request["answer"], entry)) if scores else None}


def dataset_of(request: dict[str, Any], level: int | None, seed: int, size: int) -> Any:
    """A dataset with the `config` of a request, at one of its own levels unless `level` is None."""
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import create_curriculum

    config = request["config"]
    if level is not None:
        curriculum = create_curriculum(request["task"])
        curriculum.set_global_level(level)
        made = curriculum.generate_configuration(config)
        config = {
            field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.name not in OWN_KEYS
        }
    return create_dataset(request["task"], **config, seed=seed, size=size)


def _own_score(dataset: Any, entry: dict[str, Any]) -> float | None:
    try:
        return float(dataset.score_answer(entry["answer"], entry))
    except Exception:  # reported as an answer that does not score
        return None
