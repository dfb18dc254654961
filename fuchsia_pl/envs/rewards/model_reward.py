"""What reward models in this process and on a server share: what they read, and which number is the reward."""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fuchsia_pl.envs.rewards.matches import answered_messages
from fuchsia_pl.envs.rewards.transcript import Transcript, check_revision, source, words_of
from fuchsia_pl.types import ConfigError, Rollout

Output = Literal["score", "probability"]
# Bound of the wait for the rollouts of other groups. The environment's `timeout_s` normally ends the call earlier.
TURN_TIMEOUT_S = 3600.0
# `problem_type` of models whose labels have a sigmoid each; the labels of all others share a softmax.
INDEPENDENT = "multi_label_classification"


@dataclass(frozen=True)
class Scale:
    """The number of a classifier's outputs that is the reward.

    Attributes:
        index: Position of the label.
        num_labels: Number of outputs.
        output: "score" is the output itself. "probability" is its sigmoid for one label and for independent ones, else its
            softmax.
        is_independent: Whether several labels may be true at once.

    >>> Scale(0, 1, "probability").value([0.0]), Scale(1, 2, "probability").value([2.0, 2.0]), Scale(1, 2, "score").value([5, 3])
    (0.5, 0.5, 3.0)
    """

    index: int
    num_labels: int
    output: Output
    is_independent: bool = False

    def value(self, logits: Sequence[float]) -> float:
        """The reward of one conversation, given the raw outputs. Length [num_labels]."""
        score = float(logits[self.index])
        if self.output == "score":
            return score
        # A sigmoid is the softmax against 0.
        against = [score, 0.0] if self.num_labels == 1 or self.is_independent else logits
        highest = max(against)
        return math.exp(score - highest) / sum(math.exp(other - highest) for other in against)


class ModelReward(ABC):
    """Base of the reward functions that are a sequence-classification model.

    Args:
        name: Folder or hub id of the model. Its tokenizer and config are loaded here.
        revision: Revision on the hub.
        label: The label whose output is the reward, by name or position. Not needed for a model with one output.
        output: "score", the raw output, or "probability"; see `Scale`.
        chat_template: Text of a chat template that replaces the tokenizer's.
        reward_name: Name of the reward in logs.

    Raises:
        ConfigError: A setting is out of range.
    """

    none_unscores = True  # else a text that the model cannot read would be worth more than one with a negative score

    def __init__(
        self,
        name: str,
        revision: str | None,
        label: str | int | None,
        output: Output,
        chat_template: str | None,
        reward_name: str,
    ) -> None:
        kind = type(self).__name__
        if output not in get_args(Output):
            raise ConfigError(f"{kind} requires an output of {list(get_args(Output))}, got {output!r}")
        if chat_template is not None and "{{" not in chat_template and "{%" not in chat_template:
            raise ConfigError(
                f"{kind} requires the text of a template as chat_template, got {chat_template[:80]!r}, which has neither {{{{ "
                "nor {%"
            )
        check_revision(name, revision)
        self.__name__ = reward_name
        self.name = name
        self.revision = revision
        self.label = label
        self.output: Output = output
        self.chat_template = chat_template
        self.too_long = f"{reward_name}_too_long"
        self.not_shown = f"{reward_name}_not_shown"
        self.counters = (self.too_long, self.not_shown)
        self._lock = threading.Lock()
        self._transcript: Transcript | None = None
        self._scale: Scale | None = None
        self._max_tokens: int | None = None

    def prepare(self) -> None:
        """Loads what scoring needs, once. It is called before the engine starts.

        Raises:
            ConfigError: The model is missing, is no reward model, or has several outputs and no label is chosen.
        """
        with hold(self._lock):
            if self._scale is not None:
                return
            transcript = Transcript(self.name, self.revision, self.chat_template)
            config = _load_config(self.name, self.revision)
            limit = self._start(config)
            scale = read_scale(config, self.name, self.label, self.output)
            self._check(scale, transcript)
            limits = [given for given in (limit, transcript.max_tokens) if given is not None]
            self._max_tokens = min(limits, default=None)
            self._transcript, self._scale = transcript, scale

    def __call__(self, rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float | None]:
        """Scores some rollouts. None for one that the model cannot read: it is counted."""
        self.prepare()
        assert self._scale is not None
        with hold(self._lock):  # groups are scored in threads of their own, and a tokenizer is for one thread at a time
            rows = [self._row(rollout) for rollout in rollouts]
        readable = [row for row in rows if row is not None]
        scored = iter(self._logits(readable) if readable else [])
        return [None if row is None else self._scale.value(next(scored)) for row in rows]

    def _row(self, rollout: Rollout) -> list[int] | None:
        assert self._transcript is not None
        ids = self._transcript.ids(answered_messages(rollout))
        if ids is None:
            rollout.counts[self.not_shown] += 1
            return None
        if self._max_tokens is not None and len(ids) > self._max_tokens:
            rollout.counts[self.too_long] += 1
            return None
        return ids

    @abstractmethod
    def _start(self, config: Any) -> int | None:
        """Loads or finds the model; returns the largest number of tokens that it reads, None if it has no limit."""

    def _check(self, scale: Scale, transcript: Transcript) -> None:
        """Checks the started model before the first conversation."""

    @abstractmethod
    def _logits(self, rows: list[list[int]]) -> list[list[float]]:
        """The raw outputs of some conversations, of one or more ids each. Shape [rows, labels]."""


def read_scale(config: Any, name: str, label: str | int | None, output: Output) -> Scale:
    """Finds a label among those of a model.

    Args:
        config: The model's config.
        name: Its name, for messages.
        label: Name or position of the label; None for a model with one.
        output: See `Scale`.

    Raises:
        ConfigError: There is no such label, or there are several and none is chosen.
    """
    names = {int(index): str(label_name) for index, label_name in config.id2label.items()}
    is_independent = config.problem_type == INDEPENDENT
    if label is None and config.num_labels == 1:
        return Scale(0, 1, output)
    found = [i for i, known in names.items() if label is not None and label in (i, known)]
    if len(found) != 1:
        shown = dict(list(names.items())[:10])
        chosen = "no label is chosen" if label is None else f"label={label!r} is none of them"
        raise ConfigError(
            f"the reward model {name!r} has {config.num_labels} labels, {shown}, and {chosen}: give label as a name or a position"
        )
    return Scale(found[0], config.num_labels, output, is_independent)


@contextmanager
def hold(lock: threading.Lock) -> Iterator[None]:
    """Holds a lock inside the `with` block.

    Raises:
        TimeoutError: Another thread has held it for too long.
    """
    if not lock.acquire(timeout=TURN_TIMEOUT_S):
        raise TimeoutError(f"the reward model was busy for {TURN_TIMEOUT_S:g} s")
    try:
        yield
    finally:
        lock.release()


def _load_config(name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**source(name, revision))
    except Exception as error:  # the libraries may raise anything on a missing or broken file
        raise ConfigError(
            f"the reward model {name!r} cannot be loaded ({words_of(error)}): check the spelling, "
            "the revision and the network, or give a folder written by save_pretrained"
        ) from error
