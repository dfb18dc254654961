"""Settings with their names in TRL, in verl and in the first Fuchsia.

Error messages for unknown keys use this table and that of `not_offered`, and configs/README.md contains both.
"""

from dataclasses import dataclass

from fuchsia_pl.cli.not_offered import NOT_OFFERED, NotOffered


@dataclass(frozen=True)
class Setting:
    """A setting of this project and its names in other programs.

    Attributes:
        key: The dotted key here.
        example: An accepted value, as on the command line.
        trl: Names in TRL's GRPOConfig, and the most used of its ModelConfig and ScriptArguments.
        verl: Names in verl's trainer configs; as much of the dotted key as identifies them.
        fuchsia: Names in the first Fuchsia's YAML, likewise.
        note: The difference, if the meaning is not the same.

    >>> Setting("data.batch_size", "8", trl=("generation_batch_size",)).names
    ('generation_batch_size',)
    """

    key: str
    example: str
    trl: tuple[str, ...] = ()
    verl: tuple[str, ...] = ()
    fuchsia: tuple[str, ...] = ()
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All foreign names."""
        return (*self.trl, *self.verl, *self.fuchsia)


ENGINE = "data.engine.init_args"
VLLM = "fuchsia_pl.engines.vllm_colocated.VLLMColocatedEngine"
ENGINE_CLASS = ("use_vllm", "vllm_mode", "vllm_server_base_url")
OFFLOADING = ("free_cache_engine", "param_offload", "optimizer_offload")
OPTIMIZER = "model.optimizer.init_args"
CORRECTION = "model.loss.sampler_correction"

STRATEGY = (
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "accelerator_config",
    "parallelism_config",
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "ddp_backend",
    "ddp_timeout",
)
MODEL = (
    Setting("model.policy.name", "org/name", ("model_name_or_path",), ("model.path",), ("model.name",)),
    Setting("model.policy.dtype", "float32", ("dtype", "torch_dtype"), ("rollout.dtype",), ("model.dtype",)),
    Setting("model.policy.lora.enabled", "true", ("use_peft",), (), ("lora.enabled",)),
    Setting("model.policy.lora.r", "8", ("lora_r",), ("lora_rank",), ("lora.r",)),
    Setting("model.policy.lora.alpha", "16", ("lora_alpha",), ("model.lora_alpha",), ("lora.alpha",)),
    Setting("model.policy.lora.dropout", "0.1", ("lora_dropout",)),
    Setting(
        "model.policy.lora.target_modules",
        "q_proj",
        ("lora_target_modules",),
        ("model.target_modules",),
        ("lora.target_modules",),
    ),
    Setting("model.policy.lora.use_rslora", "true", ("use_rslora",)),
    Setting("model.policy.lora.init_from", "folder", (), ("lora_adapter_path",), ("lora_path",)),
    Setting("model.policy.quantization", "nf4", ("load_in_4bit",)),
    Setting(
        "model.policy.checkpointing.enabled",
        "true",
        ("gradient_checkpointing",),
        ("enable_gradient_checkpointing",),
        ("gradient_checkpointing.enabled",),
    ),
    Setting(
        "model.policy.checkpointing.cpu_offloading",
        "true",
        (),
        ("enable_activation_offload",),
        ("gradient_checkpointing.cpu_offloading", "gradient_checkpointing.mode"),
    ),
    Setting("model.policy.max_tokens_per_micro_batch", "8192", (), ("ppo_max_token_len_per_gpu", "use_dynamic_bsz")),
    Setting("model.policy.chat_template", "none", (), ("custom_chat_template",)),
)
TRAINING = (
    Setting("model.optimizer", "torch.optim.AdamW", ("optim",)),
    Setting(f"{OPTIMIZER}.lr", "1.0e-5", ("learning_rate",), ("optim.lr",), ("trainer.lr",)),
    Setting(f"{OPTIMIZER}.weight_decay", "0.1", ("weight_decay",), ("optim.weight_decay",), ("trainer.weight_decay",)),
    Setting(f"{OPTIMIZER}.betas", "[0.9, 0.99]", ("adam_beta1", "adam_beta2"), ("optim.betas",)),
    Setting(f"{OPTIMIZER}.eps", "1.0e-8", ("adam_epsilon",)),
    Setting(
        "model.lr_scheduler",
        "{class_path: torch.optim.lr_scheduler.ConstantLR}",
        ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
        ("lr_warmup_steps", "lr_warmup_steps_ratio", "lr_scheduler_type", "warmup_style"),
        ("use_scheduler", "scheduler_type", "trainer.warmup_steps"),
        "a class and its arguments",
    ),
    Setting("trainer.precision", "bf16-mixed", ("bf16", "fp16")),
    Setting("trainer.gradient_clip_val", "1.0", ("max_grad_norm",), ("grad_clip",)),
    Setting("trainer.max_steps", "25", ("max_steps",), ("total_training_steps",), ("max_iterations",)),
    Setting("trainer.max_epochs", "1", ("num_train_epochs",), ("total_epochs",), ("max_epochs",)),
    Setting(
        "trainer.accumulate_grad_batches",
        "4",
        ("gradient_accumulation_steps", "per_device_train_batch_size"),
        ("ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu"),
        ("grad_accumulation_steps", "micro_batch_size"),
        "number of micro-batches of a step",
    ),
    Setting("trainer.devices", "2", (), ("n_gpus_per_node",)),
    Setting("trainer.num_nodes", "2", (), ("nnodes",)),
    Setting("trainer.logger", "false", ("report_to",), (), ("log_wandb", "wandb_project")),
    Setting("trainer.log_every_n_steps", "1", ("logging_steps",)),
    Setting("trainer.default_root_dir", "runs", ("output_dir",), ("default_local_dir",), ("output_dir",)),
    Setting("trainer.num_sanity_val_steps", "-1", ("eval_on_start",), ("val_before_train",), (), "-1 is all of it"),
    Setting(
        "trainer.strategy", "auto", STRATEGY, ("actor.strategy", "fsdp_config"), (), "a class, see overlays/fsdp.yaml"
    ),
    Setting("trainer.accelerator", "cpu", ("use_cpu",), ("trainer.device",)),
    Setting("trainer.deterministic", "true", ("full_determinism",)),
    Setting("trainer.enable_progress_bar", "true", ("disable_tqdm",), (), (), "the opposite"),
    Setting("seed_everything", "1", ("seed", "data_seed")),
    Setting("ckpt_path", "last.ckpt", ("resume_from_checkpoint",), ("resume_from_path", "resume_mode")),
    Setting("checkpoint.every_n_steps", "5", ("save_steps", "save_strategy"), ("save_freq",), ("save_steps",)),
    Setting("checkpoint.keep", "2", ("save_total_limit",), ("max_actor_ckpt_to_keep",)),
    Setting("console.every_n_steps", "5", ("log_completions", "num_completions_to_print"), (), ("trainer.debug",)),
)
SAMPLING = (
    Setting(
        "data.environment.class_path",
        "fuchsia_pl.library.arithmetic.Arithmetic",
        ("dataset_name", "reward_funcs"),
        ("train_files", "custom_reward_function", "reward_model"),
        ("dataset.name",),
        "items, prompts and rewards in one class",
    ),
    Setting(
        "data.batch_size",
        "8",
        ("generation_batch_size",),
        ("train_batch_size",),
        ("trainer.batch_size", "generation.batch_size", "server.generation_batch_size"),
        "items of a phase, over all ranks; TRL counts completions",
    ),
    Setting("data.steps_per_epoch", "5", ("eval_steps",), ("test_freq",), ("eval_steps",), "steps between validations"),
    Setting("data.sampling.group_size", "8", ("num_generations",), ("rollout.n",), ("group_size", "vllm.n")),
    Setting("data.sampling.temperature", "1.0", ("temperature",), ("rollout.temperature",), ("sampling.temperature",)),
    Setting("data.sampling.validation_temperature", "0.0", (), ("val_kwargs.temperature",)),
    Setting("data.sampling.long_prompts", "drop", (), ("filter_overlong_prompts", "data.truncation")),
    Setting("data.sampling.max_staleness", "0", (), ("staleness_threshold",), ("buffer_size",), "optimizer steps"),
    Setting(
        "data.sampling.max_completion_tokens",
        "256",
        ("max_completion_length",),
        ("max_response_length",),
        ("max_tokens", "max_new_tokens", "generation.max_len"),
        "over all turns",
    ),
    Setting(
        "data.sampling.max_length",
        "1024",
        ("vllm_max_model_length", "max_prompt_length"),
        ("max_model_len", "max_prompt_length"),
        ("max_model_len",),
        "prompt, completion and answers of the environment together",
    ),
    Setting(
        "data.engine.class_path", VLLM, ENGINE_CLASS, ("rollout.name",), (), "servers: --config overlays/server.yaml"
    ),
    Setting(f"{ENGINE}.timeout_s", "600", ("vllm_server_timeout",)),
    Setting(
        f"{ENGINE}.kv_cache_gb",
        "4",
        ("vllm_gpu_memory_utilization",),
        ("gpu_memory_utilization",),
        ("gpu_memory_utilization",),
        "GiB, no share of the device",
    ),
    Setting(
        f"{ENGINE}.tensor_parallel_size",
        "2",
        ("vllm_tensor_parallel_size",),
        ("tensor_model_parallel_size",),
        ("server.tensor_parallel_size",),
    ),
    Setting(f"{ENGINE}.max_num_seqs", "64", (), ("rollout.max_num_seqs",)),
    Setting(f"{ENGINE}.enforce_eager", "true", (), ("rollout.enforce_eager",)),
    Setting(f"{ENGINE}.quantization", "fp8", (), ("rollout.quantization",), ("server.quantization",)),
    Setting(
        f"{ENGINE}.engine_args",
        "{max_num_batched_tokens: 4096, kv_cache_dtype: fp8}",
        ("vllm_model_impl",),
        ("engine_kwargs", "max_num_batched_tokens"),
        ("kv_quantization",),
        "arguments of vLLM by their own names, such as kv_cache_dtype",
    ),
    Setting("hotswap.enabled", "true", ("vllm_enable_sleep_mode",), OFFLOADING, ("single_gpu",)),
)
OBJECTIVE = (
    Setting("model.loss.loss_type", "grpo", ("loss_type",), ("loss_mode", "adv_estimator"), ("loss_type",)),
    Setting("model.loss.advantage", "group_norm", ("scale_rewards",), ("norm_adv_by_std_in_grpo",)),
    Setting("model.loss.reduction", "token_mean", (), ("loss_agg_mode",)),
    Setting("model.loss.beta", "0.01", ("beta",), ("kl_loss_coef", "kl_coef"), ("trainer.beta",)),
    Setting("model.loss.kl_in", "loss", (), ("use_kl_in_reward", "use_kl_loss")),
    Setting("model.loss.kl_estimator", "k3", ("use_bias_correction_kl",), ("kl_loss_type", "kl_penalty")),
    Setting("model.loss.clip_low", "0.2", ("epsilon",), ("clip_ratio", "clip_ratio_low"), ("trainer.epsilon",)),
    Setting("model.loss.clip_high", "0.28", ("epsilon_high",), ("clip_ratio_high",), ("epsilon_high",)),
    Setting("model.loss.dual_clip", "3.0", ("delta",), ("clip_ratio_c",)),
    Setting("model.loss.ratio_level", "token", ("importance_sampling_level",), (), ("importance_sampling.ratio_type",)),
    Setting(
        "model.loss.mini_batches",
        "4",
        ("steps_per_generation",),
        ("ppo_mini_batch_size",),
        (),
        "their number: train_batch_size / ppo_mini_batch_size, or steps_per_generation / gradient_accumulation_steps",
    ),
    Setting(
        "model.loss.num_policy_updates", "2", ("num_iterations",), ("ppo_epochs",), ("trainer.num_policy_updates",)
    ),
    Setting("model.loss.entropy_weight", "0.01", ("entropy_coef",), ("entropy_coeff",)),
    Setting(
        "model.loss.truncated",
        "mask",
        ("mask_truncated_completions",),
        ("overlong_buffer",),
        ("ignore_imcomplete_samples",),
    ),
    Setting("model.loss.max_refills", "3", (), ("filter_groups", "max_num_gen_batches")),
    Setting("model.loss.reward_aggregation", "sum_then_normalize", ("multi_objective_aggregation",)),
    Setting("model.loss.sapo.temperature_positive", "1.0", ("sapo_temperature_pos",), ("tau_pos",)),
    Setting("model.loss.sapo.temperature_negative", "1.0", ("sapo_temperature_neg",), ("tau_neg",)),
    Setting("model.loss.critic.gamma", "1.0", (), ("algorithm.gamma",)),
    Setting("model.loss.critic.lam", "0.95", (), ("algorithm.lam",)),
    Setting("model.loss.critic.value_clip", "0.2", (), ("cliprange_value",)),
    Setting(
        f"{CORRECTION}.mode",
        "truncate",
        ("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
        ("rollout_is",),
        ("importance_sampling.enabled",),
    ),
    Setting(
        f"{CORRECTION}.high",
        "2.0",
        ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"),
        ("rollout_is_threshold",),
        ("token_mask_high",),
    ),
    Setting(
        f"{CORRECTION}.level",
        "token",
        (),
        ("rollout_is_level",),
        ("geo_mask_low", "geo_mask_high", "sequence_mask_low", "sequence_mask_high", "sequence_clip_high"),
        "one level at a time, with `low` and `high`",
    ),
    Setting(f"{CORRECTION}.low", "0.5", ("vllm_importance_sampling_clip_min",), (), ("token_mask_low",)),
)
SETTINGS = (*MODEL, *TRAINING, *SAMPLING, *OBJECTIVE)
_BY_NAME: dict[str, Setting | NotOffered] = {name: entry for entry in (*SETTINGS, *NOT_OFFERED) for name in entry.names}


def our_setting(key: str) -> Setting | None:
    """The setting of this project for a dotted key of another program; None if there is none.

    >>> our_setting("data.sampling.num_generations").key
    'data.sampling.group_size'
    >>> our_setting("actor_rollout_ref.rollout.n").key
    'data.sampling.group_size'
    >>> our_setting("model.policy.nam") is None
    True
    """
    entry = _entry(key)
    return entry if isinstance(entry, Setting) else None


def reason_not_offered(key: str) -> str | None:
    """The reason why a setting of another program does not exist here; None if the dotted key is not such a setting.

    >>> reason_not_offered("model.policy.lora.use_dora")
    'vLLM cannot serve DoRA adapters: leave it out'
    """
    entry = _entry(key)
    return entry.reason if isinstance(entry, NotOffered) else None


def _entry(key: str) -> Setting | NotOffered | None:
    """The entry for the longest end of a dotted key that is a foreign name."""
    parts = key.split(".")
    return next((_BY_NAME[end] for n in range(len(parts)) if (end := ".".join(parts[n:])) in _BY_NAME), None)


def migration_table() -> str:
    """Both tables in Markdown, as configs/README.md contains them."""
    offered = [[f"`{s.key}`{f' ({s.note})' if s.note else ''}", *_cells(s)] for s in SETTINGS]
    refused = [[entry.reason, *_cells(entry)] for entry in NOT_OFFERED]
    return f"{_markdown('here', offered)}\n\n{_markdown('not offered', refused)}"


def _cells(entry: Setting | NotOffered) -> list[str]:
    return [", ".join(f"`{name}`" for name in names) for names in (entry.trl, entry.verl, entry.fuchsia)]


def _markdown(title: str, rows: list[list[str]]) -> str:
    head = [f"| {title} | TRL | verl | the first Fuchsia |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in rows)])
