"""An environment with a question, calls of an IPython interpreter, and an answer.

item    {"question": "What is 48210 times 973?", "answer": "46908330", "code": "48210 * 973"}
turns   <tool_call>{"name": "python", "arguments": {"code": "48210 * 973"}}</tool_call>  ->  46908330
        <answer>46908330</answer>
"""

import sys
from dataclasses import dataclass
from typing import Any

from fuchsia_pl.envs import ConfigError, Item, MCPServer, Message, Rollout, ToolEnvironment
from fuchsia_pl.envs.rewards import last_answer, last_turn, number_match, parse_number
from fuchsia_pl.library.function_calling import mounts
from fuchsia_pl.library.function_calling.items import KINDS, Kind, make_items

SYSTEM = (
    "Answer the question. Use the tool for every computation, never your head. When you have its result, give the answer as a "
    "bare number inside <answer> and </answer>."
)
# Examples are generated from a separate seed, so that none of them is also a question.
EXAMPLE_SEED = 1


# 1.0 if the last `<answer>` of the last turn is the gold number, in any usual spelling.
correct = number_match("answer", last_answer)


def well_formed(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    """1/2 for one or more tool calls without a malformed one, plus 1/2 for a bare number in `<answer>` in the last turn."""
    called = (r.counts["tool_calls"] > 0 and r.counts["tool_invalid_call"] == 0 for r in rollouts)
    answers = (last_answer(last_turn(r)) for r in rollouts)
    is_number = (answer is not None and parse_number(answer) is not None for answer in answers)
    return [0.5 * calls + 0.5 * number for calls, number in zip(called, is_number, strict=True)]


@dataclass(frozen=True)
class InterpreterLimits:
    """Limits of the interpreter of one rollout.

    Attributes:
        time_s: Time per cell, in seconds.
        memory_mb: Memory of all its processes together, in MiB.

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
    """Questions that require a computation, and an IPython interpreter over MCP. `sandbox.py` describes its sandbox.

    Args:
        num_train: Number of training questions.
        num_validation: Number of held-out questions.
        kinds: Kinds of questions, in rotation. None: all.
        num_examples: Number of worked examples before the question, for models that do not call tools without them.
        format_weight: Weight of the reward `well_formed`. The weight of `correct` is 1.0.
        limits: Limits of each interpreter. None: the defaults.
        allow_weak_sandbox: Whether to run if the system does not support the full sandbox. The server lists the missing parts.

    Raises:
        ConfigError: A number is out of range, or `kinds` is empty.
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
        source = mounts.checkout()
        self.servers = [
            MCPServer(
                command=[sys.executable, "-P", "-m", "fuchsia_pl.library.function_calling.server", *flags],
                # A server inherits no PYTHONPATH, and -P leaves out the working directory.
                env=None if source is None else {"PYTHONPATH": str(source)},
                end_session_tool="end_session",
                call_timeout_s=limits.time_s + 60.0,  # the server enforces the limit; the rest is for a queue of forks
            )
        ]
        items = make_items(0, num_train + num_validation, chosen)
        self._validation, self._train = items[:num_validation], items[num_validation:]
        self._examples = make_items(EXAMPLE_SEED, num_examples, chosen)

    def train_items(self) -> list[Item]:
        """The questions that are not held out."""
        return self._train

    def validation_items(self) -> list[Item]:
        """The held-out questions."""
        return self._validation

    def messages(self, item: Item) -> list[Message]:
        """The instructions, the worked examples and the question."""
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
        """A call with the item's code, then a turn with its answer."""
        return [self.tool_convention.call("python", {"code": item["code"]}), f"<answer>{item['answer']}</answer>"]
