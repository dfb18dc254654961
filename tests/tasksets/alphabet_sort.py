"""A taskset in the API of verifiers 0.4: sort names, and sort again when more come. Its environment opens the conversation."""

import itertools
import random
from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["AlphabetSort", "AlphabetSortEnv"]
NAMES = ("ann", "ben", "carl", "dora", "emil", "fay", "gus", "hal", "ida", "jon", "kim", "lea")


class AlphabetSortData(vf.TaskData):
    batches: list[list[str]]


class AlphabetSortTaskConfig(vf.TaskConfig):
    power: float = 1.0


class AlphabetSortTask(vf.Task[AlphabetSortData, vf.State, AlphabetSortTaskConfig]):
    @vf.reward
    async def in_order(self, trace: vf.Trace) -> float:
        lists = itertools.accumulate(self.data.batches)
        wanted = [" ".join(sorted(names)) for names in lists]
        written = [message.content or "" for message in trace.assistant_messages]
        right = sum(text.strip() == want for text, want in zip(written, wanted, strict=False))
        return (right / len(wanted)) ** self.config.power


class AlphabetSortConfig(vf.TasksetConfig):
    num_batches: int = 3
    seed: int = 0
    task: AlphabetSortTaskConfig = AlphabetSortTaskConfig()


class AlphabetSortEnv(vf.SingleAgentEnv):
    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        first, *later = (" ".join(names) for names in task.data.batches)
        async with agents.agent.interaction(task) as interaction:
            segment = await interaction.turn(f"sort: {first}")
            for names in later:
                if segment.terminated:
                    break
                segment = await interaction.turn(f"and: {names}")


class AlphabetSort(vf.Taskset[AlphabetSortTask, AlphabetSortConfig]):
    INFINITE = True

    def load(self) -> Iterator[AlphabetSortTask]:
        rng = random.Random(self.config.seed)
        while True:
            names = rng.sample(NAMES, 2 * self.config.num_batches)
            batches = [names[at : at + 2] for at in range(0, len(names), 2)]
            yield AlphabetSortTask(AlphabetSortData(batches=batches), self.config.task)
