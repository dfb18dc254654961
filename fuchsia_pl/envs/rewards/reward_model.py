"""A reward function that is a sequence-classification model in this process."""

import re
from typing import Any, get_args

from fuchsia_pl.envs.rewards.classifier import Classifier, Dtype, find_device
from fuchsia_pl.envs.rewards.model_reward import ModelReward, Output, hold
from fuchsia_pl.types import ConfigError

DEVICE = re.compile(r"auto|cpu|cuda:[0-9]{1,3}")


class RewardModel(ModelReward):
    """The score that a reward model gives to the conversation.

    The model reads the whole conversation in the form of its own chat template, with the policy's answers in place of its turns:
    thinking is not read, and names of control tokens in texts are text. It is loaded once per process, before the engine starts.
    A conversation that is longer than the model's context is never truncated: it is not scored and counted as
    `<reward_name>_too_long`. One that the template does not show is counted as `<reward_name>_not_shown`.

    Args:
        name: Folder or hub id of a model for `AutoModelForSequenceClassification`.
        revision: Revision on the hub.
        label: The label whose output is the reward, by name or position. Not needed for a model with one output.
        output: "score" is the model's raw output, "probability" a number between 0 and 1.
        chat_template: Text of a chat template that replaces the tokenizer's.
        device: "auto" (the rank's GPU if there is one), "cpu", or a GPU such as "cuda:1".
        dtype: Type of weights and computation.
        reward_name: Name of the reward in logs.

    Attributes:
        batch_size: Largest number of conversations in one forward.

    Raises:
        ConfigError: A setting is out of range.
    """

    batch_size = 8

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        label: str | int | None = None,
        output: Output = "score",
        chat_template: str | None = None,
        device: str = "auto",
        dtype: Dtype = "float32",
        reward_name: str = "reward_model",
    ) -> None:
        super().__init__(name, revision, label, output, chat_template, reward_name)
        if not DEVICE.fullmatch(device):
            raise ConfigError(f'RewardModel requires a device of "auto", "cpu" or "cuda:<number>", got {device!r}')
        if dtype not in get_args(Dtype):
            raise ConfigError(f"RewardModel requires a dtype of {list(get_args(Dtype))}, got {dtype!r}")
        self.device = device
        self.dtype: Dtype = dtype
        self._classifier: Classifier | None = None

    def device_gb(self, device_index: int) -> float:
        """Memory of the loaded weights on a GPU, in GiB. What vLLM's cache leaves free contains it."""
        return self._classifier.device_gb(device_index) if self._classifier is not None else 0.0

    def _start(self, config: Any) -> int | None:
        self._classifier = Classifier(self.name, self.revision, self.dtype, find_device(self.device))
        return self._classifier.max_tokens

    def _logits(self, rows: list[list[int]]) -> list[list[float]]:
        assert self._classifier is not None
        with hold(self._lock):  # groups are scored in threads of their own
            return self._classifier.logits(rows, self.batch_size)
