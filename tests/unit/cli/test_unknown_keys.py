"""Unknown keys: all are reported at once, each with the likely key, also for names of other programs."""

import ast
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.foreign_names import SETTINGS, migration_table, our_setting, reason_not_offered
from fuchsia_pl.cli.not_offered import NOT_OFFERED
from tests.doubles import TINY

CONFIGS_PAGE = (Path(__file__).parents[3] / "configs/README.md").read_text()
# Names of TRL before 1.0 and of transformers before 5, which are still in use.
OLD_TRL = {"modules_to_save", "torch_dtype", "max_prompt_length", "warmup_ratio", "bf16", "fp16"}


class ParseOnly(FuchsiaCLI):
    """Parses without making objects."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """The error lines for a command line after the tiny config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fuchsia"])
    Path("tiny.yaml").write_text(TINY % "nowhere")

    def run(*words: str) -> list[str]:
        with pytest.raises(SystemExit) as caught:
            ParseOnly(["fit", "--config", "tiny.yaml", *words])
        assert caught.value.code == 2
        *errors, last = capsys.readouterr().err.splitlines()
        assert last == "All keys: fuchsia fit --help-all"
        return [line.removeprefix("error: ") for line in errors]

    return run


def test_all_keys_of_a_file_and_of_the_command_line_are_told_at_once(told):
    Path("mine.yaml").write_text(
        """
        learning_rate: 3.0e-6
        modle: {policy: {name: x}}
        trainer: {max_step: 3, lr: 1.0e-5}
        lora: {r: 8, alpha: 16}
        model:
          policy: {lora: {rr: 3}}
          optimizer: {init_args: {weight_deca: 0.1}}
        data:
          sampling: {num_generations: 4, temprature: 1.0}
          environment: {init_args: {num_item: 3}}
        actor_rollout_ref: {rollout: {n: 4, zzz: 3}, actor: {clip_ratio_high: 0.3}}
        """
    )
    assert told("--config", "mine.yaml", "--data.batch_sise", "3", "--qqq=4") == [
        "unknown key learning_rate in mine.yaml. Here it is model.optimizer.init_args.lr",
        "unknown key modle in mine.yaml. Did you mean 'model'?",
        "unknown key trainer.max_step in mine.yaml. Did you mean 'trainer.max_steps'?",
        "unknown key trainer.lr in mine.yaml. Here it is model.optimizer.init_args.lr",
        "unknown key lora.r in mine.yaml. Here it is model.policy.lora.r",
        "unknown key lora.alpha in mine.yaml. Here it is model.policy.lora.alpha",
        "unknown key model.policy.lora.rr in mine.yaml. Did you mean 'model.policy.lora.r'?",
        "unknown key model.optimizer.init_args.weight_deca in mine.yaml. Did you mean 'model.optimizer.init_args.weight_decay'?",
        "unknown key data.sampling.num_generations in mine.yaml. Here it is data.sampling.group_size",
        "unknown key data.sampling.temprature in mine.yaml. Did you mean 'data.sampling.temperature'?",
        "unknown key data.environment.init_args.num_item in mine.yaml. Did you mean 'data.environment.init_args.num_items'?",
        "unknown key actor_rollout_ref.rollout.n in mine.yaml. Here it is data.sampling.group_size",
        "unknown key actor_rollout_ref.actor.clip_ratio_high in mine.yaml. Here it is model.loss.clip_high",
        "unknown key data.batch_sise. Did you mean 'data.batch_size'?",
        "unknown key qqq",
    ]


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("num_generations", "data.sampling.group_size"),
        ("data.sampling.num_generations", "data.sampling.group_size"),
        ("model.loss.epsilon", "model.loss.clip_low"),
        ("model.optimizer.learning_rate", "model.optimizer.init_args.lr"),
        ("trainer.gradient_checkpointing.enabled", "model.policy.checkpointing.enabled"),
        ("gradient_checkpointing", "model.policy.checkpointing.enabled"),
        (
            "actor_rollout_ref.actor.ppo_mini_batch_size",
            "model.loss.mini_batches (their number: train_batch_size / ppo_mini_batch_size, or steps_per_generation / "
            "gradient_accumulation_steps)",
        ),
        ("data.engine.gpu_memory_utilization", "data.engine.init_args.kv_cache_gb (GiB, no share of the device)"),
        ("shared.rollout.group_size", "data.sampling.group_size"),
    ],
)
def test_names_from_elsewhere_are_answered_with_ours(told, key, ours):
    (line,) = told(f"--{key}", "4")
    assert line.endswith(f". Here it is {ours}")


def test_an_argument_of_the_class_before_the_last_is_no_mistake(told):
    """The engine of the first config has `seconds`; only keys that are unknown in their own place are reported."""
    words = [
        "--data.environment.init_args.num_items",
        "3",
        "--data.environment",
        "fuchsia_pl.library.arithmetic.Arithmetic",
    ]
    assert told(*words, "--data.environment.num_items", "3", "--a", "b") == [
        "unknown key data.environment.init_args.num_items",
        "unknown key a",
    ]


def test_no_foreign_name_has_two_answers():
    for setting in SETTINGS:
        for name in setting.names:
            assert our_setting(name) is setting, name
    for entry in NOT_OFFERED:
        for name in entry.names:
            assert reason_not_offered(name) == entry.reason, name


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("top_p", "The loss is of the distribution that was sampled from"),
        ("actor_rollout_ref.rollout.top_k", "The loss is of the distribution that was sampled from"),
        ("sync_ref_model", "The reference is the model (and adapter) that the run starts from"),
        ("push_to_hub", "Nothing is uploaded"),
        ("server.port", "Servers are started with `fuchsia serve`"),
    ],
)
def test_settings_without_a_counterpart_are_refused_with_the_reason(told, key, reason):
    (line,) = told(f"--{key}", "1")
    assert line.startswith(f"unknown key {key}. {reason}")


def test_the_longest_name_decides():
    """`debug` is of TRL and has no counterpart, `trainer.debug` is of the first Fuchsia and has one."""
    assert our_setting("trainer.debug").key == "console.every_n_steps"
    assert our_setting("debug") is None
    assert reason_not_offered("trainer.debug") is None


def test_every_field_of_trl_has_an_answer():
    """The fields are read from the source, since importing TRL takes long."""
    from transformers import TrainingArguments

    (root,) = importlib.util.find_spec("trl").submodule_search_locations
    tree = ast.parse((Path(root) / "trainer/grpo_config.py").read_text())
    (config,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GRPOConfig"]
    names = {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}
    names |= {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert len(names) > 150
    assert {name for name in names if not our_setting(name) and not reason_not_offered(name)} == set()


@pytest.mark.parametrize(
    "section",
    [
        "model.name model.revision model.dtype model.max_model_len",
        "lora.enabled lora.r lora.alpha lora.target_modules",
        "trainer.loss_type trainer.batch_size trainer.micro_batch_size trainer.grad_accumulation_steps trainer.lr "
        "trainer.weight_decay trainer.beta trainer.epsilon trainer.epsilon_high trainer.num_policy_updates "
        "trainer.use_scheduler trainer.scheduler_type trainer.warmup_steps trainer.device trainer.non_blocking "
        "trainer.async_buffer_fill trainer.single_gpu trainer.lora_path trainer.group_size trainer.log_wandb "
        "trainer.wandb_project trainer.debug trainer.debug_log_dir trainer.log_level",
        "trainer.importance_sampling.enabled trainer.importance_sampling.ratio_type "
        "trainer.importance_sampling.token_mask_low trainer.importance_sampling.geo_mask_high "
        "trainer.importance_sampling.sequence_clip_high trainer.gradient_checkpointing.enabled",
        "server.host server.port server.gpu_memory_utilization server.tensor_parallel_size "
        "server.enable_prefix_caching server.quantization server.buffer_size server.generation_batch_size",
        "server.vllm.n server.vllm.max_tokens server.vllm.temperature server.vllm.top_p server.vllm.logprobs "
        "server.vllm.kv_quantization server.transfer.mode shared.transfer.queue_dir",
        "dataset.name dataset.split dataset.field dataset.max_samples",
        "training.max_iterations training.save_steps training.output_dir training.eval_steps training.max_epochs",
    ],
)
def test_every_key_of_the_first_fuchsia_has_an_answer(section):
    keys = section.split()
    assert [key for key in keys if not our_setting(key) and not reason_not_offered(key)] == []


def test_every_key_of_ours_in_the_table_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fuchsia"])
    Path("tiny.yaml").write_text(TINY % "nowhere")
    colocated = ["--data.engine", "fuchsia_pl.engines.vllm_colocated.VLLMColocatedEngine"]
    words = [word for setting in SETTINGS for word in (f"--{setting.key}", setting.example)]
    config = ParseOnly(["fit", "--config", "tiny.yaml", *colocated, *words]).config["fit"]
    assert config.data.sampling.group_size == 8
    assert config.model.optimizer.init_args.lr == 1e-5
    assert len({setting.key for setting in SETTINGS}) == len(SETTINGS)


def test_the_names_of_trl_are_those_it_has():
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    (root,) = importlib.util.find_spec("trl").submodule_search_locations
    for file in ("trainer/grpo_config.py", "trainer/model_config.py", "scripts/utils.py", "scripts/grpo.py"):
        tree = ast.parse((Path(root) / file).read_text())
        annotated = [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
        names |= {node.target.id for node in annotated if isinstance(node.target, ast.Name)}
    for entry in (*SETTINGS, *NOT_OFFERED):
        assert set(entry.trl) <= names | OLD_TRL


def test_the_page_of_the_configs_has_the_table():
    assert f"<!-- names -->\n{migration_table()}\n<!-- /names -->" in CONFIGS_PAGE
