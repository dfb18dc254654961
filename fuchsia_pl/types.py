"""Data types of a run, in the order of the data flow.

item -> Prompt (`rollouts/prompt.py`) -> Completion -> Turn -> Row -> Rollout
-> RolloutGroup -> Sample (`samples.py`) -> Batch (`batch.py`)

Shape letters: G siblings of a group, L tokens of a row.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

Item = Mapping[str, Any]
Message = dict[str, str]
# Value of a chat template for models without one: message texts are joined by blank lines.
PLAIN_TEXT = "none"


class ConfigError(ValueError):
    """An invalid setting. The message states the problem, the value, the allowed values, and the remedy, without a traceback."""


class RunEndingConfigError(ConfigError):
    """A wrong setting that only a rollout shows.

    Raised by an environment, a reward function or an agent, it ends the run, whatever `on_error` is. Another exception may only
    leave its rollout unscored.
    """


def shortened(text: str, limit: int) -> str:
    """Returns a text, or only its two ends if it has more than `limit` characters.

    >>> shortened("abcdefghij", 4)
    'ab… (6 characters left out) …ij'
    """
    if len(text) <= limit:
        return text
    half = max(limit // 2, 1)
    return f"{text[:half]}… ({len(text) - 2 * half} characters left out) …{text[-half:]}"


class RolloutStatus(StrEnum):
    """End of a rollout. A rollout with a wrong answer is COMPLETED; its reward shows that the answer is wrong.

    TRUNCATED means that tokens or turns ran out. TOOL_ERROR (the tool server was lost) and ENV_ERROR (the environment's code
    raised an error) do not depend on the policy, and such rollouts are not scored.
    """

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    TOOL_ERROR = "tool_error"
    ENV_ERROR = "env_error"


@dataclass(frozen=True)
class ServedModel:
    """Model settings that trainer and engine share.

    Attributes:
        name: Model name in the config.
        dtype: Floating-point type of the engine's weights.
        lora_rank: Rank of the adapter, 0 if all weights are trained.
        resolve: Returns the folder of a model name. It may download or convert the model, so it is called only when needed.
        chat_template: Text of a chat template that replaces the tokenizer's, or "none".

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
        """The model folder that trainer and engine load."""
        return str(self.resolve(self.name))


@dataclass(frozen=True)
class Completion:
    """Engine output for one turn.

    Attributes:
        token_ids: The sampled ids, the end-of-turn token included. Length [L].
        logprobs: Log-probabilities of the sampled ids at the sampling temperature. Length [L].
        finish_reason: "stop" if the model or a stop string ended the turn, "length" if `max_tokens` did.
        stop_reason: The stop string or the id that ended the turn, None for the model's own end-of-turn token.
        policy_version: The optimizer step whose weights sampled the last tokens.
        earlier_versions: If weights changed during the turn: policy versions of its first tokens, one per token.

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
        """Joins this completion and its continuation.

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
    """One turn: text that the policy wrote without interruption by the environment.

    Attributes:
        completion: The sampled ids.
        text: Text without special tokens, for people and reward functions.
        raw_text: Text with special tokens but without the end of the turn. Some models mark tool calls with special tokens.
        answer: `text` without the thinking. Reward functions read it.
        raw_answer: `raw_text` without the thinking. Tool calls are read from it.

    >>> Turn(Completion((52, 2), (-0.1, -0.02), "stop", None, 3), "<think>3+4</think>7", "<think>3+4</think>7", "7", "7").answer
    '7'
    """

    completion: Completion
    text: str
    raw_text: str
    answer: str
    raw_answer: str


@dataclass
class Row:
    """One sequence of ids that the trainer computes as a whole: a prompt, and the turns that continue it.

    P are prompt tokens, A and B sampled tokens. E are the environment's tokens: the end of the policy's turn if the policy did
    not write it, the response, and the header of the next turn. The three lists always have the same length [L]:

        token_ids           P0    P1    A0    A1    E0    E1    E2    B0
        loss_mask           False False True  True  False False False True      (True: the policy sampled this token)
        sampling_logprobs   0.0   0.0   -0.4  -0.1  0.0   0.0   0.0   -0.2      (0.0 where loss_mask is False)

    Attributes:
        prompt: Text of the prompt, special tokens included.
        messages: The conversation, `{"role": …, "content": …}`.
        token_ids: The ids.
        loss_mask: Whether the policy sampled each id.
        sampling_logprobs: Log-probability of each sampled id at the sampling temperature.
        turns: The policy's turns, in order.

    >>> turn = Turn(Completion((52, 2), (-0.4, -0.1), "stop", None, policy_version=3), "7", "7", "7", "7")
    >>> row = Row("3 plus 4?", [], [11, 52, 2], [False, True, True], [0.0, -0.4, -0.1], [turn])
    >>> row.num_prompt_tokens, row.num_sampled_tokens, row.completion, row.policy_versions
    (1, 2, '7', [-1, 3, 3])
    """

    prompt: str
    messages: list[Message]
    token_ids: list[int]
    loss_mask: list[bool]
    sampling_logprobs: list[float]
    turns: list[Turn]

    @property
    def completion(self) -> str:
        """Text of the row's turns, without special tokens and without the environment's responses."""
        return "".join(turn.text for turn in self.turns)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens before the first sampled token."""
        return self.loss_mask.index(True) if True in self.loss_mask else len(self.token_ids)

    @property
    def num_sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.loss_mask)

    @property
    def policy_versions(self) -> list[int]:
        """The policy version that sampled each token, -1 where `loss_mask` is False. Length [L]."""
        sampled = (version for turn in self.turns for version in turn.completion.policy_versions)
        return [next(sampled) if kept else -1 for kept in self.loss_mask]


@dataclass
class Rollout:
    """One whole interaction. It grows during sampling and does not change after it has a status.

    Training uses the ids; the texts are for people and reward functions. Most rollouts are one `Row`. If the conversation is
    rewritten, so that a prompt does not continue the ids before it, `branch` closes the row and starts another one. The lists
    of ids, `messages` and `turns` are those of the open row, the last one; properties are over all rows.

    Attributes:
        item: The dataset row.
        item_index: Position of the row in its split.
        sibling: Position in its group, 0 to G-1.
        temperature: Sampling temperature of all tokens.
        prompt: Text of the prompt, special tokens included.
        step: The optimizer step it is sampled for, None on a held-out split.
        messages: The conversation so far, `{"role": …, "content": …}`.
        token_ids: See `Row`, as the two lists that follow.
        loss_mask: Whether the policy sampled each id.
        sampling_logprobs: Log-probability of each sampled id.
        turns: The policy's turns, in order.
        earlier_rows: The rows that were closed, in order.
        state: Storage for the environment.
        counts: Counters by name; the environment declares the names.
        status: How it ended, None while it runs.
        rewards: Value of each reward function by name, None if the function did not score this rollout. A function that scores
            turns has the sum over its turns here.
        turn_rewards: Values of the reward functions that score turns, by name; one number per turn.
        weighted_turn_rewards: Their weighted sum, one number per turn; empty without such functions. It is a part of `reward`.
        reward: Weighted sum of the rewards, None if the rollout is not scored.
        part: Name of its environment in a mixture, "" without one.

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
    earlier_rows: list[Row] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    status: RolloutStatus | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    turn_rewards: dict[str, list[float]] = field(default_factory=dict)
    weighted_turn_rewards: list[float] = field(default_factory=list)
    reward: float | None = None
    part: str = ""
    _responses: list[Message] = field(default_factory=list, repr=False)

    @property
    def rows(self) -> list[Row]:
        """All rows, the open one last. It shares its lists with the rollout."""
        ids = (self.token_ids, self.loss_mask, self.sampling_logprobs)
        return [*self.earlier_rows, Row(self.prompt, self.messages, *ids, self.turns)]

    @property
    def all_turns(self) -> list[Turn]:
        """The policy's turns of all rows, in order."""
        return [turn for row in self.rows for turn in row.turns]

    @property
    def completion(self) -> str:
        """Text of all of the policy's turns, without special tokens and without the environment's responses."""
        return "".join(row.completion for row in self.rows)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens before the first sampled token of the first row."""
        return self.rows[0].num_prompt_tokens

    @property
    def num_sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(row.num_sampled_tokens for row in self.rows)

    @property
    def policy_version(self) -> int:
        """The oldest policy version among its turns, -1 before the first turn."""
        completions = [turn.completion for turn in self.all_turns]
        return min((min((*c.earlier_versions, c.policy_version)) for c in completions), default=-1)

    @property
    def policy_versions(self) -> list[int]:
        """The policy version that sampled each token of all rows, -1 where `loss_mask` is False."""
        return [version for row in self.rows for version in row.policy_versions]

    def respond(self, text: str, role: str = "user") -> None:
        """Adds a response to the newest turn; the policy continues after it. A turn may have several responses.

        Args:
            text: The response. Names of special tokens in it are plain text, and half a surrogate pair becomes a question mark.
                The middle of a text with more than `max_response_chars` characters is left out.
            role: Role of the message in the chat template, "user" or "tool".

        Raises:
            RuntimeError: There is no turn, or the rollout has ended.
            TypeError: The text is not a string.
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
        """Sets the prompt's ids, which are not trained on."""
        assert not self.token_ids, "a rollout is started once"
        self.append_environment(prompt_ids)

    def branch(self, prompt_ids: list[int], prompt: str = "", messages: Sequence[Message] = ()) -> None:
        """Closes the open row between two turns and starts another one. All rows share the rollout's reward.

        A row without a turn is replaced: nothing of it was sampled.

        Args:
            prompt_ids: The ids that the next turn follows, which are not trained on.
            prompt: Their text, special tokens included.
            messages: The conversation that they are.

        Raises:
            RuntimeError: The rollout has ended, or has responses that are not in its ids yet.

        >>> rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="3 plus 4?")
        >>> rollout.start([11, 12])
        >>> rollout.append(Turn(Completion((52, 2), (-0.4, -0.1), "stop", None, policy_version=3), "7", "7", "7", "7"))
        >>> rollout.branch([11, 13])
        >>> [row.token_ids for row in rollout.rows], rollout.num_sampled_tokens, rollout.completion
        ([[11, 12, 52, 2], [11, 13]], 2, '7')
        """
        if self.status is not None or self._responses:
            what = "has ended" if self.status is not None else "has responses that no turn follows yet"
            raise RuntimeError(f"rollout.branch was called on a rollout that {what}")
        if self.turns:
            self.earlier_rows = self.rows
        self.prompt, self.messages, self.turns = prompt, list(messages), []
        self.token_ids, self.loss_mask, self.sampling_logprobs = [], [], []
        self.start(prompt_ids)

    def append(self, turn: Turn) -> None:
        """Adds a sampled turn."""
        completion = turn.completion
        self.turns.append(turn)
        self.messages.append({"role": "assistant", "content": turn.text})
        self._extend(list(completion.token_ids), [True] * len(completion.token_ids), list(completion.logprobs))

    def append_environment(self, token_ids: list[int]) -> None:
        """Adds ids that the policy did not sample."""
        self._extend(token_ids, [False] * len(token_ids), [0.0] * len(token_ids))

    def take_responses(self, max_chars: int) -> list[Message]:
        """Moves the responses to the newest turn into `messages` and returns them.

        Args:
            max_chars: Largest length of a response. A note with the number of omitted characters replaces the middle.
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
