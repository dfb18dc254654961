"""Prepares the teacher of a run: checks before the engine starts, and the prompts of a teacher with a better prompt."""

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig

from fuchsia_pl.envs.bounded import call_apart
from fuchsia_pl.envs.self_driven import SelfDrivenEnvironment
from fuchsia_pl.objectives.config import LossConfig, shared_credit_words
from fuchsia_pl.progress import progress
from fuchsia_pl.rollouts.budget import longest_row
from fuchsia_pl.rollouts.collector import Collector
from fuchsia_pl.rollouts.preparation import training_items
from fuchsia_pl.rollouts.teacher import ScoreRows, Teacher, TeacherConfig
from fuchsia_pl.types import ConfigError, Rollout, ServedModel


def check_teacher(
    config: TeacherConfig | None,
    loss: LossConfig,
    model: ServedModel,
    collector: Collector,
    lengths: Mapping[int, int],
) -> None:
    """Checks that the teacher fits to the objective, to the policy and to the lengths of a run.

    Args:
        config: The teacher, None without one.
        loss: The objective.
        model: The policy.
        collector: With a prepared environment.
        lengths: Number of tokens of the policy's prompt by position, for the training items that may be drawn.

    Raises:
        ConfigError: It does not fit.
    """
    if config is None:
        if loss.parts.advantage == "teacher":
            raise ConfigError(
                'model.loss.advantage is "teacher" and there is none: set data.teacher to {prompt: …}, {adapter: …} or '
                "{name: …, url: …}"
            )
        return
    if config.name is None and model.lora_rank == 0:
        kind = "adapter" if config.adapter is not None else "prompt"
        raise ConfigError(
            f"data.teacher.{kind} needs frozen base weights, and model.policy.lora.enabled is false: train an adapter, or use a "
            "teacher on a server (data.teacher.name and url)"
        )
    temperature = collector.config.temperature
    if config.name is not None and temperature != 1.0:
        raise ConfigError(
            f"data.teacher.name: a server scores at temperature 1, and data.sampling.temperature is {temperature}: set it to 1.0"
        )
    if loss.parts.max_refills > 0:
        raise ConfigError(
            f"model.loss.max_refills={loss.parts.max_refills} replaces groups without spread, and with data.teacher they have "
            "advantages too: set it to 0"
        )
    if loss.shares_credit:
        raise ConfigError(
            f"the advantages of data.teacher differ from token to token of a row, and model.loss.{shared_credit_words(loss)}"
        )
    if config.prompt is not None:
        environment = collector.environment
        if environment.mixed or isinstance(environment, SelfDrivenEnvironment):
            raise ConfigError(
                f"data.teacher.prompt is put in front of the prompt of an item, and {type(environment).__name__} leaves prompts "
                "to agents or to other environments: use a teacher with an adapter (data.teacher.adapter) or on a server "
                "(name and url)"
            )
        TeacherPrompts(config, collector).check_lengths(lengths, context_length(model.folder))


def ready_teacher(config: TeacherConfig, collector: Collector, score: ScoreRows | None) -> Teacher:
    """The teacher as a phase uses it.

    Args:
        config: The teacher.
        collector: With a prepared environment.
        score: Scores rows on the teacher's server, None without one.
    """
    prompt_ids = None if config.prompt is None else TeacherPrompts(config, collector).of_rollout
    return Teacher(config.weight, prompt_ids, score)


class TeacherPrompts:
    """Renders them with the template, the tools and the environment of the run.

    Args:
        config: The teacher; its `prompt` is set.
        collector: With a prepared environment. It renders the policy's prompts.
    """

    def __init__(self, config: TeacherConfig, collector: Collector) -> None:
        self._config = config
        self._collector = collector

    def of_rollout(self, rollout: Rollout) -> tuple[int, list[int]]:
        """Number of tokens of a rollout's prompt, and the ids that the teacher reads in their place.

        Raises:
            ConfigError: `messages` of the environment returned something else when the rollout was sampled.
        """
        where = f"item {rollout.item_index}"
        messages = call_apart(self._collector.messages_of, rollout.item, where)
        own = self._collector.ids_of(messages, where)
        if own != rollout.token_ids[: len(own)]:
            raise ConfigError(
                f"{where}: messages(item) does not return the prompt again that was sampled from, so data.teacher.prompt cannot "
                "be put in front of it: return the same messages for the same item, or use another teacher"
            )
        return len(own), self._collector.ids_of(self._config.before(messages), where)

    def check_lengths(self, lengths: Mapping[int, int], context: int | None) -> None:
        """Renders all prompts of the teacher and checks that its rows fit into the model's context.

        Args:
            lengths: Number of tokens of the policy's prompt by position.
            context: Longest row of the model in tokens, None if that is not known.

        Raises:
            ConfigError: A row may be too long, or the template cannot render the teacher's prompt.
        """
        collector, has_turns = self._collector, self._collector.environment.max_steps > 1
        items = training_items(collector.environment)
        with progress.activity("rendering the teacher's prompts", len(lengths), "prompts") as activity:
            for index, length in lengths.items():
                where = f"training item {index}"
                messages = self._config.before(collector.messages_of(items[index], where))
                number = len(collector.ids_of(messages, where))
                own = longest_row([length], collector.config, has_turns).own_tokens
                if context is not None and number + own > context:
                    raise ConfigError(
                        f"{where}: with data.teacher.prompt its prompt has {number} tokens, and with {own} tokens after it a row "
                        f"exceeds the model's context of {context}: shorten it, or lower max_completion_tokens or max_length"
                    )
                activity.advance()


def context_length(folder: str | Path) -> int | None:
    """Longest row of a model in tokens, None if its config does not state it."""
    config = AutoConfig.from_pretrained(str(folder)).get_text_config().to_dict()
    return config.get("max_position_embeddings") or config.get("n_positions")
