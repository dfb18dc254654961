"""What the memory plan of a config depends on, without a tokenizer, weights or a trainer."""

from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import PretrainedConfig

from fuchsia_pl.callbacks.planned_run import RunParts, TrainerSettings
from fuchsia_pl.cli.config_only import ConfigOnlyCLI
from fuchsia_pl.policy.sharding import check_sharded
from fuchsia_pl.rollouts.budget import LongestRow, check_budget, check_no_number
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.preparation import check_shares


def planned_parts(cli: ConfigOnlyCLI, architecture: PretrainedConfig, num_ranks: int, is_gpu: bool) -> RunParts:
    """The parts of a config that are planned.

    Args:
        cli: The parsed config.
        architecture: Its model.
        num_ranks: Number of ranks.
        is_gpu: Whether they have GPUs.

    Raises:
        ConfigError: The items cannot be divided over the ranks, the strategy cannot shard the model, or the longest row or a
            number of micro-batches does not go with the token budget.
    """
    trainer, given = cli._get(cli.config_init, "trainer"), cli._get(cli.config, "trainer")
    check_shares(cli.datamodule.batch_size, num_ranks, cli.model.loss_config.mini_batches)
    row = longest_possible_row(cli.datamodule.sampling, cli.datamodule.environment.max_steps > 1)
    budget = cli.model.policy_config.max_tokens_per_micro_batch
    check_sharded(trainer, cli.model.policy_config)
    if budget is not None:
        check_no_number(given.accumulate_grad_batches or 1, 1, budget)
        check_budget(row, budget)
    settings = TrainerSettings(
        precision=str(given.precision or "32-true"),  # Lightning's default
        num_micro_batches=given.accumulate_grad_batches or 1,
        num_ranks=num_ranks,
        is_sharded=isinstance(trainer.strategy, ModelParallelStrategy),
        shares_device=bool(cli._get(cli.config, "hotswap").enabled),
        is_gpu=is_gpu,
    )
    return RunParts(cli.model, cli.datamodule, architecture, row, settings)


def longest_possible_row(sampling: SamplingConfig, has_turns: bool) -> LongestRow:
    """The longest row that the settings allow, whatever the prompts are.

    Args:
        sampling: Allowed lengths.
        has_turns: Whether there may be several turns. A row may then have any number of tokens after a prompt of one.

    >>> longest_possible_row(SamplingConfig(max_completion_tokens=512, max_length=1024), has_turns=False)
    LongestRow(prompt_tokens=512, own_tokens=512)
    >>> longest_possible_row(SamplingConfig(max_completion_tokens=512, max_length=1024), has_turns=True)
    LongestRow(prompt_tokens=1, own_tokens=1023)
    """
    prompt = 1 if has_turns else sampling.max_length - sampling.max_completion_tokens
    return LongestRow(prompt, sampling.max_length - prompt)
