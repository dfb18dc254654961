"""The nouns of a run, in the order in which data passes through them.

item -> Prompt -> Completion -> Turn -> Rollout -> RolloutGroup -> Sample -> Batch (`batch.py`)

Shape letters: G siblings of a group, L tokens of a rollout, A sampled tokens.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

Item = Mapping[str, Any]
Message = dict[str, str]
# As a chat template: messages are text, joined by blank lines. For models that have no template.
PLAIN_TEXT = "none"


class ConfigError(ValueError):
    """A setting that cannot work: what is wrong, the value got, what is allowed, what to do. The command prints it alone."""


def shortened(text: str, limit: int) -> str:
    """A text, or its two ends where it is longer than `limit` characters.

    >>> shortened("abcdefghij", 4)
    'ab… (6 characters left out) …ij'
    """
    if len(text) <= limit:
        return text
    half = max(limit // 2, 1)
    return f"{text[:half]}… ({len(text) - 2 * half} characters left out) …{text[-half:]}"


class RolloutStatus(StrEnum):
    """How a rollout ended. A wrong answer is COMPLETED: only its reward says that it is wrong.

    TRUNCATED ran out of tokens or turns. The last two depend on nothing the policy did and are not scored: TOOL_ERROR lost the
    server of its tools, ENV_ERROR met an error in the environment's code.
    """

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    TOOL_ERROR = "tool_error"
    ENV_ERROR = "env_error"


@dataclass(frozen=True)
class ServedModel:
    """What trainer and engine must agree on before either starts.

    Attributes:
        name: The model as the config names it.
        dtype: Name of the floating-point type of the weights that are sampled from.
        lora_rank: Rank of the adapter, 0 where all weights are trained.
        resolve: Finds the folder of a name. It may download or convert, so it is called when the folder is first needed.
        chat_template: The text of a chat template in place of the tokenizer's own, or "none".

    >>> ServedModel("smollm2", dtype="bfloat16", lora_rank=16, resolve=lambda name: Path("/models") / name).folder
    '/models/smollm2'
    """

    name: str
    dtype: Literal["bfloat16", "float16", "float32"]
    lora_rank: int
    resolve: Callable[[str], Path]
    chat_template: str | None = None

    @cached_property
    def folder(self) -> str:
        """The model folder that both load."""
        return str(self.resolve(self.name))


@dataclass(frozen=True)
class Prompt:
    """The conversation of an item before the policy's first turn. It is made once per item and phase; all siblings use it.

    Attributes:
        item: The dataset row.
        index: Position of the row in its split.
        messages: The conversation that the policy continues.
        token_ids: Token ids of the conversation, up to and including the header of the policy's turn.
        text: Text of `token_ids`, special tokens included.

    >>> prompt = Prompt({"a": 3, "b": 4}, 0, ({"role": "user", "content": "3 plus 4?"},), (11, 12), "user: 3 plus 4?")
    >>> rollout = prompt.rollout(sibling=1, temperature=0.7, step=5)
    >>> rollout.token_ids, rollout.prompt, rollout.messages[0] is prompt.messages[0]
    ([11, 12], 'user: 3 plus 4?', False)
    """

    item: Item
    index: int
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    text: str

    def rollout(self, sibling: int, temperature: float, step: int | None) -> "Rollout":
        """Starts a rollout. Its messages are copies, so that user code cannot change those of a sibling.

        Args:
            sibling: Position in its group.
            temperature: Sampling temperature.
            step: The optimizer step it is sampled for, None on a held-out split.
        """
        messages = [dict(message) for message in self.messages]
        rollout = Rollout(self.item, self.index, sibling, temperature, self.text, step, messages)
        rollout.start(list(self.token_ids))
        return rollout


@dataclass(frozen=True)
class Completion:
    """What the engine returned for one turn.

    Attributes:
        token_ids: The sampled ids, the end-of-turn token included. Length [L].
        logprobs: Natural log of the probability with which each id was sampled, at the sampling temperature. Length [L].
        finish_reason: "stop" where the model or a stop string ended it, "length" where `max_tokens` did.
        stop_reason: The stop string or the id that ended it, None for the model's own end-of-turn token.
        policy_version: The optimizer step whose weights sampled it.
        earlier_versions: Where new weights came in between, those whose weights sampled its first tokens, one per token.

    >>> completion = Completion((7, 52, 2), (-0.3, -0.1, -0.02), "stop", None, policy_version=3, earlier_versions=(2,))
    >>> completion.policy_versions
    (2, 3, 3)
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    policy_version: int
    earlier_versions: tuple[int, ...] = ()

    @property
    def policy_versions(self) -> tuple[int, ...]:
        """The optimizer step whose weights sampled each token. Length [L]."""
        later = len(self.token_ids) - len(self.earlier_versions)
        return (*self.earlier_versions, *(self.policy_version for _ in range(later)))

    def followed_by(self, rest: "Completion") -> "Completion":
        """This and what was sampled behind it, as one.

        >>> first = Completion((7,), (-0.3,), "stop", "</a>", policy_version=2)
        >>> first.followed_by(Completion((52, 2), (-0.1, -0.02), "stop", None, policy_version=3)).policy_versions
        (2, 3, 3)
        """
        versions = (*self.policy_versions, *rest.policy_versions)
        return Completion(
            self.token_ids + rest.token_ids,
            self.logprobs + rest.logprobs,
            rest.finish_reason,
            rest.stop_reason,
            rest.policy_version,
            earlier_versions=tuple(version for version in versions if version != rest.policy_version),
        )


@dataclass(frozen=True)
class Turn:
    """What the policy wrote before the environment answered.

    Attributes:
        completion: The sampled ids.
        text: Their text without special tokens, for people and reward functions.
        raw_text: Their text with special tokens but without the end of the turn: some models mark tool calls with such tokens.
        answer: `text` without the thinking. Rewards read this.
        raw_answer: `raw_text` without the thinking; calls stand in it as they were written. Tool calls are read from this.

    >>> Turn(Completion((52, 2), (-0.1, -0.02), "stop", None, 3), "<think>3+4</think>7", "<think>3+4</think>7", "7", "7").answer
    '7'
    """

    completion: Completion
    text: str
    raw_text: str
    answer: str
    raw_answer: str


@dataclass
class Rollout:
    """One whole interaction. It grows while it is sampled and is left alone once it has a status.

    The ids are the truth; the texts are for people and reward functions. Prompt tokens P, sampled tokens A and B, and the
    environment's tokens E (the end of the policy's turn where it wrote none, the response, the header of the next turn) line up
    like this, and the three lists always have one length [L]:

        token_ids           P0    P1    A0    A1    E0    E1    E2    B0
        loss_mask           False False True  True  False False False True      (True: the policy sampled this token)
        sampling_logprobs   0.0   0.0   -0.4  -0.1  0.0   0.0   0.0   -0.2      (0.0 where loss_mask is False)

    Attributes:
        item: The dataset row.
        item_index: Position of the row in its split.
        sibling: Position in its group, 0 to G-1.
        temperature: Temperature with which every token of it was sampled.
        prompt: Text of the prompt, special tokens included.
        step: The optimizer step it is sampled for, None on a held-out split.
        messages: The conversation so far, `{"role": …, "content": …}`.
        turns: What the policy wrote, turn by turn.
        state: Free for the environment's own notes.
        counts: What happened to it, by the names that the environment counts.
        status: How it ended, None while it runs.
        rewards: Value of each reward function by name, None where it did not score.
        reward: The weighted sum of those that did, None where nothing is learned from it.

    >>> rollout = Rollout({"a": 3, "b": 4}, item_index=0, sibling=0, temperature=1.0, prompt="3 plus 4?")
    >>> rollout.start([11, 12])
    >>> rollout.append(Turn(Completion((52, 2), (-0.4, -0.1), "stop", None, policy_version=3), "7", "7", "7", "7"))
    >>> rollout.respond("Are you sure?")
    >>> rollout.take_responses(max_chars=100)
    [{'role': 'user', 'content': 'Are you sure?'}]
    >>> rollout.append_environment([15, 16, 17])
    >>> rollout.token_ids, rollout.loss_mask, rollout.completion, rollout.policy_version
    ([11, 12, 52, 2, 15, 16, 17], [False, False, True, True, False, False, False], '7', 3)
    """

    item: Item
    item_index: int
    sibling: int
    temperature: float
    prompt: str
    step: int | None = None
    messages: list[Message] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    status: RolloutStatus | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    _responses: list[Message] = field(default_factory=list, repr=False)

    @property
    def completion(self) -> str:
        """Everything the policy wrote, without special tokens and without what the environment answered."""
        return "".join(turn.text for turn in self.turns)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens before the first that the policy sampled."""
        return self.loss_mask.index(True) if True in self.loss_mask else len(self.token_ids)

    @property
    def num_sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.loss_mask)

    @property
    def policy_version(self) -> int:
        """The oldest policy version among its turns, -1 before the first."""
        completions = [turn.completion for turn in self.turns]
        return min((min((*c.earlier_versions, c.policy_version)) for c in completions), default=-1)

    @property
    def policy_versions(self) -> list[int]:
        """The policy version that sampled each token, -1 where `loss_mask` is False. Length [L]."""
        sampled = (version for turn in self.turns for version in turn.completion.policy_versions)
        return [next(sampled) if kept else -1 for kept in self.loss_mask]

    def respond(self, text: str, role: str = "user") -> None:
        """Answers the newest turn; the policy goes on after it. One turn may have several answers.

        Args:
            text: The answer. No special token in it counts as one, and half a surrogate pair becomes a question mark. Of one
                longer than the environment's `max_response_chars` the middle is left out.
            role: Whose message it is in the chat template, "user" or "tool".

        Raises:
            RuntimeError: There is no turn to answer, or the rollout has ended.
            TypeError: The text is no string.
        """
        if not self.turns or self.status is not None:
            what = "has ended" if self.status is not None else "has no turn yet"
            raise RuntimeError(f"rollout.respond was called on a rollout that {what}")
        if not isinstance(text, str):
            raise TypeError(f"rollout.respond takes a string, got {type(text).__name__}")
        self._responses.append({"role": role, "content": text.encode("utf-8", "replace").decode()})

    def finish(self, status: RolloutStatus = RolloutStatus.COMPLETED) -> None:
        """Ends the interaction."""
        self.status = status

    def start(self, prompt_ids: list[int]) -> None:
        """Sets the prompt's ids, none of which is trained on."""
        assert not self.token_ids, "a rollout is started once"
        self.append_environment(prompt_ids)

    def append(self, turn: Turn) -> None:
        """Adds what the engine sampled in one turn."""
        completion = turn.completion
        self.turns.append(turn)
        self.messages.append({"role": "assistant", "content": turn.text})
        self._extend(list(completion.token_ids), [True] * len(completion.token_ids), list(completion.logprobs))

    def append_environment(self, token_ids: list[int]) -> None:
        """Adds ids that the policy did not sample."""
        self._extend(token_ids, [False] * len(token_ids), [0.0] * len(token_ids))

    def take_responses(self, max_chars: int) -> list[Message]:
        """Moves the answers to the newest turn into `messages` and returns them.

        Args:
            max_chars: The middle of a longer answer is left out, and a note in its place gives the number of its characters.
        """
        taken = [{**message, "content": shortened(message["content"], max_chars)} for message in self._responses]
        self._responses = []
        self.messages += taken
        return taken

    def _extend(self, token_ids: list[int], loss_mask: list[bool], logprobs: list[float]) -> None:
        assert len(token_ids) == len(loss_mask) == len(logprobs)
        self.token_ids += token_ids
        self.loss_mask += loss_mask
        self.sampling_logprobs += logprobs


@dataclass(frozen=True)
class RolloutGroup:
    """The G siblings of one item.

    Attributes:
        rollouts: The siblings, in order. Length [G].
        has_spread: Whether the siblings' rewards differ, so that they can be compared.

    >>> RolloutGroup(rollouts=(), has_spread=False).has_spread
    False
    """

    rollouts: tuple[Rollout, ...]
    has_spread: bool


@dataclass(frozen=True)
class Sample:
    """One trainable row: a rollout with the advantage of each of its sampled tokens.

    Attributes:
        rollout: The rollout.
        advantages: One per sampled token. Length [A].
        old_values: With a critic, its value at each of them before the update. Length [A].
        value_targets: With a critic, what its values should have been. Length [A].

    >>> rollout = Rollout({}, item_index=0, sibling=1, temperature=1.0, prompt="")
    >>> Sample(rollout, advantages=(-0.5, -0.9)).mean_advantage
    -0.7
    """

    rollout: Rollout
    advantages: tuple[float, ...]
    old_values: tuple[float, ...] | None = None
    value_targets: tuple[float, ...] | None = None

    @property
    def mean_advantage(self) -> float:
        """Mean over its tokens, for people."""
        return sum(self.advantages) / max(len(self.advantages), 1)


@dataclass(frozen=True)
class Evaluation:
    """The rollouts of one pass over a held-out split and their figures.

    >>> Evaluation(rollouts=(), metrics={"accuracy": 0.5}).metrics["accuracy"]
    0.5
    """

    rollouts: tuple[Rollout, ...]
    metrics: Mapping[str, float]
