"""Settings by the names they have in TRL, in verl and in the first Fuchsia.

One table: unknown keys of a config are answered from it, and the README prints it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A setting of ours and what others call it.

    Attributes:
        key: Our dotted key.
        example: A value it takes, as on the command line.
        trl: Names in TRL's GRPOConfig, ModelConfig and ScriptArguments.
        verl: Names in verl's trainer configs; as much of the dotted key as it takes to tell them apart.
        fuchsia: Names in the first Fuchsia's YAML, likewise.
        note: Where the meaning is another.

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
OPTIMIZER = "model.optimizer.init_args"
CORRECTION = "model.loss.sampler_correction"

MODEL = (
    Setting("model.policy.name", "org/name", ("model_name_or_path",), ("model.path",), ("model.name",)),
    Setting("model.policy.dtype", "float32", ("dtype", "torch_dtype"), ("rollout.dtype",), ("model.dtype",)),
    Setting("model.policy.lora.enabled", "true", ("use_peft",), (), ("lora.enabled",)),
    Setting("model.policy.lora.r", "8", ("lora_r",), ("lora_rank",), ("lora.r",)),
    Setting("model.policy.lora.alpha", "16", ("lora_alpha",), (), ("lora.alpha",)),
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
    Setting("model.policy.max_tokens_per_micro_batch", "8192", (), ("ppo_max_token_len_per_gpu",)),
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
    Setting("seed_everything", "1", ("seed",)),
    Setting("ckpt_path", "last.ckpt", ("resume_from_checkpoint",), ("resume_from_path", "resume_mode")),
    Setting("checkpoint.every_n_steps", "5", ("save_steps",), ("save_freq",), ("save_steps",)),
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
    Setting("data.engine.class_path", "fuchsia_pl.engines.vllm_colocated.VLLMColocatedEngine", ("vllm_mode",)),
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
    Setting("hotswap.enabled", "true", ("vllm_enable_sleep_mode",), ("free_cache_engine",), ("single_gpu",)),
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
    Setting("model.loss.num_policy_updates", "2", ("num_iterations",), ("ppo_epochs",)),
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
    Setting("model.loss.sapo_temperature_positive", "1.0", ("sapo_temperature_pos",), ("tau_pos",)),
    Setting("model.loss.sapo_temperature_negative", "1.0", ("sapo_temperature_neg",), ("tau_neg",)),
    Setting("model.loss.critic.gamma", "1.0", (), ("algorithm.gamma",)),
    Setting("model.loss.critic.lam", "0.95", (), ("algorithm.lam",)),
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
    Setting(f"{CORRECTION}.low", "0.5", ("vllm_importance_sampling_clip_min",), (), ("token_mask_low",)),
)
SETTINGS = (*MODEL, *TRAINING, *SAMPLING, *OBJECTIVE)
_BY_NAME = {name: setting for setting in SETTINGS for name in setting.names}
_WHOLE_DISTRIBUTION = (
    "The loss is of the distribution that was sampled from, so all of it is sampled: leave it out. Lower "
    "data.sampling.temperature instead, which the loss takes into account"
)
# Names of settings that other trainers have and this one cannot offer, with the reason.
NOT_OFFERED = {
    "top_p": _WHOLE_DISTRIBUTION,
    "top_k": _WHOLE_DISTRIBUTION,
    "min_p": _WHOLE_DISTRIBUTION,
    "use_dora": "vLLM cannot serve DoRA adapters: leave it out",
    "modules_to_save": "vLLM cannot serve adapters that replace whole modules: leave it out, or train all weights with "
    "model.policy.lora.enabled: false",
}


def our_setting(key: str) -> Setting | None:
    """Our setting for a dotted key that somebody knows from elsewhere, by the longest end of it that is a foreign name.

    >>> our_setting("data.sampling.num_generations").key
    'data.sampling.group_size'
    >>> our_setting("actor_rollout_ref.rollout.n").key
    'data.sampling.group_size'
    >>> our_setting("model.policy.nam") is None
    True
    """
    parts = key.split(".")
    return next((_BY_NAME[end] for n in range(len(parts)) if (end := ".".join(parts[n:])) in _BY_NAME), None)


def reason_not_offered(key: str) -> str | None:
    """Why a setting that other trainers have does not exist here; None where the dotted key is not one of those.

    >>> reason_not_offered("model.policy.lora.use_dora")
    'vLLM cannot serve DoRA adapters: leave it out'
    """
    return NOT_OFFERED.get(key.rpartition(".")[2])


def migration_table() -> str:
    """The table in Markdown, as the README has it."""

    def cell(names: tuple[str, ...]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    rows = [
        f"| `{s.key}`{f' ({s.note})' if s.note else ''} | {cell(s.trl)} | {cell(s.verl)} | {cell(s.fuchsia)} |"
        for s in SETTINGS
    ]
    return "\n".join(["| here | TRL | verl | the first Fuchsia |", "|---|---|---|---|", *rows])
