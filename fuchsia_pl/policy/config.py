"""Settings of the policy: the trained model, and the weights of it that are trained."""

import re
from dataclasses import dataclass, field
from typing import Literal

from fuchsia_pl.policy.sources import check_hub_id, read_template
from fuchsia_pl.types import ConfigError

PLAIN_NAME = r"[\w.]+"
# vLLM serves LoRA on linear layers only. It would ignore an adapter on these and sample from a policy other than the trained one.
UNSERVED_MODULES = ("lm_head", "embed_tokens", "embed_out", "wte", "wpe")


@dataclass
class LoRASettings:
    """A low-rank adapter W + (alpha / r) B A on linear layers (LoRA, arXiv:2106.09685).

    Attributes:
        enabled: If False, all weights are trained, in float32.
        r: Rank.
        alpha: Numerator of the scale alpha / r.
        dropout: Dropout in front of A, active in the training forward only.
        target_modules: Names of the adapted layers, or one name; "all-linear" is every linear layer but the output head. A
            string that is not a plain name is a regular expression over the layers' full names.
        use_rslora: Scale alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732).
        init_from: Folder of a PEFT adapter to continue from. That adapter is then the reference, and its own target modules
            are used. None starts a fresh one.
    """

    enabled: bool = True
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    init_from: str | None = None

    def __post_init__(self) -> None:
        """Rejects settings that PEFT cannot train or vLLM cannot serve."""
        if self.r < 1:
            raise ConfigError(
                f"model.policy.lora.r must be 1 or more, got {self.r}: to train all weights set enabled: false"
            )
        if self.alpha <= 0:
            raise ConfigError(f"model.policy.lora.alpha must be above 0, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.policy.lora.dropout must be at least 0 and below 1, got {self.dropout}")
        if isinstance(self.target_modules, str) and re.fullmatch(PLAIN_NAME, self.target_modules):
            self.target_modules = [self.target_modules]  # PEFT treats a string as a pattern over full names
        if isinstance(self.target_modules, str):
            try:
                unserved = [m for m in UNSERVED_MODULES if re.fullmatch(self.target_modules, m)]
            except re.error as error:
                raise ConfigError(
                    f"model.policy.lora.target_modules={self.target_modules!r} is neither a layer's name nor a regular "
                    f"expression ({error}): give a list of names"
                ) from error
        elif not self.target_modules:
            raise ConfigError(
                "model.policy.lora.target_modules is empty: name linear layers, use all-linear, or train all weights with "
                "enabled: false"
            )
        else:
            unserved = [name for name in self.target_modules if name.rsplit(".", 1)[-1] in UNSERVED_MODULES]
        if unserved:
            raise ConfigError(
                f"model.policy.lora.target_modules has {unserved}, which vLLM cannot serve: it would sample without them. "
                'Name linear layers inside the blocks, or use "all-linear"'
            )


@dataclass
class CheckpointingSettings:
    """Activation checkpointing: the activations inside a block are recomputed in backward instead of being kept.

    Attributes:
        enabled: Whether blocks are checkpointed.
        every_n_layers: 1 checkpoints every block, 2 every other.
        cpu_offloading: Whether the kept inputs of checkpointed blocks are moved to host memory until backward.
    """

    enabled: bool = False
    every_n_layers: int = 1
    cpu_offloading: bool = False

    def __post_init__(self) -> None:
        """Rejects settings that would have no effect."""
        if self.every_n_layers < 1:
            raise ConfigError(f"model.policy.checkpointing.every_n_layers must be 1 or more, got {self.every_n_layers}")
        if self.cpu_offloading and self.every_n_layers > 1:
            raise ConfigError(
                "model.policy.checkpointing.cpu_offloading is true and every_n_layers is "
                f"{self.every_n_layers}: the weights of blocks that are not checkpointed would leave the device too. Change one"
            )
        idle = "cpu_offloading" if self.cpu_offloading else "every_n_layers" if self.every_n_layers > 1 else None
        if idle and not self.enabled:
            raise ConfigError(
                f"model.policy.checkpointing.{idle} does nothing without checkpointing: set enabled: true, or leave it out"
            )


@dataclass
class PolicyConfig:
    """The model that is trained.

    Attributes:
        name: A hub id, a local folder, a local `.gguf` file, or `package:file.gguf` for a file inside an installed package.
        dtype: Type of the frozen base weights and of the engine's weights. Trained weights are always float32.
        chat_template: Replaces the tokenizer's chat template: a file, the text of a template, or "none" for a base model. With
            "none" a prompt is the text of the messages joined by blank lines, and a turn ends at the tokenizer's end id or at
            the environment's `stop`. `fuchsia export` writes it into the exported tokenizer, and `fuchsia serve RUN` serves it.
        hub_id: Id of the model on the hub. An exported adapter and its model card name it as their base. None is the id of a
            packaged model, a `name` that is a hub id, or the name of the local folder.
        lora: The adapter.
        shared_prefix: Whether a prefix that rows share is computed once. "auto": if a check at the start finds the same outputs
            with and without sharing. "always": a model that fails the check is refused. "never": plain rows.
        checkpointing: Activation checkpointing.
        max_tokens_per_micro_batch: Packs the rows of each step into as few micro-batches as they fill, with at most this many
            tokens in each. A shared prefix counts once, and the padding of plain rows counts too.
            `trainer.accumulate_grad_batches` becomes the number that the longest rows that can be sampled need.
        quantization: "nf4" keeps the frozen base weights in 4 bits (QLoRA, arXiv:2305.14314; needs a GPU, bitsandbytes and
            an adapter). The engine samples from the unquantized weights in `dtype`. Untested on a GPU.
        logprob_chunk_tokens: Tokens whose logits exist at the same time, in up to four copies. None: as many as fill 32 MB in
            float32 on a CPU, where larger chunks are not faster, and 256 MB on other devices.
    """

    name: str
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    lora: LoRASettings = field(default_factory=LoRASettings)
    shared_prefix: Literal["auto", "always", "never"] = "auto"
    checkpointing: CheckpointingSettings = field(default_factory=CheckpointingSettings)
    max_tokens_per_micro_batch: int | None = None
    quantization: Literal["nf4"] | None = None
    logprob_chunk_tokens: int | None = None
    chat_template: str | None = None
    hub_id: str | None = None

    def __post_init__(self) -> None:
        """Rejects sizes below 1, a missing template, a malformed hub id, and trained weights in 4 bits."""
        read_template(self.chat_template)
        if self.hub_id is not None:
            check_hub_id("model.policy.hub_id", self.hub_id)
        if self.quantization is not None and not self.lora.enabled:
            raise ConfigError(
                f'model.policy.quantization="{self.quantization}" needs an adapter, since weights of 4 bits cannot learn: '
                "set lora.enabled: true, or leave it out"
            )
        sizes = {
            "logprob_chunk_tokens": self.logprob_chunk_tokens,
            "max_tokens_per_micro_batch": self.max_tokens_per_micro_batch,
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ConfigError(f"model.policy.{name} must be 1 or more, got {value}")
