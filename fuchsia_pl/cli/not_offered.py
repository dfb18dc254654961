"""Settings of TRL, verl and the first Fuchsia that have no counterpart here, with the reason."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NotOffered:
    """Settings of other programs that do not exist here, with their common reason.

    Attributes:
        reason: The reason and what to do, as sentences without the last full stop.
        trl: Names in TRL's GRPOConfig and in the TrainingArguments of transformers.
        verl: Names in verl's trainer configs; as much of the dotted key as identifies them.
        fuchsia: Names in the first Fuchsia's YAML, likewise.

    >>> NotOffered("No devices of this kind", trl=("use_tpu",)).names
    ('use_tpu',)
    """

    reason: str
    trl: tuple[str, ...] = ()
    verl: tuple[str, ...] = ()
    fuchsia: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All foreign names."""
        return (*self.trl, *self.verl, *self.fuchsia)


MODEL = (
    NotOffered("vLLM cannot serve DoRA adapters: leave it out", ("use_dora",)),
    NotOffered(
        "vLLM cannot serve adapters that replace whole modules: leave it out, or train all weights with "
        "model.policy.lora.enabled: false",
        ("modules_to_save", "lora_modules_to_save"),
    ),
    NotOffered(
        "A checkpoint's own code is never run, and models have no other arguments: leave it out",
        ("model_init_kwargs", "trust_remote_code", "attn_implementation", "use_cache"),
        ("trust_remote_code", "override_config", "external_lib"),
    ),
    NotOffered(
        "Download the revision and give its folder as model.policy.name", ("model_revision",), (), ("model.revision",)
    ),
    NotOffered(
        "The base model has the dropout of its own config; that of the adapter is model.policy.lora.dropout",
        ("disable_dropout",),
    ),
    NotOffered("Loss terms of the model itself are not added: leave it out", ("router_aux_loss_coef",)),
    NotOffered(
        "trainer.precision is the one setting of the type in which the trainer computes",
        ("cast_lm_head_to_fp32", "bf16_full_eval", "fp16_full_eval", "tf32"),
    ),
    NotOffered(
        "Write the values into a template: model.policy.chat_template takes a file",
        ("chat_template_kwargs",),
        ("apply_chat_template_kwargs",),
    ),
    NotOffered(
        "model.policy.checkpointing has every_n_layers and cpu_offloading, and no other options",
        ("gradient_checkpointing_kwargs",),
    ),
    NotOffered(
        "The trainer's forward is not compiled and uses no other kernels: leave it out",
        ("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"),
        ("use_liger", "use_torch_compile", "use_fused_kernels"),
    ),
    NotOffered(
        "Micro-batches have no such setting: each is as wide as its longest row",
        ("pad_to_multiple_of",),
        ("use_remove_padding", "balance_batch"),
    ),
)
TRAINING = (
    NotOffered(
        "Each micro-batch has its rows of all signals: trainer.accumulate_grad_batches or "
        "model.policy.max_tokens_per_micro_batch decides the size of all of them",
        (),
        ("log_prob_micro_batch_size", "log_prob_micro_batch_size_per_gpu", "log_prob_max_token_len_per_gpu"),
    ),
    NotOffered(
        "Its arguments are those of the class: model.optimizer.init_args", ("optim_args", "optim_target_modules")
    ),
    NotOffered(
        "Denominators are always those of the whole step, over all devices: leave it out",
        ("average_tokens_across_devices",),
    ),
    NotOffered(
        "It belongs to supervised training: leave it out",
        (
            "label_smoothing_factor",
            "neftune_noise_alpha",
            "label_names",
            "prediction_loss_only",
            "include_for_metrics",
            "batch_eval_metrics",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "train_sampling_strategy",
            "length_column_name",
            "remove_unused_columns",
        ),
    ),
    NotOffered(
        "Memory is planned before training and returned after each step: leave it out", ("torch_empty_cache_steps",)
    ),
    NotOffered(
        "Batch sizes are never changed by the program: set data.batch_size and trainer.accumulate_grad_batches",
        ("auto_find_batch_size",),
    ),
    NotOffered(
        "Every rank has the same share of data.batch_size, and prompts are made in the trainer's process: leave it out",
        (
            "dataloader_drop_last",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
        ("dataloader_num_workers",),
        ("trainer.non_blocking",),
    ),
    NotOffered(
        "A resumed run continues at the next item, with the state of all callbacks: leave it out",
        ("ignore_data_skip", "restore_callback_states_from_checkpoint"),
    ),
    NotOffered(
        "Add a lightning.pytorch.callbacks.ModelCheckpoint with its `monitor` to trainer.callbacks",
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "save_only_model"),
    ),
    NotOffered("The first rank writes all files of a run: leave it out", ("save_on_each_node", "log_on_each_node")),
    NotOffered(
        "A run that gets SIGTERM or SIGINT ends with a checkpoint; stop_signals has the settings",
        ("enable_jit_checkpoint",),
    ),
    NotOffered(
        "Nothing is uploaded: the adapter is in the run's folder",
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
            "log_completions_hub_repo",
        ),
        ("default_hdfs_dir",),
    ),
    NotOffered(
        "Every step is in metrics.csv and every completion in rollouts-*.jsonl: leave it out",
        (
            "logging_strategy",
            "logging_first_step",
            "logging_nan_inf_filter",
            "include_num_input_tokens_seen",
            "skip_memory_metrics",
            "log_multimodal",
            "log_unique_prompts",
        ),
        ("log_val_generations", "rollout_data_dir", "validation_data_dir"),
        ("trainer.debug_log_dir",),
    ),
    NotOffered(
        "Messages go to the console and run.log; --debug prints tracebacks",
        ("log_level", "log_level_replica", "debug"),
        (),
        ("trainer.log_level",),
    ),
    NotOffered(
        "It is an argument of the logger in trainer.logger",
        ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        ("project_name", "experiment_name"),
    ),
    NotOffered(
        "The command decides it: fuchsia fit, validate or predict", ("do_train", "do_eval", "do_predict"), ("val_only",)
    ),
    NotOffered(
        "Validation follows every data.steps_per_epoch steps, on one completion per held-out item",
        ("eval_strategy", "eval_delay", "per_device_eval_batch_size", "num_generations_eval"),
        ("val_batch_size", "val_kwargs.n"),
    ),
    NotOffered("torchrun, srun or Lightning start the ranks: leave it out", ("local_rank",)),
)
ROLLOUTS = (
    NotOffered(
        "The loss is of the distribution that was sampled from, so all of it is sampled: leave it out. Lower "
        "data.sampling.temperature instead, which the loss takes into account",
        ("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "vllm_structured_outputs_regex"),
        ("do_sample", "ignore_eos"),
    ),
    NotOffered("Items are always shuffled, by the run's seed: leave it out", ("shuffle_dataset",), ("data.shuffle",)),
    NotOffered(
        "The class of the environment decides it: see its arguments with --data.environment.help CLASS_PATH",
        ("reward_weights", "max_tool_calling_iterations"),
        ("prompt_key", "val_files", "reward_fn_key", "multi_turn", "max_assistant_turns"),
        ("dataset.split", "dataset.field", "dataset.max_samples"),
    ),
    NotOffered(
        "An engine of vLLM generates: leave it out",
        (
            "cache_implementation",
            "ds3_gather_for_generation",
            "use_transformers_continuous_batching",
            "transformers_continuous_batching_config",
            "use_transformers_paged",
        ),
        ("hybrid_engine", "load_format"),
    ),
    NotOffered(
        "Servers are started with `fuchsia serve`, and a run gets their addresses by --config overlays/server.yaml",
        ("vllm_server_host", "vllm_server_port", "vllm_group_port"),
        ("rollout.mode", "custom_async_server"),
        ("server.host", "server.port"),
    ),
    NotOffered(
        "Prefix caching is always on, and the logprob of each sampled token is always returned: leave it out",
        (),
        ("calculate_log_probs", "enable_chunked_prefill"),
        ("enable_prefix_caching", "logprobs"),
    ),
    NotOffered(
        "Rollouts go to the trainer in memory and not by files or HTTP: leave it out",
        (),
        (),
        (
            "transfer.mode",
            "transfer.queue_dir",
            "transfer.poll_interval",
            "transfer.clear_on_start",
            "async_buffer_fill",
        ),
    ),
)
OBJECTIVE = (
    NotOffered(
        "The reference is the model (and adapter) that the run starts from, and does not change: leave it out",
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    ),
    NotOffered("All tokens of the loss mask are trained on: leave it out", ("top_entropy_quantile",)),
    NotOffered(
        "The weight of the entropy is fixed: model.loss.entropy_weight",
        ("use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
    ),
    NotOffered(
        "VESPO is not implemented: model.loss.loss_type has the algorithms",
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    ),
    NotOffered(
        "model.loss.sampler_correction.mode: mask leaves out completions far from the policy, whatever their advantage",
        ("off_policy_mask_threshold",),
    ),
    NotOffered("The critic trains from the first step: leave it out", (), ("critic_warmup",)),
    NotOffered("The weight of the KL is fixed: model.loss.beta", (), ("kl_ctrl.type", "target_kl", "kl_ctrl.horizon")),
)
NOT_OFFERED = (*MODEL, *TRAINING, *ROLLOUTS, *OBJECTIVE)
