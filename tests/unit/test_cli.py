"""The command line, in this process: accepted settings, refused settings and their messages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.finite import FiniteGuard
from fuchsia_pl.callbacks.run_checkpoint import AtomicCheckpointIO
from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.launch import RUN_FOLDER_VARIABLE
from fuchsia_pl.cli.run_folder import CONFIG_FOLDER, find_configs, new_run_folder, run_name
from fuchsia_pl.types import ConfigError
from tests.doubles import TINY


@pytest.fixture
def config(tiny_model, command_folder) -> Path:
    file = command_folder / "tiny.yaml"
    file.write_text(TINY % tiny_model)
    return file


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        FuchsiaCLI(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_run_has_a_folder_with_everything_in_it(config, tmp_path):
    for number in range(2):
        cli = FuchsiaCLI(["fit", "--config", str(config)])
        assert cli.trainer.global_step == 2
        folder = tmp_path / "runs" / "tiny" / str(number)
        assert {f.name for f in folder.iterdir()} >= {
            "config.yaml",
            "metrics.csv",
            "rollouts.jsonl",
            "checkpoints",
            "adapter",
        }
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["seed_everything"] == 3
    assert saved["model"]["loss"]["overlong_buffer"] == 0.2  # defaults are written out
    objective = yaml.safe_load((folder / "objective.yaml").read_text())["model"]["loss"]
    assert (objective["loss_type"], objective["advantage"], objective["clip_high"]) == ("grpo", "group_norm", 0.2)


def test_the_root_folder_is_the_trainers_setting(config, tmp_path):
    FuchsiaCLI(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "elsewhere")])
    assert (tmp_path / "elsewhere" / "tiny" / "0" / "metrics.csv").exists()


def test_the_saved_config_runs_again_under_the_same_name_with_the_same_rollouts(config, tmp_path):
    FuchsiaCLI(["fit", "--config", str(config)])
    FuchsiaCLI(["fit", "--config", str(tmp_path / "runs/tiny/0/config.yaml")])
    first, second = ((tmp_path / f"runs/tiny/{n}/rollouts.jsonl").read_text() for n in (0, 1))
    assert first == second


def test_the_saved_objective_pins_every_part_of_a_preset(config, tmp_path):
    words = ["fit", "--config", str(config), "--model.loss.loss_type", "cispo", "--model.loss.clip_high", "3.0"]
    first = FuchsiaCLI(words)
    saved = str(tmp_path / "runs/tiny/0/objective.yaml")
    second = FuchsiaCLI(["fit", "--config", str(config), "--config", saved])
    assert second.model.loss_config.parts == first.model.loss_config.parts
    assert second.model.loss_config.given["advantage"] == "group_norm"


def test_validate_test_and_predict_run_from_a_checkpoint(config, tmp_path):
    FuchsiaCLI(["fit", "--config", str(config)])
    checkpoint = str(tmp_path / "runs/tiny/0/checkpoints/last.ckpt")
    every = ["--trainer.limit_val_batches", "1.0"]
    validated = FuchsiaCLI(["validate", "--config", str(config), "--ckpt_path", checkpoint, *every])
    tested = FuchsiaCLI(["test", "--config", str(config), "--ckpt_path", checkpoint])
    untrained = FuchsiaCLI(["test", "--config", str(config)])
    metrics = [
        float(cli.trainer.callback_metrics[f"{split}/reward/mean"])
        for cli, split in [(validated, "validation"), (tested, "test"), (untrained, "test")]
    ]
    assert metrics[0] == metrics[1] != metrics[2]
    held_out = [
        json.loads(line)
        for line in (tmp_path / "runs/tiny/validate-1/rollouts-validation.jsonl").read_text().splitlines()
    ]
    assert {(line["step"], line["policy_version"]) for line in held_out} == {(2, 2)}
    FuchsiaCLI(["predict", "--config", str(config), "--ckpt_path", checkpoint])
    assert len((tmp_path / "runs/tiny/predict-1/rollouts-predict.jsonl").read_text().splitlines()) == 4


def test_several_configs_merge_from_left_to_right(config, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {batch_size: 3}\nmodel: {loss: {beta: 0.5}}\n")
    cli = FuchsiaCLI(["fit", "--config", str(config), "--config", str(overlay), "--model.loss.beta", "0.25"])
    assert cli.datamodule.batch_size == 3
    assert cli.model.loss_config.beta == 0.25
    assert cli.run_folder.parent.name == "tiny"


def test_what_two_parts_share_is_given_once(config):
    cli = FuchsiaCLI(["fit", "--config", str(config), "--model.policy.lora.r", "2", "--seed_everything", "11"])
    assert cli.datamodule.served_model == cli.model.learner.served_model
    assert cli.datamodule.engine.spec.model.lora_rank == 2
    assert cli.datamodule.engine.spec.max_length == cli.datamodule.sampling.max_length == 40
    assert cli.datamodule.seed == 11


def test_a_model_is_looked_for_only_when_every_setting_was_accepted(config, capsys, monkeypatch):
    monkeypatch.setattr("fuchsia_pl.module.resolve_model", lambda name: pytest.fail("looked for a model"))
    for setting in (
        "data.sampling.group_size",
        "data.batch_size",
        "adapter_sync.tolerance",
        "checkpoint.every_n_steps",
    ):
        assert "got 0" in refused(capsys, "fit", "--config", str(config), f"--{setting}", "0")


def test_the_trainers_own_switches_leave_the_commands_callbacks_out(config):
    cli = FuchsiaCLI(
        [
            "fit",
            "--config",
            str(config),
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.enable_checkpointing",
            "false",
            "--trainer.callbacks",
            "lightning.pytorch.callbacks.EarlyStopping",
            "--trainer.callbacks.monitor",
            "train/loss",
        ]
    )
    first, second, *_ = cli.trainer.callbacks
    # Numbers that are not finite are found before any other callback writes them.
    assert (type(first), type(second)) == (FiniteGuard, EarlyStopping)
    assert not list(cli.run_folder.glob("checkpoints/*"))
    assert cli.trainer.progress_bar_callback is None


def test_a_callback_of_the_config_replaces_the_default_of_its_class(config, capsys):
    own = [
        "--trainer.callbacks",
        "fuchsia_pl.callbacks.adapter_sync.AdapterSync",
        "--trainer.callbacks.tolerance",
        "0.5",
    ]
    words = ["fit", "--config", str(config), *own]
    cli = FuchsiaCLI(words)
    assert [c.tolerance for c in cli.trainer.callbacks if isinstance(c, AdapterSync)] == [0.5]
    # Settings of the section would have no effect.
    printed = refused(capsys, *words, "--adapter_sync.tolerance", "0.3")
    assert "adapter_sync has settings, and trainer.callbacks has AdapterSync, which replaces that callback" in printed


def test_checkpoints_are_written_in_place_unless_the_trainer_has_a_writer_of_its_own(config):
    words = ["fit", "--config", str(config)]
    assert type(FuchsiaCLI(words).trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    plugin = ["--trainer.plugins", "lightning.fabric.plugins.io.TorchCheckpointIO"]
    assert type(FuchsiaCLI([*words, *plugin]).trainer.strategy.checkpoint_io) is TorchCheckpointIO
    own = [
        "--trainer.strategy",
        "lightning.pytorch.strategies.SingleDeviceStrategy",
        "--trainer.strategy.device",
        "cpu",
    ]
    own += ["--trainer.strategy.checkpoint_io", "lightning.fabric.plugins.io.TorchCheckpointIO"]
    assert type(FuchsiaCLI([*words, *own]).trainer.strategy.checkpoint_io) is TorchCheckpointIO


def test_taking_turns_trains_the_same_and_checkpoints_are_written_from_the_host(config, tmp_path):
    words = ["fit", "--config", str(config), "--trainer.limit_val_batches", "1.0", "--trainer.max_epochs", "-1"]
    words += ["--checkpoint.every_n_steps", "1"]
    straight = FuchsiaCLI(words)
    turns = [*words, "--hotswap.enabled", "true"]
    FuchsiaCLI([*turns, "--trainer.max_steps", "1"])
    resumed = FuchsiaCLI([*turns, "--ckpt_path", str(tmp_path / "runs/tiny/1/checkpoints/last.ckpt")])
    assert resumed.trainer.global_step == 2
    assert {kind for kind, _ in resumed.datamodule.engine.calls} == {"sleep", "wake", "load", "generate"}
    adapters = [load_file(tmp_path / f"runs/tiny/{run}/adapter/adapter_model.safetensors") for run in (0, 2)]
    assert all(adapters[0][name].equal(adapters[1][name]) for name in adapters[0])
    callbacks = [type(callback).__name__ for callback in straight.trainer.callbacks]
    assert callbacks.index("Preflight") < callbacks.index("HotSwap") < callbacks.index("AdapterSync")


def test_print_config_shows_a_config_that_can_be_used(config, capsys):
    with pytest.raises(SystemExit) as caught:
        FuchsiaCLI(["fit", "--config", str(config), "--print_config"])
    assert caught.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["batch_size"] == 5
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.polcy.name", "x"], ["model.polcy.name", "Did you mean 'model.policy.name'?"]),
        (["--trainer.max_step", "3"], ["trainer.max_step", "Did you mean 'trainer.max_steps'?"]),
        (["--data.sampling.group_sise", "3"], ["Did you mean 'data.sampling.group_size'?"]),
        (["--data.environment.init_args.num_item", "3"], ["num_item. Did you mean", "init_args.num_items'"]),
        (["--data.sampling.group_size", "1"], ["group_size must be 2 or more, got 1"]),
        (
            ["--model.policy.lora.use_dora", "true"],
            ["unknown key model.policy.lora.use_dora", "vLLM cannot serve DoRA"],
        ),
        (
            ["--model.policy.lora.modules_to_save", "[norm]"],
            ["modules_to_save. vLLM cannot serve adapters that replace"],
        ),
        (["--data.sampling.top_p", "0.9"], ["unknown key data.sampling.top_p. The loss is of the distribution"]),
        (
            ["--data.sampling.top_k", "50"],
            ["top_k. The loss is of the distribution", "data.sampling.temperature instead"],
        ),
        (["--data.sampling.min_p", "0.1"], ["min_p. The loss is of the distribution"]),
        (["--model.policy.lora.target_modules", "[lm_head]"], ["vLLM cannot serve"]),
        (
            ["--model.policy.lora.target_modules", "[q_proj, nope]"],
            ["'nope' matches no layer", "k_proj, lm_head, o_proj"],
        ),
        (["--model.policy.name", "./nowhere"], ["the model './nowhere' does not exist"]),
        (["--model.policy.name", "no_tokenizer"], ["no_tokenizer has no tokenizer that can be loaded"]),
        (["--model.policy.name", "cut_off"], ["the weights in cut_off/model.safetensors cannot be read"]),
        (["--model.policy.name", "broken.gguf"], ["the GGUF file broken.gguf cannot be read"]),
        (["--model.optimizer.lr", "-1"], ["AdamW does not take its settings: Invalid learning rate: -1"]),
        (["--model.lr_scheduler", "LinearLR", "--model.lr_scheduler.start_factor", "7"], ["LinearLR does not take"]),
        (["--trainer.max_epochs", "-5"], ["the trainer does not take its settings: `max_epochs` must be"]),
        (["--trainer.strategy", "nonesuch"], ["the trainer does not take its settings: ", "nonesuch"]),
        (
            ["--trainer.logger", "lightning.pytorch.loggers.MLFlowLogger"],
            ["MLFlowLogger needs a package that is not installed", "pip install mlflow"],
        ),
        (["--trainer.default_root_dir", "tiny.yaml"], ["trainer.default_root_dir='tiny.yaml'", "(Not a directory)"]),
        (["--trainer.default_root_dir", "/proc/no"], ["trainer.default_root_dir='/proc/no'", "(No such file or dir"]),
        (["--model.policy.quantization", "nf4"], ['quantization="nf4" needs a CUDA device, and torch finds none']),
        (["--model.loss.reduction", "sum"], ["model.loss.reduction", "token_mean"]),
        (["--seed_everything", "true"], ["seed_everything must be a number, got True"]),
        (["--data.environment.class_path", "fuchsia_pl.library.arithmetic.Arithmetik"], ["Arithmetik"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_are_told_in_one_line_with_what_to_do(config, capsys, tiny_model, arguments, words):
    shutil.copytree(tiny_model, "no_tokenizer", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    shutil.copytree(tiny_model, "cut_off")
    os.truncate("cut_off/model.safetensors", 1000)
    Path("broken.gguf").write_bytes(b"GGUF and no more")
    printed = refused(capsys, "fit", "--config", str(config), *arguments)
    for word in words:
        assert word in printed
    assert "Traceback" not in printed
    first, *rest = printed.splitlines()
    assert first.startswith("error: ")
    assert rest == (["All keys: fuchsia fit --help-all"] if "unknown key" in first else [])
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.batch_size", "100"], "fewer than data.batch_size=100"),
        (["--model.policy.max_tokens_per_micro_batch", "3"], "max_tokens_per_micro_batch"),
        (["--hotswap.enabled", "true", "--data.sampling.max_staleness", "1"], "hotswap.enabled is true, but"),
        (["--trainer.precision", "bf16-true"], "the trained weights would not be float32"),
        (["--trainer.precision", "64-true"], "no engine samples in it"),
        (["--trainer.limit_val_batches", "0.1"], "takes 0 of 4 held-out items"),
        (["--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau"], "has no `monitor`"),
        (["--trainer.logger", "false", "--trainer.callbacks+=LearningRateMonitor"], "Cannot use `LearningRateMonitor`"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_mistakes_that_only_the_data_or_the_model_shows_are_told_in_the_same_way(config, capsys, arguments, words):
    printed = refused(capsys, "fit", "--config", str(config), *arguments)
    assert words in printed
    assert "Traceback" not in printed
    assert "All keys" not in printed
    assert not Path("runs").exists()


def test_a_required_key_that_is_missing_comes_with_the_command_that_lists_all(config, capsys):
    printed = refused(capsys, "fit", "--data.environment", "tests.doubles.TinyEnvironment")
    assert "the following arguments are required: fit.model.policy" in printed
    assert printed.splitlines()[-1] == "All keys: fuchsia --help"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("model: {policy: {nam: x}}", "Did you mean 'model.policy.name'?"),
        ("modle: {policy: {name: x}}", "modle"),
        ("data: {sampling: {temprature: 1.0}}", "Did you mean 'data.sampling.temperature'?"),
    ],
)
def test_unknown_keys_in_a_file_are_told_with_the_nearest_right_one(config, capsys, tmp_path, text, word):
    (tmp_path / "bad.yaml").write_text(text)
    printed = refused(capsys, "fit", "--config", str(config), "--config", "bad.yaml")
    assert word in printed


def test_a_missing_config_is_told_with_those_that_exist(config, capsys):
    assert "'quikstart.yaml' is no file; the packaged configs are:" in refused(
        capsys, "fit", "--config", "quikstart.yaml"
    )
    assert "quickstart.yaml" in refused(capsys, "fit", "--config=quikstart.yaml")


def test_a_packaged_config_is_no_second_file_in_a_checkout(monkeypatch, caplog):
    """There `./configs` is the packaged folder itself."""
    monkeypatch.chdir(Path(__file__).parents[2])
    assert find_configs(["fit", "--config", "quickstart.yaml"])[-1] == str(CONFIG_FOLDER / "quickstart.yaml")
    assert not caplog.messages


def test_configs_are_found_by_name_from_anywhere(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    packaged = str(CONFIG_FOLDER / "quickstart.yaml")
    assert find_configs(["fit", "--config", "quickstart.yaml", "-c=quickstart"]) == [
        "fit",
        "--config",
        packaged,
        f"-c={packaged}",
    ]
    Path("configs/mine").mkdir(parents=True)
    for name in ("mine/own.yaml", "other.yaml"):
        (Path("configs") / name).touch()
    found = find_configs(["fit", "--config", "mine/own", "-c", "other.yaml", "--config=other"])
    assert found == [
        "fit",
        "--config",
        "configs/mine/own.yaml",
        "-c",
        "configs/other.yaml",
        "--config=configs/other.yaml",
    ]
    with pytest.raises(
        ConfigError, match=r"those in \./configs are: mine/own.yaml, other.yaml; the packaged configs are: "
    ):
        find_configs(["fit", "--config", "neither"])
    Path("configs/quickstart.yaml").touch()
    assert not caplog.messages
    assert find_configs(["fit", "--config", "quickstart.yaml"])[2] == packaged
    assert caplog.messages == [
        "--config quickstart.yaml is the packaged config; for your own, write --config configs/quickstart.yaml"
    ]
    assert find_configs(["fit", "--config=configs/quickstart.yaml"])[1] == "--config=configs/quickstart.yaml"
    Path("quickstart.yaml").touch()
    assert find_configs(["fit", "--config", "quickstart.yaml"]) == ["fit", "--config", "quickstart.yaml"]


def test_run_names_and_numbers(tmp_path, monkeypatch):
    monkeypatch.delenv(RUN_FOLDER_VARIABLE, raising=False)
    assert run_name(["fit", "-c", "a/b.yaml"]) == "b"
    assert [new_run_folder(tmp_path, "b").name for _ in range(3)] == ["0", "1", "2"]
    (tmp_path / "b" / "7").mkdir()
    assert new_run_folder(tmp_path, "b").name == "8"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert new_run_folder(tmp_path, "b") == tmp_path / "b" / "8"  # the folder of the parent rank


def test_what_libraries_say_goes_to_a_file(tmp_path):
    code = (
        "import logging, warnings; from pathlib import Path; from fuchsia_pl.cli.chatter import *;"
        "import lightning.pytorch, transformers; show_warnings();"
        "logging.getLogger('lightning.fabric.x').info('Seed set to 0');"  # before there is a run folder
        "chatter_to(Path('.')); warnings.warn('careful');"
        "logging.getLogger('lightning.pytorch.x').warning('loud'); logging.getLogger('transformers').warning('also');"
        "log = logging.getLogger; log('transformers.x').error('broken'); log('fuchsia_pl.a').info('quiet');"
        "names = 'fuchsia_pl.a', 'fuchsia_pl.library.b', 'my_envs', 'fuchsia_pl.a';"
        "from lightning.pytorch.profilers import SimpleProfiler; p = SimpleProfiler(); p.start('a'); p.stop('a'); p.describe();"
        "[log(name).warning('two\\nlines of %s', name) for name in names]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    # A user who sets trainer.profiler wants to see its table.
    assert done.stdout.startswith("Profiler Report")
    assert "Percentage %" in done.stdout
    # Warnings of this package and of an environment's author, once and in one line; of libraries, only errors.
    ours = [f"warning: two lines of {name}" for name in ("fuchsia_pl.a", "fuchsia_pl.library.b", "my_envs")]
    assert done.stderr.splitlines() == ["error: broken", *ours]
    logged = (tmp_path / "run.log").read_text()
    assert all(
        word in logged for word in ("careful", "loud", "also", "broken", "lines of fuchsia_pl.a", "Profiler Report")
    )


def test_weights_and_biases_runs_offline_beside_the_csv_log(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = f"{{offline: true, save_dir: {tmp_path}}}"
    logger = f"{{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {settings}}}"
    FuchsiaCLI(["fit", "--config", str(config), "--trainer.logger", logger])
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert (tmp_path / "runs/tiny/0/metrics.csv").exists()


def test_tensorboard_runs_beside_the_csv_log(config, tmp_path):
    logger = f"{{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {{save_dir: {tmp_path}}}}}"
    FuchsiaCLI(["fit", "--config", str(config), "--trainer.logger", logger])
    assert list((tmp_path / "lightning_logs").glob("version_0/events*"))


def test_a_trial_run_trains_one_step_and_leaves_no_weights(config, tmp_path):
    cli = FuchsiaCLI(["fit", "--config", str(config), "--trainer.fast_dev_run", "1", "--trainer.profiler", "simple"])
    assert cli.trainer.global_step == 1
    assert "validation/reward/mean" in cli.trainer.callback_metrics
    assert {file.name for file in (tmp_path / "runs/tiny/0").iterdir()}.isdisjoint({"adapter", "checkpoints"})
    assert "run_training_epoch" in cli.trainer.profiler.recorded_durations


def test_the_logger_can_be_switched_off(config):
    cli = FuchsiaCLI(["fit", "--config", str(config), "--trainer.logger", "false"])
    assert not [logger for logger in cli.trainer.loggers if isinstance(logger, CSVLogger)]
    assert isinstance(cli.trainer, Trainer)


def test_nothing_heavy_is_imported_before_it_is_chosen():
    code = "import sys, {}; print([m for m in ('wandb', 'vllm', 'peft', 'fastmcp') if m in sys.modules])"
    for module, expected in {"fuchsia_pl": "[]", "fuchsia_pl.cli": "[]", "fuchsia_pl.cli.app": "['peft']"}.items():
        out = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == expected


def test_the_package_is_a_command():
    out = subprocess.run([sys.executable, "-m", "fuchsia_pl", "--help"], capture_output=True, text=True)
    assert out.returncode == 0
    assert out.stdout.startswith("usage: fuchsia COMMAND")
