"""The policy: a causal language model of transformers with a PEFT adapter, or all of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import peft
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fuchsia_pl.batch import Batch, PolicyOutput
from fuchsia_pl.policy.adapter import add_adapter
from fuchsia_pl.policy.checkpointing import checkpoint_blocks, offloaded
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.critic import Critic
from fuchsia_pl.policy.loading import load_base
from fuchsia_pl.policy.logprobs import OutputHead, chunked_scores, fastest_chunk_tokens
from fuchsia_pl.policy.sharding import shard, whole
from fuchsia_pl.policy.shared_prefix import enable_shared_prefix, lay_out, shares_prefix
from fuchsia_pl.types import ConfigError

# Largest difference in logits that rounding explains in the head check, relative to the largest logit, in units of the
# type's own resolution: both sides compute the same product, so only a scale or cap done in another type can differ.
HEAD_TOLERANCE_ULPS = 4


class Policy(nn.Module):
    """A model that gives logprobs of labels, with and without what it has learned.

    With LoRA the reference is the same model with its adapter off, or with the adapter that `init_from` names. Without LoRA it
    is a frozen copy, made only if asked for.

    Args:
        config: Which model and which of its weights.
        folder: Where the model lies, see `resolve_model`.
        with_reference: Whether `reference_logprobs` will be asked for.
        with_critic: Whether a critic on the model's hidden states learns beside it.

    Raises:
        ConfigError: The model's output head does more than `OutputHead` does, or the model cannot share prefixes and has to.
    """

    def __init__(
        self, config: PolicyConfig, folder: str | Path, with_reference: bool, with_critic: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        dtype = getattr(torch, config.dtype) if config.lora.enabled else torch.float32
        base = load_base(folder, dtype, config.quantization)
        _enable_shared_prefix(base, config.shared_prefix)
        self.model: nn.Module = base
        self._frozen: list[PreTrainedModel] = []  # in a list, so that it is no submodule and enters no checkpoint
        self._initial_adapter: list[Tensor] = []
        if config.lora.enabled:
            self.model = add_adapter(base, config)
            if config.lora.init_from is not None:
                self._initial_adapter = self._adapter_copy()
        elif with_reference:
            self._frozen = [load_base(folder, getattr(torch, config.dtype)).requires_grad_(False)]
            _enable_shared_prefix(self._frozen[0], config.shared_prefix)
        if config.checkpointing.enabled:
            checkpoint_blocks(base, config.checkpointing.every_n_layers)
        _check_head(self.causal_lm)
        self.is_sharded = False
        self.critic = Critic(base.config.get_text_config().hidden_size) if with_critic else None

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, with the adapter's layers inside it."""
        return self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model

    @property
    def shares_prefix(self) -> bool:
        """Whether rows that start alike are computed as one."""
        return shares_prefix(self.causal_lm)

    @property
    def has_reference(self) -> bool:
        """Whether `reference_logprobs` can be asked for."""
        return isinstance(self.model, peft.PeftModel) or bool(self._frozen)

    @property
    def has_dropout(self) -> bool:
        """Whether the training forward drops out activations, so that its logprobs are not those an engine computes."""
        # Attention and residuals may have dropouts that are no modules. Those of other heads are set even where there are none.
        settings = self.causal_lm.config.get_text_config().to_dict()
        own = {name: value for name, value in settings.items() if not name.startswith(("classifier", "summary"))}
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules()) or any(
            "drop" in name and isinstance(value, float) and value > 0 for name, value in own.items()
        )

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The weights that learn, in a fixed order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def reference_weights(self) -> list[Tensor]:
        """What the reference keeps beside the weights of the policy: a frozen copy, or the adapter as it was loaded."""
        return [*self._initial_adapter, *(weight for model in self._frozen for weight in model.parameters())]

    def to_device(self, device: torch.device) -> None:
        """Moves weights, gradients, buffers and the reference. Parameters stay the objects that an optimizer knows."""
        self.to(device)
        for reference in self._frozen:
            reference.to(device)
        self._initial_adapter = [initial.to(device) for initial in self._initial_adapter]

    def output(self, batch: Batch) -> PolicyOutput:
        """Logprobs of the labels and entropies at each row's own temperature, and the critic's values if there is one.

        Rows are padded on the right and attention is causal, so no padding is ever seen and no mask is needed.

        Args:
            batch: The micro-batch.

        Returns:
            float32 [B, T] each, 0 where `loss_mask` is False. No logits are computed there.
        """
        with offloaded() if self.config.checkpointing.cpu_offloading else nullcontext():
            return PolicyOutput(*self(batch))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `output` returns, as a tuple: sharding hooks onto calls of modules, and finds tensors in tuples only."""
        return self._scores(self.causal_lm, batch, self.critic)

    @torch.no_grad()
    def evaluated_output(self, batch: Batch) -> PolicyOutput:
        """The same without gradient and without dropout, as an engine computes them. Draws nothing from torch's generator."""
        with _evaluating(self.model):
            return self.output(batch)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The logprobs that the model had before any training, without gradient.

        Raises:
            RuntimeError: All weights are trained and no frozen copy was asked for.
        """
        if isinstance(self.model, peft.PeftModel):
            untrained = self._swapped_adapter() if self._initial_adapter else self.model.disable_adapter()
            with untrained:
                return self.evaluated_output(batch).logprobs
        if not self.has_reference:
            raise RuntimeError("there is no reference: the policy was built with with_reference=False")
        frozen = self._frozen[0].to(batch.input_ids.device)
        return self._scores(frozen, batch, None)[0]

    def _scores(
        self, model: PreTrainedModel, batch: Batch, critic: Critic | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        mask = batch.loss_mask
        temperatures = batch.temperatures.unsqueeze(1).expand(mask.shape)[mask]
        self._leave_types_to_autocast(torch.is_autocast_enabled(mask.device.type))
        kept = _kept_hidden(model, batch)
        head = output_head(model)
        chunk_tokens = self.config.logprob_chunk_tokens or fastest_chunk_tokens(head)
        logprobs, entropies = chunked_scores(head, kept, batch.labels[mask], temperatures, chunk_tokens)

        def in_place(selected: Tensor) -> Tensor:
            return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, selected)

        values = in_place(critic(kept)) if critic is not None else None
        return in_place(logprobs), in_place(entropies), values

    def _leave_types_to_autocast(self, autocasts: bool) -> None:
        """Autocast chooses the type of every product; without it PEFT casts what enters an adapter to the adapter's type.

        It stays so after the forward: blocks that are checkpointed run again in backward, and have to do the same.
        """
        for module in self.model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.cast_input_dtype_enabled = not autocasts

    @contextmanager
    def _swapped_adapter(self) -> Iterator[None]:
        """The adapter as it was loaded, in the place of the one that learned from there.

        Values are copied: sharding keeps views of what a weight had when it was sharded.
        """
        weights = [p for p in self.model.parameters() if p.requires_grad]
        learned = self._adapter_copy()
        try:
            for weight, initial in zip(weights, self._initial_adapter, strict=True):
                weight.copy_(initial)
            yield
        finally:
            for weight, tensor in zip(weights, learned, strict=True):
                weight.copy_(tensor)

    def end_accumulation(self, is_last: bool) -> None:
        """Where weights are sharded, adds gradients up over ranks after a step's last micro-batch only, as DDP does.

        Gradients of all weights would not fit whole: without an adapter they are added up and sharded after each.
        """
        if isinstance(self, FSDPModule) and self.config.lora.enabled:
            self.set_requires_gradient_sync(is_last)

    def _adapter_copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters() if p.requires_grad]

    def shard(self, mesh: DeviceMesh) -> None:
        """Spreads the weights over the ranks of a mesh. A frozen copy that is the reference stays whole on each."""
        shard(self, self.causal_lm, mesh)
        self.is_sharded = True
        if self._initial_adapter:
            self._initial_adapter = self._adapter_copy()

    def save_trained(self, folder: Path, writes: bool = True) -> None:
        """Writes what was trained: a PEFT adapter folder, or with LoRA off a whole model folder in `config.dtype`.

        Args:
            folder: Where to.
            writes: Whether this rank writes. Where weights are sharded, all ranks have to call this at the same time.
        """
        if isinstance(self.model, peft.PeftModel):
            state = {name: whole(tensor) for name, tensor in self.model.state_dict().items() if "lora_" in name}
            # Otherwise PEFT asks the hub at every sync whether the vocabulary was changed; embeddings are never adapted here.
            if writes:
                self.model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
            return
        dtype = getattr(torch, self.config.dtype)
        state = {}
        once = {name for kind in (self.model.named_parameters(), self.model.named_buffers()) for name, _ in kind}
        for name, tensor in self.model.state_dict().items():
            if name not in once:  # a head that is tied to the embeddings
                continue
            gathered = whole(tensor)
            if writes:  # one at a time: all of them may be more than a device holds
                state[name] = gathered.to("cpu", dtype)
        if writes:
            self.causal_lm.save_pretrained(str(folder), state_dict=state)


def output_head(model: PreTrainedModel) -> OutputHead:
    """The head of a transformers model, with the scale or cap that its config states."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config().to_dict()
    scale = config.get("logit_scale") or 1.0 / (config.get("logits_scaling") or 1.0)
    return OutputHead(head.weight, head.bias, scale=scale, softcap=config.get("final_logit_softcapping"))


def _enable_shared_prefix(model: PreTrainedModel, wish: Literal["auto", "always", "never"]) -> None:
    if wish != "never" and not enable_shared_prefix(model) and wish == "always":
        raise ConfigError(
            f'model.policy.shared_prefix is "always", and {type(model).__name__} says something else if rows share their prefix: '
            'use "auto"'
        )


def _kept_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The hidden states that predict the labels with `loss_mask` True, [N, H]."""
    if not shares_prefix(model):
        return model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state[batch.loss_mask]
    layout = lay_out(batch.input_ids, batch.lengths, batch.groups)
    hidden = model.base_model(
        input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, shared_prefix=layout
    ).last_hidden_state[0]
    return hidden[layout.places[batch.loss_mask]]


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Compares `output_head` with the model's own logits on a few tokens: a head we do not know must not train silently."""
    ids = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    with _evaluating(model):
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        gap = (output_head(model).logits(hidden) - expected).abs().max().item()
    allowed = HEAD_TOLERANCE_ULPS * torch.finfo(model.dtype).eps * max(expected.abs().max().item(), 1.0)
    if not gap <= allowed:
        raise ConfigError(
            f"the output head of {type(model).__name__} is not the linear map, scale and soft cap that logprobs are computed "
            f"with: logits differ by {gap:.3g} ({allowed:.3g} allowed). This model is not supported yet"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
