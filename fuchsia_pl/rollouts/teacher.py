"""A teacher: a model that scores the tokens that the policy has sampled (on-policy distillation, `objectives/teacher.py`).

It reads the same tokens as the policy. Only a teacher that is the policy's base model under another prompt reads other tokens in
front; what was sampled, and what an environment answered, follows unchanged.

Shape letters: R rollouts, T sampled tokens of the longest one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuchsia_pl.batch import TrainerSignals
from fuchsia_pl.envs.conversation import checked_messages
from fuchsia_pl.objectives.teacher import teacher_advantages
from fuchsia_pl.rollouts.batcher import num_used_tokens
from fuchsia_pl.rollouts.credit import even_groups, places_of_rows
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import ConfigError, Message, Rollout

# Ids of a whole row -> logprob of each of its ids but the first.
ScoreRows = Callable[[Sequence[Sequence[int]]], Sequence[Sequence[float]]]
# A rollout -> number of tokens of its prompt, and the ids that the teacher reads in their place.
PromptIds = Callable[[Rollout], tuple[int, list[int]]]


@dataclass
class TeacherConfig:
    """The teacher: one of `name`, `adapter` and `prompt`.

    Attributes:
        name: A model on a vLLM server, by the name under which the server lists it. Its tokenizer must be that of the policy.
        url: Address of that server, as http://host:port. Its key is the environment variable VLLM_API_KEY.
        adapter: Folder of a LoRA adapter of the policy's base model, in PEFT's format. The trainer computes with it; no second
            model is loaded.
        prompt: The policy's base model (the adapter of `init_from` included) with a better prompt: a text, which is put in front
            of the system message, or a list of messages, such as worked examples, which are put in front of the conversation. The
            trainer computes with its own frozen weights, so this teacher does not change; no second model is loaded.
        weight: Weight of the teacher's advantages beside those of the rewards.
    """

    name: str | None = None
    url: str | None = None
    adapter: str | None = None
    prompt: str | list[dict[str, str]] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Rejects none or several teachers, an address without a name, empty prompts, and weights that are not above 0."""
        given = [kind for kind in ("name", "adapter", "prompt") if self.__dict__[kind] is not None]
        if len(given) != 1:
            raise ConfigError(
                f"data.teacher needs one of name, adapter and prompt, got {' and '.join(given) or 'none'}"
            )
        if (self.url is None) != (self.name is None):
            raise ConfigError(
                f"data.teacher.name={self.name!r} and url={self.url!r} belong together: the name of a model on a vLLM server and "
                "the address of that server, as http://host:8000"
            )
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"data.teacher.url must be like http://host:8000, got {self.url!r}")
        if not (self.weight > 0.0 and math.isfinite(self.weight)):
            raise ConfigError(f"data.teacher.weight must be above 0 and finite, got {self.weight}")
        if self.prompt is not None and not (self.prompt.strip() if isinstance(self.prompt, str) else self.prompt):
            raise ConfigError(
                "data.teacher.prompt is empty: give a text or a list of messages, or leave the teacher out"
            )
        if isinstance(self.prompt, list):
            question = {"role": "user", "content": "a question"}  # a conversation ends with one
            self.prompt = checked_messages([*self.prompt, question], "data.teacher.prompt")[:-1]

    def before(self, messages: Sequence[Message]) -> list[Message]:
        """A conversation as a teacher with a `prompt` reads it.

        >>> TeacherConfig(prompt="Add.").before([{"role": "user", "content": "1+1?"}])
        [{'role': 'system', 'content': 'Add.'}, {'role': 'user', 'content': '1+1?'}]
        >>> TeacherConfig(prompt=[{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]).before(
        ...     [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}])[0]
        {'role': 'system', 'content': 'Add.'}
        """
        system, rest = list(messages[:1]), list(messages[1:])
        if not system or system[0]["role"] != "system":
            system, rest = [], list(messages)
        if isinstance(self.prompt, str):
            text = "\n\n".join([self.prompt, *(message["content"] for message in system)])
            return [{"role": "system", "content": text}, *rest]
        return [*system, *(dict(message) for message in self.prompt or []), *rest]


@dataclass(frozen=True)
class Teacher:
    """The teacher of a run, ready to score.

    Attributes:
        weight: See `TeacherConfig`.
        prompt_ids: The ids that it reads in place of a rollout's prompt; None if it reads the policy's prompt.
        score: Scores rows on a server; None if the trainer computes.

    >>> Teacher(weight=1.0).rows([])
    []
    """

    weight: float
    prompt_ids: PromptIds | None = None
    score: ScoreRows | None = None

    def rows(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The groups as the teacher reads them; their rollouts are copies if its prompt is another one."""
        if self.prompt_ids is None:
            return list(groups)
        found = []
        for group in groups:
            number, prompt_ids = self.prompt_ids(group.rollouts[0])
            rollouts = tuple(with_prompt(rollout, number, prompt_ids) for rollout in group.rollouts)
            found.append(replace(group, rollouts=rollouts))
        return found

    def scores(self, groups: Sequence[RolloutGroup]) -> Tensor:
        """Logprobs of the sampled tokens by the server, float32 [R, T], 0 behind them."""
        assert self.score is not None, "the trainer computes for a teacher without a server"
        rollouts = [rollout for group in even_groups(groups) for rollout in group.rollouts]
        found = torch.zeros(len(rollouts), max((rollout.num_sampled_tokens for rollout in rollouts), default=0))
        asked = [
            (place, number, row)
            for place, rollout in enumerate(rollouts)
            for number, row in enumerate(rollout.rows)
            if row.num_sampled_tokens
        ]
        # What an environment wrote after the last sampled token may exceed every limit, and no token depends on it.
        used = [num_used_tokens(row) for _, _, row in asked]
        scored = self.score([row.token_ids[:end] for (_, _, row), end in zip(asked, used, strict=True)])
        for (place, number, row), end, logprobs in zip(asked, used, scored, strict=True):
            sampled = torch.tensor(row.loss_mask[1:end])
            tokens = places_of_rows(rollouts[place])[number]
            found[place, tokens] = torch.tensor(logprobs, dtype=torch.float32)[sampled]
        return found


def with_prompt(rollout: Rollout, num_replaced: int, prompt_ids: Sequence[int]) -> Rollout:
    """A copy of a rollout with other ids in place of its first ones, for a forward pass.

    >>> rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="")
    >>> rollout.start([11, 12, 15])
    >>> longer = with_prompt(rollout, 2, [7, 8, 9])
    >>> longer.token_ids, longer.loss_mask
    ([7, 8, 9, 15], [False, False, False, False])
    """
    number = len(prompt_ids)
    return replace(
        rollout,
        token_ids=[*prompt_ids, *rollout.token_ids[num_replaced:]],
        loss_mask=[False] * number + rollout.loss_mask[num_replaced:],
        sampling_logprobs=[0.0] * number + rollout.sampling_logprobs[num_replaced:],
    )


def teacher_fractions(signals: TrainerSignals, lengths: Tensor, weight: float) -> dict[str, tuple[float, float]]:
    """Metrics of a teacher on the sampled tokens of all rollouts, as numerators and denominators.

    Args:
        signals: Logprobs of policy and teacher [R, T].
        lengths: Number of sampled tokens, int64 [R].
        weight: Weight of the teacher's advantages.

    >>> signals = TrainerSignals(None, None, torch.tensor([[-1.0, -9.0]]), torch.tensor([[-3.0, 0.0]]))
    >>> teacher_fractions(signals, torch.tensor([1]), weight=0.5)
    {'teacher/kl': (2.0, 1.0), 'teacher/advantage': (1.0, 1.0)}
    """
    assert signals.teacher_logprobs is not None
    assert signals.policy_logprobs is not None
    mask = torch.arange(signals.policy_logprobs.shape[1]) < lengths.unsqueeze(1)
    advantages = teacher_advantages(signals.teacher_logprobs, signals.policy_logprobs)[mask]
    number = float(lengths.sum())
    return {
        "teacher/kl": (-float(advantages.sum()), number),
        "teacher/advantage": (weight * float(advantages.abs().sum()), number),
    }
