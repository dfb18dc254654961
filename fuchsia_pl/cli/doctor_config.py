"""`fuchsia doctor --config`: whether model, tokenizer, template, adapter, environment and memory of a config fit together."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from lightning.pytorch.cli import ArgsType
from transformers import PreTrainedModel

from fuchsia_pl.cli.check_env import num_ranks
from fuchsia_pl.cli.config_only import ConfigOnlyCLI
from fuchsia_pl.cli.diagnosis import Finding
from fuchsia_pl.cli.doctor_machine import free_memory
from fuchsia_pl.cli.doctor_step import StepSize
from fuchsia_pl.cli.planned_config import planned_parts
from fuchsia_pl.cli.run_folder import DEFAULT_ROOT
from fuchsia_pl.cli.terminal import count, size
from fuchsia_pl.datamodule import CLOSE_TIMEOUT_S
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.engines.vllm_kv_cache import FREE_SHARE
from fuchsia_pl.loop import run_blocking
from fuchsia_pl.policy.adapter import check_adapter
from fuchsia_pl.policy.loading import check_quantization, trained_shapes
from fuchsia_pl.policy.model_folder import blank_model
from fuchsia_pl.policy.targets import check_targets
from fuchsia_pl.rollouts.calls import close
from fuchsia_pl.rollouts.chat import load_tokenizer
from fuchsia_pl.rollouts.part_collector import collector_for
from fuchsia_pl.rollouts.preparation import as_config_error, check_shares, held_out_prompts, training_prompts
from fuchsia_pl.types import ConfigError

QUESTION = "What is 3 plus 4?"
FLOAT_BYTES = 4
# Weights and the two moments of Adam.
SAVED_COPIES = 3
# Of the checkpoint, a run keeps the newest one while it writes the next.
NUM_CHECKPOINTS = 2
CHECK_ENV = "fuchsia check-env with the same options plays known and hostile texts and shows what they earn"


class DoctorCLI(ConfigOnlyCLI):
    """Parses a config and makes its parts; nothing is loaded before a check uses it."""

    def __init__(self, args: ArgsType) -> None:
        super().__init__(args)
        trainer = self._get(self.config, "trainer")
        self.root = Path(trainer.default_root_dir or DEFAULT_ROOT)
        self.precision = str(trainer.precision or "32-true")  # Lightning's default
        self.num_ranks = num_ranks(trainer.devices, trainer.num_nodes)
        self.uses_held_out = trainer.limit_val_batches != 0
        self.has_gpu = torch.cuda.is_available() and trainer.accelerator not in ("cpu", None)

    def use_config(self) -> None:
        """Nothing: the checks run one by one, each with a time limit."""


class ConfigChecks:
    """The checks of a config. A check that needs the model raises its ConfigError; the first of them is the finding.

    Args:
        cli: The parsed config.
    """

    def __init__(self, cli: DoctorCLI) -> None:
        self.cli, self.data = cli, cli.datamodule
        self.policy = cli.model.policy_config

    @property
    def needs_vllm(self) -> bool:
        """Whether vLLM runs in the process of the run."""
        return isinstance(self.data.engine, VLLMColocatedEngine)

    @property
    def dtypes(self) -> tuple[str, str]:
        """`model.policy.dtype` and `trainer.precision`."""
        return self.policy.dtype, self.cli.precision

    @property
    def is_absent(self) -> bool:
        """Whether the first run would download the model."""
        name = self.policy.name
        if (
            Path(name).expanduser().exists()
            or ":" in name
            or name.endswith(".gguf")
            or name.startswith((".", "/", "~"))
        ):
            return False
        try:
            return not isinstance(try_to_load_from_cache(name, "config.json"), str)
        except HFValidationError:
            return False  # `resolve_model` has the better message

    @cached_property
    def blank(self) -> PreTrainedModel:
        """The model without weights; its files are found, and converted if needed."""
        return blank_model(self.folder)

    @property
    def folder(self) -> str:
        """The model folder."""
        return self.cli.model.learner.served_model.folder

    @property
    def step_size(self) -> StepSize:
        """Size of a step for `--step`."""
        num_held_out = self.cli.num_ranks if self.cli.uses_held_out else 0
        return StepSize(self.data.loss.steps_per_phase, num_held_out, self.data.sampling.max_completion_tokens)

    def model(self) -> Sequence[Finding]:
        """Files and architecture of the model, and its longest context."""
        if self.is_absent:
            text = f"{self.policy.name} is not on this machine, so what depends on it is not checked"
            return [Finding("model", "note", text, f"hf download {self.policy.name} (else the first run downloads it)")]
        weights = count(self.blank.num_parameters())
        found = [Finding("model", "ok", f"{type(self.blank).__name__}, {weights} weights, {self.folder}")]
        context = getattr(self.blank.config.get_text_config(), "max_position_embeddings", None)
        longest = self.data.sampling.max_length
        if context is not None and longest > context:
            text = f"data.sampling.max_length={longest}, and the model was made for {context} positions"
            found.append(Finding("model", "problem", text, f"--data.sampling.max_length {context} or less"))
        return found

    def tokenizer(self) -> Sequence[Finding]:
        """Whether the ids of the tokenizer are rows of the model's embedding, and completions can end."""
        tokenizer, ends = load_tokenizer(self.folder), self.data.make_chat().stop_token_ids
        num_rows = self.blank.config.get_text_config().vocab_size
        if len(tokenizer) > num_rows:
            text = (
                f"it has {len(tokenizer)} tokens, and the model's embedding {num_rows} rows: ids above crash the engine"
            )
            return [Finding("tokenizer", "problem", text, "use the tokenizer of this model, or resize its embedding")]
        if not ends or max(ends) >= num_rows:
            text = f"the ids that end a turn are {list(ends)}, of {num_rows} rows: no completion can end by itself"
            return [
                Finding("tokenizer", "problem", text, "set eos_token of the tokenizer or of generation_config.json")
            ]
        own = self.blank.config.get_text_config().eos_token_id
        if own is not None and not set(ends) & set(own if isinstance(own, list) else [own]):
            text = f"turns end with {list(ends)}, and config.json has eos_token_id={own}"
            advice = (
                "check which one the chat template writes at the end of a turn; generation_config.json may list several"
            )
            return [Finding("tokenizer", "warning", text, advice)]
        return [Finding("tokenizer", "ok", f"{len(tokenizer)} tokens of {num_rows} rows, turns end with {list(ends)}")]

    def template(self) -> Sequence[Finding]:
        """Whether the chat template renders a conversation."""
        chat = self.data.make_chat()
        ids = chat.render([{"role": "user", "content": QUESTION}])
        if chat.template.is_plain:
            return [Finding("template", "ok", 'none: the model continues the text of the messages ("none")')]
        return [Finding("template", "ok", f"a question of one line is {len(ids)} tokens")]

    def adapter(self) -> Sequence[Finding]:
        """Whether the adapter's layers, its rank and its files suit the model."""
        check_quantization(self.policy.quantization)
        check_adapter(self.policy.lora)
        check_targets(self.blank, self.policy.lora)
        trained = f"{count(self.num_trained)} trained weights"
        if not self.policy.lora.enabled:
            return [Finding("adapter", "ok", f"none, all weights are trained: {trained}")]
        start = f"from {self.policy.lora.init_from}" if self.policy.lora.init_from else "new"
        return [Finding("adapter", "ok", f"{start}, r={self.policy.lora.r}, {trained}")]

    @cached_property
    def num_trained(self) -> int:
        """Number of trained weights."""
        with_critic = self.cli.model.loss_config.parts.advantage == "gae"
        shapes = trained_shapes(self.policy, self.folder, with_critic=with_critic)
        return sum(torch.Size(shape).numel() for shape in shapes.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of the checkpoints and the adapter of a run."""
        return FLOAT_BYTES * self.num_trained * (SAVED_COPIES * NUM_CHECKPOINTS + 1)

    def memory(self) -> Sequence[Finding]:
        """The memory plan against the free memory of the device."""
        free, _ = torch.cuda.mem_get_info() if self.cli.has_gpu else free_memory()
        parts = planned_parts(self.cli, self.blank.config, self.cli.num_ranks, self.cli.has_gpu)
        planner = parts.planner(int((1 - FREE_SHARE) * free), self.policy.shared_prefix != "never")
        try:
            plan = planner.plan(parts.run())
        except ConfigError as error:
            return [Finding("memory plan", "warning", str(error), "the rehearsal at the start of a run measures it")]
        text = f"{plan.text}; {size(free)} are free"
        if plan.fits:
            return [Finding("memory plan", "ok", text)]
        options = planner.options(parts.run())
        advice = f"{options[0]}; or end other programs" if options else "a smaller model, or end other programs"
        return [Finding("memory plan", "problem", text, advice)]

    def environment(self) -> Sequence[Finding]:
        """The checks of the start of a run: the environment's items, prompts, gold answers and tools."""
        name = type(self.data.environment).__name__
        check_shares(self.data.batch_size, self.cli.num_ranks, self.data.loss.mini_batches)
        num_training, num_held_out = run_blocking(self._num_prompts())
        held_out = f", {num_held_out} held-out items" if self.cli.uses_held_out else ", no held-out items are used"
        found = [Finding("environment", "ok", f"{name}: {num_training} training items{held_out}")]
        return [*found, Finding("rewards", "note", "not checked here", CHECK_ENV)]

    async def _num_prompts(self) -> tuple[int, int]:
        environment = self.data.environment
        collector = collector_for(self.data.engine, environment, self.data.make_chat(), self.data.sampling)
        try:
            with as_config_error(f"{type(environment).__name__}.prepare"):
                await collector.prepare()
            training = training_prompts(collector, self.data.seed, self.data.batch_size)
            held_out = held_out_prompts(collector, self.cli.num_ranks) if self.cli.uses_held_out else []
            return len(training), len(held_out)
        finally:
            with as_config_error(f"{type(environment).__name__}.close"):
                await close(environment, CLOSE_TIMEOUT_S)
