"""A taskset in the API of verifiers 0.4: reverse a text. One question and one answer."""

import difflib
import random
import re

import verifiers.v1 as vf

__all__ = ["ReverseText"]
SYSTEM = "write the text backwards, after answer:"
WORDS = ("one", "two", "red", "blue", "sun", "moon", "cat", "dog", "sea", "sky")
ANSWER = re.compile(r"answer: ?(.*)")


class ReverseTextData(vf.TaskData):
    answer: str


class ReverseTextTask(vf.Task[ReverseTextData]):
    @vf.stop
    async def answered(self, trace: vf.Trace) -> bool:
        return trace.num_turns == 1

    @vf.reward
    async def similar(self, trace: vf.Trace) -> float:
        found = ANSWER.search(trace.last_reply)
        return difflib.SequenceMatcher(None, found[1].strip() if found else "", self.data.answer).ratio()

    @vf.reward(weight=0.25)
    async def tagged(self, trace: vf.Trace) -> float:
        return float(ANSWER.search(trace.last_reply) is not None)

    @vf.metric
    async def reply_chars(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class ReverseTextConfig(vf.TasksetConfig):
    num_words: int = 2
    number: int = 20
    seed: int = 0


class ReverseText(vf.Taskset[ReverseTextTask, ReverseTextConfig]):
    def load(self) -> list[ReverseTextTask]:
        rng = random.Random(self.config.seed)
        texts = [" ".join(rng.sample(WORDS, self.config.num_words)) for _ in range(self.config.number)]
        return [
            ReverseTextTask(ReverseTextData(prompt=text, system_prompt=SYSTEM, answer=text[::-1]), self.config.task)
            for text in texts
        ]
