"""A taskset in the API of verifiers 0.4 with two toolsets: one with a state for each task, one shared by all."""

import verifiers.v1 as vf

__all__ = ["Letters"]


class Notes(vf.Toolset[vf.ToolsetConfig, vf.State]):
    """Keeps words."""

    def __init__(self, config: vf.ToolsetConfig) -> None:
        super().__init__(config)
        self.words: list[str] = []

    async def setup(self) -> None:
        self.words.append("first")

    @vf.tool
    async def note(self, word: str) -> str:
        """Keeps a word and returns all words."""
        self.words.append(word)
        return " ".join(self.words)


class CountConfig(vf.SharedToolsetConfig):
    bonus: int = 0


class Count(vf.Toolset[CountConfig, vf.State]):
    TOOL_PREFIX = None

    @vf.tool(name="count_letters")
    def count(self, word: str) -> int:
        """Counts letters."""
        return len(word) + self.config.bonus


class LettersTask(vf.Task[vf.TaskData]):
    @vf.reward
    async def noted(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages))

    @vf.metric
    async def calls(self, trace: vf.Trace) -> float:
        return float(sum(len(message.tool_calls or []) for message in trace.assistant_messages))

    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        return [Notes(vf.ToolsetConfig())]


class LettersConfig(vf.TasksetConfig):
    count: CountConfig = CountConfig(bonus=100)


class Letters(vf.Taskset[LettersTask, LettersConfig]):
    def load(self) -> list[LettersTask]:
        return [LettersTask(vf.TaskData(prompt=f"note {number}"), self.config.task) for number in range(4)]

    @classmethod
    def toolsets(cls, config: LettersConfig) -> list[vf.Toolset]:
        return [Count(config.count)]
