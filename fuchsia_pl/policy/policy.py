"""The policy: a causal language model of transformers with a PEFT adapter, or all of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import peft
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fuchsia_pl.batch import Batch, PolicyOutput
from fuchsia_pl.policy.adapter import add_adapter
from fuchsia_pl.policy.checkpointing import checkpoint_blocks, offloaded
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.critic import Critic
from fuchsia_pl.policy.host_copies import HostCopies
from fuchsia_pl.policy.loading import load_base
from fuchsia_pl.policy.logprobs import OutputHead, chunked_logprobs, fastest_chunk_tokens
from fuchsia_pl.policy.prefix_layout import lay_out
from fuchsia_pl.policy.sharding import fill_from_first_rank, of_first_rank, shard, whole
from fuchsia_pl.policy.shared_prefix import enable_shared_prefix, set_shared_prefix, shares_prefix
from fuchsia_pl.policy.teacher_adapter import TeacherAdapter
from fuchsia_pl.types import ConfigError

# Largest difference in logits that rounding explains in the head check, relative to the largest logit, in units of the type's
# resolution. Both sides compute the same product, so they can differ only by a scale or cap applied in another type.
HEAD_TOLERANCE_ULPS = 4


class Policy(nn.Module):
    """A model that computes logprobs of labels, with its trained weights and with its reference weights.

    With LoRA the reference is the same model with its adapter disabled, or with the adapter of `init_from`. Without LoRA it is
    a frozen copy, which is loaded only if `with_reference` is True.

    Args:
        config: The policy's settings.
        folder: Folder of the model, see `resolve_model`.
        with_reference: Whether `reference_logprobs` will be called.
        with_critic: Whether a critic on the model's hidden states is trained as well.
        is_empty: Whether `shard` gets the weights from the first rank. Until then they are on the meta device, without values,
            and what the outputs decide is left to the first rank.

    Raises:
        ConfigError: `OutputHead` does not represent the model's output head, or the model cannot share prefixes although
            `shared_prefix` is "always".
    """

    def __init__(
        self,
        config: PolicyConfig,
        folder: str | Path,
        with_reference: bool,
        with_critic: bool = False,
        is_empty: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        dtype = getattr(torch, config.dtype) if config.lora.enabled else torch.float32
        device: Literal["meta"] | None = "meta" if is_empty else None
        base = load_base(folder, dtype, config.quantization, device)
        if not is_empty:
            _enable_shared_prefix(base, config.shared_prefix)
        self.model: nn.Module = base
        self._frozen: list[PreTrainedModel] = []  # in a list, so that it is not a submodule and is not saved
        self._initial_adapter: list[Tensor] = []
        self.host_copies = HostCopies()
        if config.lora.enabled:
            self.model = add_adapter(base, config)
            if config.lora.init_from is not None:
                self._initial_adapter = self._adapter_copy()
        elif with_reference:
            self._frozen = [load_base(folder, getattr(torch, config.dtype), device=device).requires_grad_(False)]
            if not is_empty:
                _enable_shared_prefix(self._frozen[0], config.shared_prefix)
        if config.checkpointing.enabled:
            checkpoint_blocks(base, config.checkpointing.every_n_layers)
        if not is_empty:
            _check_head(self.causal_lm)
        self.is_sharded = False
        with torch.device("meta") if is_empty else nullcontext():
            self.critic = Critic(base.config.get_text_config().hidden_size) if with_critic else None

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, with the adapter's layers inside it."""
        return self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model

    @property
    def shares_prefix(self) -> bool:
        """Whether a prefix that rows share is computed once."""
        return shares_prefix(self.causal_lm)

    @property
    def has_reference(self) -> bool:
        """Whether `reference_logprobs` can be called."""
        return isinstance(self.model, peft.PeftModel) or bool(self._frozen)

    @property
    def has_dropout(self) -> bool:
        """Whether the training forward has dropout, so that its logprobs differ from those of an engine."""
        # Dropout of attention and residuals may not be a module. Settings for other heads exist even in models without them.
        settings = self.causal_lm.config.get_text_config().to_dict()
        own = {name: value for name, value in settings.items() if not name.startswith(("classifier", "summary"))}
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules()) or any(
            "drop" in name and isinstance(value, float) and value > 0 for name, value in own.items()
        )

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The trained weights, in a fixed order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def reference_weights(self) -> list[Tensor]:
        """Weights that only the reference uses: a frozen copy, or the adapter as it was loaded."""
        return [*self._initial_adapter, *(weight for model in self._frozen for weight in model.parameters())]

    def to_device(self, device: torch.device, with_trained: bool = True) -> None:
        """Moves weights and gradients between host and device. Parameters stay the same objects, so an optimizer stays valid.

        Frozen weights, also those of the reference, are copied to the host once, and uploaded at every return. Buffers, which
        are small, stay where they are.

        Args:
            device: The host, or the device that computes.
            with_trained: Whether trained weights and their gradients are moved.
        """
        for number, model in enumerate([self, *self._frozen]):
            for name, weight in model.named_parameters():
                if with_trained or not weight.requires_grad:
                    self._move(f"{number}.{name}", weight, device)
        for number, initial in enumerate(self._initial_adapter):
            self._initial_adapter[number] = self.host_copies.moved(f"initial.{number}", initial, device, changes=False)

    def _move(self, name: str, weight: nn.Parameter, device: torch.device) -> None:
        gradient, changes = weight.grad, weight.requires_grad
        weight.data = self.host_copies.moved(name, weight.data, device, changes)
        if gradient is not None:
            weight.grad = self.host_copies.moved(f"{name}.grad", gradient, device, changes)

    def output(self, batch: Batch) -> PolicyOutput:
        """Computes logprobs of the labels and entropies at the temperature of each row, and values if there is a critic.

        Rows are padded on the right and attention is causal, so no token attends to padding and no mask is needed.

        Args:
            batch: The micro-batch.

        Returns:
            float32 [B, T] each, 0 where `loss_mask` is False; logits are not computed there.
        """
        with offloaded() if self.config.checkpointing.cpu_offloading else nullcontext():
            return PolicyOutput(*self(batch))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """The fields of `output` as a tuple: FSDP hooks calls of modules and finds tensors only in tuples."""
        return self._compute(self.causal_lm, batch, self.critic)

    @torch.no_grad()
    def evaluated_output(self, batch: Batch) -> PolicyOutput:
        """Like `output`, without gradient and without dropout. Uses no random numbers."""
        with _evaluating(self.model):
            return self.output(batch)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Logprobs of the reference, float32 [B, T], without gradient.

        Raises:
            RuntimeError: All weights are trained and the policy was built with `with_reference=False`.
        """
        if isinstance(self.model, peft.PeftModel):
            untrained = self._swapped_adapter() if self._initial_adapter else self.model.disable_adapter()
            with untrained:
                return self.evaluated_output(batch).logprobs
        if not self.has_reference:
            raise RuntimeError("there is no reference: the policy was built with with_reference=False")
        frozen = self._frozen[0].to(batch.input_ids.device)
        return self._compute(frozen, batch, None)[0]

    @torch.no_grad()
    def teacher_logprobs(self, batch: Batch, teacher: TeacherAdapter | None) -> Tensor:
        """Logprobs of the base model with the adapter of a teacher, float32 [B, T], without gradient and without dropout.

        Args:
            batch: The micro-batch.
            teacher: The adapter; None for the reference. Both stay the same during a run.
        """
        if teacher is None:
            return self.reference_logprobs(batch)
        assert isinstance(self.model, peft.PeftModel), "a teacher's adapter needs a base that is not trained"
        with self.model.disable_adapter(), teacher.applied(self.causal_lm, batch.input_ids.device):
            return self.evaluated_output(batch).logprobs

    def _compute(
        self, model: PreTrainedModel, batch: Batch, critic: Critic | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        mask = batch.loss_mask
        temperatures = batch.temperatures.unsqueeze(1).expand(mask.shape)[mask]
        self._leave_types_to_autocast(torch.is_autocast_enabled(mask.device.type))
        kept = _kept_hidden(model, batch)
        head = output_head(model)
        chunk_tokens = self.config.logprob_chunk_tokens or fastest_chunk_tokens(head)
        logprobs, entropies = chunked_logprobs(head, kept, batch.labels[mask], temperatures, chunk_tokens)

        def in_place(selected: Tensor) -> Tensor:
            return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, selected)

        values = in_place(critic(kept)) if critic is not None else None
        return in_place(logprobs), in_place(entropies), values

    def _leave_types_to_autocast(self, autocasts: bool) -> None:
        """Disables PEFT's casts of adapter inputs while autocast is active, since autocast chooses the type of every product.

        The setting stays after the forward: checkpointed blocks run again in backward and must compute the same.
        """
        for module in self.model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.cast_input_dtype_enabled = not autocasts

    @contextmanager
    def _swapped_adapter(self) -> Iterator[None]:
        """Within this context, the adapter has the values it was loaded with.

        Values are copied, not replaced: FSDP keeps views of the storage that a weight had when it was sharded.
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
        """With sharded weights, reduces gradients over ranks after the last micro-batch of a step only, as DDP does.

        Without an adapter, unsharded gradients would need too much memory: they are reduced after each micro-batch.
        """
        if isinstance(self, FSDPModule) and self.config.lora.enabled:
            self.set_requires_gradient_sync(is_last)

    def _adapter_copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters() if p.requires_grad]

    def shard(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Shards the weights over all ranks, with the values of the first rank. A frozen reference copy stays whole on each rank.

        Args:
            mesh: One-dimensional, over all ranks.
            device: This rank's device.
        """
        weights = self.state_dict() if dist.get_rank() == 0 else {}  # before they are sharded
        shard(self, self.causal_lm, mesh)
        fill_from_first_rank(self, weights, device)
        for frozen in self._frozen:
            fill_from_first_rank(frozen, frozen.state_dict(), device)
            frozen.tie_weights()
        self._follow_first_rank()
        self.is_sharded = True
        if self._initial_adapter:
            self._initial_adapter = self._adapter_copy()

    def _follow_first_rank(self) -> None:
        """Takes over what the first rank decided by its outputs, and its random state: it alone has drawn initial weights."""
        shares, random_state = of_first_rank((self.shares_prefix, torch.get_rng_state()))
        torch.set_rng_state(random_state)
        if shares and not self.shares_prefix:
            for model in (self.causal_lm, *self._frozen):
                set_shared_prefix(model)

    def save_trained(self, folder: Path, writes: bool = True) -> None:
        """Writes the trained weights: a PEFT adapter folder, or without LoRA a whole model folder in `config.dtype`.

        Args:
            folder: Target folder.
            writes: Whether this rank writes. With sharded weights, all ranks must call this together.
        """
        if isinstance(self.model, peft.PeftModel):
            state = {name: whole(tensor) for name, tensor in self.model.state_dict().items() if "lora_" in name}
            # Otherwise PEFT queries the hub at every sync for a changed vocabulary; embeddings are never adapted here.
            if writes:
                folder.mkdir(parents=True, exist_ok=True)
                # PEFT completes a model card that exists; for a new one it would compile a template at every sync.
                (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
                self.model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
            return
        dtype = getattr(torch, self.config.dtype)
        state = {}
        once = {name for kind in (self.model.named_parameters(), self.model.named_buffers()) for name, _ in kind}
        for name, tensor in self.model.state_dict().items():
            if name not in once:  # a head tied to the embeddings
                continue
            gathered = whole(tensor)
            if writes:  # one at a time: together they may exceed the device's memory
                state[name] = gathered.to("cpu", dtype)
        if writes:
            self.causal_lm.save_pretrained(str(folder), state_dict=state)


def output_head(model: PreTrainedModel) -> OutputHead:
    """The output head of a transformers model, with the scale or cap of its config."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config().to_dict()
    scale = config.get("logit_scale") or 1.0 / (config.get("logits_scaling") or 1.0)
    return OutputHead(head.weight, head.bias, scale=scale, softcap=config.get("final_logit_softcapping"))


def _enable_shared_prefix(model: PreTrainedModel, wish: Literal["auto", "always", "never"]) -> None:
    if wish != "never" and not enable_shared_prefix(model) and wish == "always":
        raise ConfigError(
            f'model.policy.shared_prefix is "always", but the outputs of {type(model).__name__} change if rows share their '
            'prefix: use "auto"'
        )


def _kept_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states that predict the labels where `loss_mask` is True, [N, H]."""
    if not shares_prefix(model):
        return model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state[batch.loss_mask]
    layout = lay_out(batch.input_ids, batch.lengths, batch.groups)
    hidden = model.base_model(
        input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, shared_prefix=layout
    ).last_hidden_state[0]
    return hidden[layout.places[batch.loss_mask]]


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Compares `output_head` with the model's logits on a few tokens, so that no unknown kind of head is trained."""
    ids = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    with _evaluating(model):
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        gap = (output_head(model).logits(hidden) - expected).abs().max().item()
    allowed = HEAD_TOLERANCE_ULPS * torch.finfo(model.dtype).eps * max(expected.abs().max().item(), 1.0)
    if not gap <= allowed:
        raise ConfigError(
            f"the output head of {type(model).__name__} is not a linear map with scale and soft cap, as logprobs assume: "
            f"logits differ by {gap:.3g} ({allowed:.3g} allowed). This model is not supported yet"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds dropout by the address of a micro-batch, so that a resumed run repeats the dropout of an uninterrupted one.

    Args:
        seed: The seed. Other random numbers of the process do not change.
        device: The device whose generator dropout uses, beside that of the CPU.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
