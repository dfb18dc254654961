"""A question, calls of an interpreter, an answer.

item    {"question": "What is 48210 times 973?", "answer": "46908330", "code": "48210 * 973"}
turns   <tool_call>{"name": "python", "arguments": {"code": "48210 * 973"}}</tool_call>  ->  46908330
        <answer>46908330</answer>
"""

import sys
from dataclasses import dataclass
from typing import Any

from envs.function_calling.items import KINDS, Kind, make_items
from fuchsia_pl.envs import ConfigError, Item, MCPServer, Message, Rollout, ToolEnvironment
from fuchsia_pl.envs.rewards import last_answer, last_turn, number_match, parse_number

SYSTEM = (
    "Answer the question. Use the tool for every computation, never your head. When you have its result, give the answer as a "
    "bare number inside <answer> and </answer>."
)
# Items of another seed than the environment's, so that no example is ever asked.
EXAMPLE_SEED = 1


# 1.0 where the last `<answer>` of the last turn is the gold number, however a person would write it.
correct = number_match("answer", last_answer)


def well_formed(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """1/2 for at least one call of the tool and none that is malformed, 1/2 for a bare number in `<answer>` in the last turn."""
    called = (r.counts["tool_calls"] > 0 and r.counts["tool_invalid_call"] == 0 for r in rollouts)
    answers = (last_answer(last_turn(r)) for r in rollouts)
    is_number = (answer is not None and parse_number(answer) is not None for answer in answers)
    return [0.5 * calls + 0.5 * number for calls, number in zip(called, is_number, strict=True)]


@dataclass(frozen=True)
class InterpreterLimits:
    """Of each rollout's interpreter.

    Attributes:
        time_s: Of each cell.
        memory_mb: Of all its processes together, in MiB.

    Raises:
        ConfigError: A number is out of range.
    """

    time_s: float = 5.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        """Validates the numbers."""
        if self.time_s <= 0 or self.memory_mb < 256:
            raise ConfigError(
                "an interpreter takes time_s above 0 and memory_mb of 256 or more, "
                f"got time_s={self.time_s}, memory_mb={self.memory_mb}"
            )


class FunctionCalling(ToolEnvironment):
    """Questions that want a computation, and an IPython interpreter over MCP; what it is kept from is told in `sandbox.py`.

    Args:
        num_train: Questions to train on.
        num_validation: Held-out questions.
        kinds: Kinds of questions, in turn.
        num_examples: Worked examples before the question, for models that do not call tools by themselves.
        format_weight: Weight of the form, beside 1.0 for being right.
        limits: Of each interpreter, None for the defaults.
        allow_weak_sandbox: Whether to run where the system offers less than all that `sandbox.py` tells; the server names what.

    Raises:
        ConfigError: A number is out of range, or no kind is named.
    """

    def __init__(
        self,
        num_train: int = 2000,
        num_validation: int = 64,
        kinds: list[Kind] | None = None,
        num_examples: int = 0,
        format_weight: float = 0.2,
        limits: InterpreterLimits | None = None,
        allow_weak_sandbox: bool = False,
    ) -> None:
        super().__init__()
        chosen = KINDS if kinds is None else tuple(kinds)
        if num_train < 1 or num_validation < 1 or num_examples < 0 or not chosen:
            raise ConfigError(
                "FunctionCalling takes items of 1 or more, examples of 0 or more and one kind or more, "
                f"got num_train={num_train}, num_validation={num_validation}, num_examples={num_examples}, kinds={list(chosen)}"
            )
        self.max_steps = 4
        self.reward_functions = [correct, well_formed]
        self.reward_weights = {"well_formed": format_weight}
        limits = InterpreterLimits() if limits is None else limits
        flags = ["--time-limit-s", str(limits.time_s), "--memory-mb", str(limits.memory_mb)]
        flags += ["--allow-weak-sandbox"] if allow_weak_sandbox else []
        self.servers = [
            MCPServer(
                command=[sys.executable, "-P", "-m", "envs.function_calling.server", *flags],
                end_session_tool="end_session",
                call_timeout_s=limits.time_s + 60.0,  # the server keeps the limit; behind it, a queue of forks
            )
        ]
        items = make_items(0, num_train + num_validation, chosen)
        self._validation, self._train = items[:num_validation], items[num_validation:]
        self._examples = make_items(EXAMPLE_SEED, num_examples, chosen)

    def train_items(self) -> list[Item]:
        """Questions that are not held out."""
        return self._train

    def validation_items(self) -> list[Item]:
        """The held-out questions."""
        return self._validation

    def messages(self, item: Item) -> list[Message]:
        """The request, worked examples, and the question."""
        messages = [{"role": "system", "content": SYSTEM}]
        for example in self._examples:
            call, answer = self.gold_turns(example)
            result = self.tool_convention.result(example["answer"])
            messages += [
                {"role": "user", "content": example["question"]},
                {"role": "assistant", "content": call},
                {"role": self.tool_convention.role, "content": result},
                {"role": "assistant", "content": answer},
            ]
        return [*messages, {"role": "user", "content": item["question"]}]

    def gold_turns(self, item: Item) -> list[str]:
        """The call of the item's code, then its answer."""
        return [self.tool_convention.call("python", {"code": item["code"]}), f"<answer>{item['answer']}</answer>"]
