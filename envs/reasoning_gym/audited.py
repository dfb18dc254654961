"""The function with which a task of reasoning-gym is audited, see `AuditTask`. It runs in limited processes."""

from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer

from fuchsia_pl.envs.audit.task import ANSWER, score_each

SEEDS = {"train": 0, "validation": 2**30}
FORM = f"<answer>{ANSWER}</answer>"


def answer_request(request: dict[str, Any]) -> Any:
    task, config = request["argument"]["task"], request["argument"]["config"]
    if request["do"] == "score":
        split, index = request["item"]
        data = reasoning_gym.create_dataset(task, **{"seed": SEEDS[split], "size": index + 1, **config})
        entry = data[index]

        def score(turns: list[str]) -> tuple[float, bool]:
            reward = data.score_answer(extract_answer(turns[-1]), entry)
            return reward, reward >= 1.0

        return score_each(score, request["answers"])
    split, num = request["split"], request["num"]
    data = reasoning_gym.create_dataset(task, **{"seed": SEEDS[split], "size": num, **config})
    entries = [data[index] for index in range(num)]
    if request["do"] == "questions":
        return [entry["question"] for entry in entries]
    return [
        {"item": [split, index], "question": entry["question"], "gold": entry["answer"], "forms": [FORM]}
        for index, entry in enumerate(entries)
    ]
