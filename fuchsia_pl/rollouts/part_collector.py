"""Runs the rollouts of a mixture: each part has a collector with its own environment and limits."""

from collections.abc import Sequence
from dataclasses import replace

from fuchsia_pl.engines.base import Engine
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.parts import Part, PartItems, by_part
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.credit import GROUP_ADVANTAGES
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw, counted, gather_or_cancel
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.prompt import Prompt
from fuchsia_pl.types import ConfigError, Item, Rollout


def collector_for(engine: Engine, environment: Environment, chat: Chat, config: SamplingConfig) -> Collector:
    """The collector of an environment. The arguments are those of `Collector`."""
    return (PartCollector if environment.mixed else Collector)(engine, environment, chat, config)


class PartCollector(Collector):
    """Collects the rollouts of a mixture. A rollout meets only the environment of its part, and the row as that returned it.

    Args:
        engine: Engine that generates completions.
        environment: The mixture.
        chat: The model's chat template.
        config: Settings of sampling. `max_completion_tokens` is the largest value of the parts.
    """

    def __init__(self, engine: Engine, environment: Environment, chat: Chat, config: SamplingConfig) -> None:
        self._of_part = {
            name: Collector(engine, part.environment, chat, limited(config, part))
            for name, part in environment.mixed.items()
        }
        super().__init__(engine, environment, chat, config)

    @property
    def chat(self) -> Chat:
        """The model's chat template, the same for all parts."""
        return self._chat

    @chat.setter
    def chat(self, chat: Chat) -> None:
        self._chat = chat
        for collector in self._of_part.values():
            collector.chat = chat

    async def prepare(self) -> None:
        """Prepares the environments of all parts, see Collector."""
        for collector in self._of_part.values():
            await collector.prepare()

    def check_template(self, items: Sequence[Item], index: int) -> None:
        """Checks the template with the first item of every part, see Collector."""
        mixed = _mixed(items)
        for name, positions in by_part(mixed, range(len(mixed))).items():
            self._of_part[name].check_template(mixed.rows, positions[0])

    async def collect(self, draw: Draw) -> list[list[Rollout]]:
        """Samples and scores all groups of a draw, see Collector. The parts are sampled at the same time."""
        items = _mixed(draw.items)
        shares = by_part(items, draw.indices)
        with counted(draw) as counting:
            of_parts = await gather_or_cancel(
                self._of_part[name].collect(replace(counting, items=items.rows, indices=indices))
                for name, indices in shares.items()
            )
        found: dict[int, list[Rollout]] = {}
        for (name, indices), groups in zip(shares.items(), of_parts, strict=True):
            for rollout in (rollout for group in groups for rollout in group):
                rollout.part = name
            found |= dict(zip(indices, groups, strict=True))
        return [found[index] for index in draw.indices]

    def num_prompt_tokens(self, items: Sequence[Item], index: int, split: str) -> int | None:
        """Renders the prompt of an item within the limits of its part, see Collector."""
        mixed = _mixed(items)
        return self._of_part[mixed.part_at(index)].num_prompt_tokens(mixed.rows, index, split)

    def prompt(self, items: Sequence[Item], index: int) -> Prompt:
        """Makes the prompt of an item, see Collector."""
        mixed = _mixed(items)
        return self._of_part[mixed.part_at(index)].prompt(mixed.rows, index)


def limited(config: SamplingConfig, part: Part) -> SamplingConfig:
    """Settings of sampling with the limit of a part."""
    own = part.max_completion_tokens
    return config if own is None else replace(config, max_completion_tokens=min(own, config.max_completion_tokens))


def check_parts(environment: Environment, loss: LossConfig, sampling: SamplingConfig) -> None:
    """Checks the sizes of a mixture's parts. The run's own are the largest: memory and micro-batches are planned with them.

    Args:
        environment: The environment, with or without parts.
        loss: The objective.
        sampling: Settings of sampling.

    Raises:
        ConfigError: One is larger, or too small for the objective.
    """
    for name, part in environment.mixed.items():
        smallest = 2 if loss.parts.advantage in GROUP_ADVANTAGES else 1
        for setting, value, least, most in (
            ("group_size", part.group_size, smallest, sampling.group_size),
            ("max_completion_tokens", part.max_completion_tokens, 1, sampling.max_completion_tokens),
        ):
            if value is not None and not least <= value <= most:
                raise ConfigError(
                    f"{setting} of the part {name!r} of the mixture must be {least} to data.sampling.{setting}={most}, "
                    f"got {value}: raise data.sampling.{setting}, and set it for the other parts"
                )


def own_group_sizes(environment: Environment, items: Sequence[Item], indices: Sequence[int]) -> dict[int, int]:
    """Siblings of the items whose part has a group size of its own, by position."""
    sizes = {name: part.group_size for name, part in environment.mixed.items() if part.group_size is not None}
    if not sizes:
        return {}
    shares = by_part(items, indices)
    return {index: sizes[name] for name, positions in shares.items() if name in sizes for index in positions}


def mean_group_size(environment: Environment, group_size: int) -> float:
    """Mean number of siblings of the drawn items.

    Args:
        environment: The environment, with or without parts.
        group_size: Siblings of items whose part has no group size of its own.
    """
    parts = environment.mixed.values()
    if not parts:
        return float(group_size)
    siblings = sum(part.weight * (part.group_size or group_size) for part in parts)
    return siblings / sum(part.weight for part in parts)


def _mixed(items: Sequence[Item]) -> PartItems:
    if not isinstance(items, PartItems):
        raise ConfigError(
            "these rows do not name the part of the mixture that they belong to: give the environment of that part instead "
            "(data.environment.class_path)"
        )
    return items
