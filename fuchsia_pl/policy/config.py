"""What model learns, and which of its weights."""

import re
from dataclasses import dataclass, field
from typing import Literal

from fuchsia_pl.types import ConfigError

# vLLM serves LoRA on linear layers only; on these it would drop the adapter and sample from another policy than the trained.
UNSERVED_MODULES = ("lm_head", "embed_tokens", "embed_out", "wte", "wpe")


@dataclass
class LoRASettings:
    """A low-rank adapter W + (alpha / r) B A on linear layers (LoRA, arXiv:2106.09685).

    Attributes:
        enabled: Off trains all weights, in float32.
        r: Rank.
        alpha: Numerator of the scale alpha / r.
        dropout: Dropout in front of A, active in the training forward only.
        target_modules: Names of the adapted layers; "all-linear" is every linear layer but the output head.
        use_rslora: Scale alpha / sqrt(r) in place of alpha / r (arXiv:2312.03732).
        init_from: Folder of a PEFT adapter to go on from; the reference is then that adapter, and `target_modules` are its
            own. None starts a fresh one.
        use_dora: Only here to say why not: vLLM does not serve DoRA.
        modules_to_save: Only here to say why not: vLLM does not serve adapters with whole modules in them.
    """

    enabled: bool = True
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    init_from: str | None = None
    use_dora: bool = False
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuses what PEFT could not train or vLLM could not serve."""
        if self.r < 1:
            raise ConfigError(
                f"model.policy.lora.r must be 1 or more, got {self.r}: to train all weights set enabled: false"
            )
        if self.alpha <= 0:
            raise ConfigError(f"model.policy.lora.alpha must be above 0, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.policy.lora.dropout must be at least 0 and below 1, got {self.dropout}")
        if isinstance(self.target_modules, str):  # a regular expression over full names, except "all-linear"
            unserved = [m for m in UNSERVED_MODULES if re.fullmatch(self.target_modules, m)]
        else:
            unserved = [name for name in self.target_modules if name.rsplit(".", 1)[-1] in UNSERVED_MODULES]
        if unserved:
            raise ConfigError(
                f"model.policy.lora.target_modules has {unserved}, which vLLM cannot serve: it would sample without them. "
                'Name linear layers inside the blocks, or use "all-linear"'
            )
        if self.use_dora:
            raise ConfigError(
                "model.policy.lora.use_dora is true, and vLLM cannot serve DoRA adapters: set it to false"
            )
        if self.modules_to_save:
            raise ConfigError(
                f"model.policy.lora.modules_to_save is {self.modules_to_save}, and vLLM cannot serve adapters that replace "
                "whole modules: leave it out, or train all weights with enabled: false"
            )


@dataclass
class PolicyConfig:
    """The model that learns.

    Attributes:
        name: A hub id, a local folder, a local `.gguf` file, or `package:file.gguf` for a file inside an installed package.
        dtype: Type of the frozen base weights and of the engine's. Trained weights are float32 whatever this says.
        lora: The adapter.
        logprob_chunk_tokens: Tokens whose logits exist at the same time. More is faster until memory ends it.
    """

    name: str
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    lora: LoRASettings = field(default_factory=LoRASettings)
    logprob_chunk_tokens: int = 512

    def __post_init__(self) -> None:
        """Refuses a chunk without tokens."""
        if self.logprob_chunk_tokens < 1:
            raise ConfigError(f"model.policy.logprob_chunk_tokens must be 1 or more, got {self.logprob_chunk_tokens}")
