"""An engine that generates with transformers in this process, one completion at a time, for `fuchsia chat`."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from fuchsia_pl.engines.base import Engine, EngineError, EngineSpec, SamplingParams
from fuchsia_pl.policy.adapter import add_adapter, check_adapter
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.loading import load_base
from fuchsia_pl.types import Completion, ConfigError

TOKEN_LIMIT = "max_position_embeddings"


class LocalEngine(Engine):
    """Generates with a model of transformers, with its adapter or without it.

    Sampling is that of training: temperature only, from the whole vocabulary.

    Args:
        folder: Folder of the model.
        dtype: Type of the weights.
        adapter: Folder of a PEFT adapter; None for the model alone.
        name: Name of the model, for error messages.

    Raises:
        ConfigError: The files of the model or of the adapter cannot be used.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, adapter: Path | None, name: str) -> None:
        base = load_base(folder, dtype)
        self.model: Any = base
        if adapter is not None:
            self.model = add_adapter(base, PolicyConfig(name, lora=adapter_settings(adapter)))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device).eval()
        base.generation_config = GenerationConfig()  # the model's own may cut the distribution
        self.max_length: int | None = base.config.get_text_config().to_dict().get(TOKEN_LIMIT)
        self.uses_adapter = adapter is not None
        self.on_token: Callable[[int], None] = lambda token_id: None
        self.is_stopped = False
        self._tokenizer: Any = None

    @property
    def has_adapter(self) -> bool:
        """Whether the model has an adapter, which `uses_adapter` turns on and off."""
        return isinstance(self.model, peft.PeftModel)

    @property
    def policy_version(self) -> int:
        """0: the weights never change."""
        return 0

    def start(self, spec: EngineSpec) -> None:
        """Does nothing: the constructor loads the model."""

    def read_stop_strings_with(self, tokenizer: Any) -> None:
        """Sets the tokenizer that finds stop strings in ids."""
        self._tokenizer = tokenizer

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Samples one completion, and calls `on_token` with each id as soon as it is sampled.

        Setting `is_stopped` ends it after the next token; its finish reason is then "length".
        """
        return await asyncio.to_thread(self._generate, list(prompt_ids), sampling)

    async def load_weights(self, path: Path, version: int) -> None:
        """Not supported.

        Raises:
            EngineError: Always.
        """
        raise EngineError("LocalEngine keeps the weights that it was made with")

    def close(self) -> None:
        """Does nothing: the model is freed with this object."""

    @torch.inference_mode()
    def _generate(self, prompt_ids: list[int], sampling: SamplingParams) -> Completion:
        self.is_stopped = False
        streamer = _Tokens(self.on_token)
        stops = StoppingCriteriaList([_Stopped(self)])
        if sampling.stop:
            stops.append(StopStringCriteria(self._tokenizer, list(sampling.stop)))
        # transformers warns of settings that greedy sampling does not use.
        how: dict[str, Any] = {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(
            do_sample=sampling.temperature > 0,
            **(how if sampling.temperature > 0 else {}),
            max_new_tokens=sampling.max_tokens,
            eos_token_id=list(sampling.stop_token_ids),
            pad_token_id=sampling.stop_token_ids[0] if sampling.stop_token_ids else 0,
        )
        ids = torch.tensor([prompt_ids], device=self.device)
        without = self.model.disable_adapter() if self.has_adapter and not self.uses_adapter else nullcontext()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), without:
            torch.manual_seed(sampling.seed % 2**63)
            # All tokens of the prompt are real; without a mask transformers guesses one from the padding id.
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                stopping_criteria=stops,
                streamer=streamer,
            )
        sampled = tuple(streamer.token_ids)
        has_ended = bool(sampled) and sampled[-1] in sampling.stop_token_ids
        is_whole = has_ended or (len(sampled) < sampling.max_tokens and not self.is_stopped)
        return Completion(sampled, (0.0,) * len(sampled), "stop" if is_whole else "length", None, policy_version=0)


class _Tokens(BaseStreamer):
    """Collects the sampled ids. The first call of `put` has the prompt."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.token_ids: list[int] = []
        self._on_token = on_token
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        for token_id in value.flatten().tolist():
            self.token_ids.append(token_id)
            self._on_token(token_id)

    def end(self) -> None:
        """Nothing is buffered."""


class _Stopped(StoppingCriteria):
    """Ends generation when `is_stopped` is set."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._engine.is_stopped, device=input_ids.device)


def adapter_settings(folder: Path) -> LoRASettings:
    """The settings with which an adapter of any rank is loaded.

    Raises:
        ConfigError: The folder has no plain LoRA adapter.
    """
    try:
        found = peft.PeftConfig.from_pretrained(str(folder))
        settings = LoRASettings(r=found.r, alpha=found.lora_alpha, use_rslora=found.use_rslora, init_from=str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the folder {folder} has no LoRA adapter that can be read ({' '.join(str(error).split())}): give one that a run or "
            "save_pretrained wrote"
        ) from error
    check_adapter(settings)
    return settings
