"""A reward function that is a sequence-classification model on a vLLM server."""

import os
import time
from typing import Any, Literal, get_args

from fuchsia_pl.envs.rewards.model_reward import ModelReward, Output, Scale
from fuchsia_pl.envs.rewards.transcript import Transcript
from fuchsia_pl.types import ConfigError

Endpoint = Literal["classify", "pooling"]
API_KEY_VARIABLE = "VLLM_API_KEY"
FIRST_WAIT_S = 0.5
MAX_EXCERPT = 300


class RefusedError(RuntimeError):
    """The server refused a request; another try would have the same result."""


class RewardServer(ModelReward):
    """The score that a reward model on a vLLM server gives to the conversation: `vllm serve NAME --runner pooling`.

    Conversations become ids here, with the model's own tokenizer, exactly as for `RewardModel`. The server only computes, and
    `use_activation: false` asks it for raw outputs. The key is that of the environment variable VLLM_API_KEY. vLLM reads the last
    token of a conversation also where it is the config's pad id; see `Classifier`.

    Args:
        url: Address of the server, such as "http://127.0.0.1:8001".
        name: The model, as the server names it: folder or hub id (`--served-model-name`). Its tokenizer is loaded here.
        revision: Revision of the tokenizer on the hub.
        label: The label whose output is the reward, by name or position. Not needed for a model with one output.
        output: "score" is the model's raw output, "probability" a number between 0 and 1.
        chat_template: Text of a chat template that replaces the tokenizer's.
        endpoint: Path of the requests.
        reward_name: Name of the reward in logs.

    Attributes:
        timeout_s: Time limit in seconds of one request.
        max_retries: Number of retries after a connection error or a 5xx response.

    Raises:
        ConfigError: A setting is out of range.
    """

    timeout_s = 30.0
    max_retries = 2
    min_timeout_s = 600.0  # of a call, which may wait for the requests of other groups

    def __init__(
        self,
        url: str,
        name: str,
        revision: str | None = None,
        label: str | int | None = None,
        output: Output = "score",
        chat_template: str | None = None,
        endpoint: Endpoint = "classify",
        reward_name: str = "reward_model",
    ) -> None:
        super().__init__(name, revision, label, output, chat_template, reward_name)
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f'RewardServer requires a url such as "http://127.0.0.1:8001", got {url!r}')
        if endpoint not in get_args(Endpoint):
            raise ConfigError(f"RewardServer requires an endpoint of {list(get_args(Endpoint))}, got {endpoint!r}")
        self.url = url.rstrip("/")
        self.endpoint = endpoint

    def _start(self, config: Any) -> int | None:
        try:
            cards = self._ask("GET", "/v1/models", None)["data"]
        except (RuntimeError, KeyError) as error:
            raise ConfigError(f"the server of the reward model {self.name!r} does not answer: {error}") from error
        served = {name for card in cards for name in (card["id"], card.get("root"))}
        if self.name not in served:
            shown = sorted(str(card["id"]) for card in cards)
            raise ConfigError(
                f"the server {self.url} serves {shown} and not {self.name!r}, whose tokenizer is "
                "used here: start it with `vllm serve` and this name and `--runner pooling`, or name it so by --served-model-name"
            )
        return min((card["max_model_len"] for card in cards if card.get("max_model_len")), default=None)

    def _check(self, scale: Scale, transcript: Transcript) -> None:
        row = transcript.ids([{"role": role, "content": "a"} for role in ("user", "assistant")])
        assert row is not None
        try:
            (outputs,) = self._logits([row])
        except RuntimeError as error:
            raise ConfigError(f"the server {self.url} does not score a conversation: {error}") from error
        if len(outputs) != scale.num_labels:
            raise ConfigError(
                f"the server {self.url} returns {len(outputs)} outputs per conversation, and the config of {self.name!r} has "
                f"{scale.num_labels} labels: serve the same model"
            )

    def _logits(self, rows: list[list[int]]) -> list[list[float]]:
        body = {"model": self.name, "input": rows, "use_activation": False}
        if self.endpoint == "pooling":
            body |= {"task": "classify", "encoding_format": "float"}
        field = "probs" if self.endpoint == "classify" else "data"
        answer = self._ask("POST", f"/{self.endpoint}", body)
        try:
            outputs = {int(entry["index"]): [float(value) for value in entry[field]] for entry in answer["data"]}
            return [outputs[index] for index in range(len(rows))]
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedError(f"/{self.endpoint} answered in an unknown form: {str(answer)[:MAX_EXCERPT]}") from error

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON of an answer. A request that fails for a reason of the moment is repeated, with growing waits."""
        for attempt in range(self.max_retries + 1):
            if attempt:
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                return self._ask_once(method, path, body)
            except ConnectionError as error:
                if attempt == self.max_retries:
                    raise RuntimeError(f"{error} (try {attempt + 1})") from error
        raise AssertionError("the last attempt returns or raises")

    def _ask_once(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        import httpx

        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            response = httpx.request(method, f"{self.url}{path}", json=body, headers=headers, timeout=self.timeout_s)
        except httpx.HTTPError as error:
            raise ConnectionError(f"{self.url}{path} failed ({type(error).__name__}: {error})") from error
        excerpt = f"{self.url}{path} answered {response.status_code} {response.text[:MAX_EXCERPT]}"
        if response.is_server_error:
            raise ConnectionError(excerpt)
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise RefusedError(f"{excerpt}: set the environment variable {API_KEY_VARIABLE} to the key of the server")
        if response.status_code != httpx.codes.OK:
            raise RefusedError(excerpt)
        try:
            answer: dict[str, Any] = response.json()
        except ValueError as error:
            raise RefusedError(f"{excerpt}, which is not JSON") from error
        return answer
