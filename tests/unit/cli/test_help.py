"""Help, version and completion: complete, short, and without torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

import fuchsia_pl
from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.commands import COMMANDS, RUN_COMMANDS, overview
from fuchsia_pl.cli.completion import bash_completion
from fuchsia_pl.cli.help_page import help_page, packaged_table
from fuchsia_pl.cli.run_folder import CONFIG_FOLDER
from fuchsia_pl.cli.settings_table import default_table, print_help
from fuchsia_pl.cli.unknown_keys import keys_of
from tests.doubles import TINY

HEAVY = ("torch", "lightning", "transformers", "vllm", "jsonargparse", "datasets", "peft")
# Runs a command line and writes the heavy modules that it imported to stderr.
PROBE = f"""
import sys
from fuchsia_pl.cli import main
try:
    main()
finally:
    sys.stderr.write(" ".join(name for name in {HEAVY} if name in sys.modules))
"""
VLLM = "fuchsia_pl.engines.vllm_colocated.VLLMColocatedEngine"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ("--help", "usage: fuchsia COMMAND"),
        ("-h", "usage: fuchsia COMMAND"),
        ("--version", f"fuchsia {fuchsia_pl.__version__}\n"),
        ("fit --help", "usage: fuchsia fit "),
        ("fit --help --debug", "usage: fuchsia fit "),
        ("validate -h", "usage: fuchsia validate "),
        ("test --help", "usage: fuchsia test "),
        ("predict --help-all", "usage: fuchsia predict "),
        ("check-env --help", "usage: fuchsia check-env "),
        ("serve --port 1 --help", "usage: fuchsia serve "),
        ("replay --help", "usage: fuchsia replay "),
        ("runs --help", "usage: fuchsia runs "),
        ("runs diff --help", "usage: fuchsia runs diff "),
        ("plan --config x.yaml --help", "usage: fuchsia plan "),
        ("doctor --config x.yaml --help", "usage: fuchsia doctor "),
        ("completion --help", "usage: fuchsia completion "),
        ("completion bash", "# bash completion of fuchsia"),
    ],
)
def test_help_version_and_completion_need_no_torch(words, start):
    done = run(*words.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(start)


def test_an_unknown_command_is_an_error_without_torch():
    done = run("fti", "--config", "quickstart.yaml")
    assert done.returncode == 2
    assert done.stderr == "error: unknown command 'fti'. Did you mean 'fit'?\nAll commands: fuchsia --help\n"
    done = run()
    assert (done.returncode, done.stderr) == (2, overview())


def test_the_overview_fits_one_screen_and_names_every_command():
    lines = overview().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    named = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("  --")]
    assert named == [
        "fit",
        "validate",
        "test",
        "predict",
        "eval",
        "report",
        "chat",
        "export",
        "serve",
        "runs",
        "check-env",
        "plan",
        "doctor",
        "replay",
        "completion",
    ]
    assert set(LightningCLI.subcommands()) == set(RUN_COMMANDS)


def test_the_packaged_settings_are_those_of_the_parser():
    """If this fails, run `python -m fuchsia_pl.cli.settings_table`."""
    assert packaged_table() == default_table()


def test_the_table_has_every_setting_of_the_parser_once():
    class Parsers(FuchsiaCLI):
        def __init__(self) -> None:
            self.parsers = {}
            super().__init__([])

        def parse_arguments(self, parser, args):
            self.config = {"subcommand": None}
            self.parsers = {name: self._parser(name) for name in RUN_COMMANDS}

        def _set_seed(self) -> None: ...

        def before_instantiate_classes(self) -> None: ...

        def instantiate_classes(self) -> None: ...

        def _run_subcommand(self, subcommand) -> None: ...

    groups = {"trainer", "model", "data", "model.policy", "model.loss", "data.sampling"}
    for command, parser in Parsers().parsers.items():
        keys = [s.key for group in packaged_table().groups for s in group.settings if s.command in ("", command)]
        assert len(keys) == len(set(keys))
        parsed = {key for key in keys_of(parser) if not any(other.startswith(f"{key}.") for other in keys_of(parser))}
        linked = {"data.learner", "data.seed"}
        assert parsed - linked - groups - set(keys) == set()


def test_help_shows_the_most_used_settings_first_and_hides_the_rest_of_lightning():
    page = help_page("fit", packaged_table(), with_all=False)
    titles = [line for line in page.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        "run:",
        "environment (Environment):",
        "rollouts:",
        "model and adapter:",
        "optimizer (AdamW):",
        "objective:",
        "engine (VLLMColocatedEngine):",
        "checkpoints, weights, memory and logs:",
    ]
    assert "  --data.engine.init_args.kv_cache_gb NUMBER|auto (auto)\n      Memory for keys and values" in page
    assert "  --data.batch_size INT (8)\n" in page
    assert "  --model.policy.name TEXT (required)\n" in page
    assert page.index("--data.sampling.group_size") < page.index("--data.sampling.long_prompts")
    rare = ["--trainer.benchmark", "--model.optimizer.init_args.amsgrad", "--weights_only", "--trainer.num_nodes"]
    assert not [key for key in rare if key in page]
    whole = help_page("fit", packaged_table(), with_all=True)
    assert not [key for key in rare if key not in whole]
    assert "--verbose" not in whole
    assert "--verbose" in help_page("validate", packaged_table(), with_all=True)
    assert max(map(len, page.splitlines())) <= 130


def test_help_with_a_config_shows_its_classes_and_values(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY % "nowhere")
    print_help(["fit", "--config", "tiny.yaml", "--data.engine", VLLM, "--data.batch_size", "5", "--help"])
    page = capsys.readouterr().out
    assert "environment (TinyEnvironment):" in page
    assert "--data.engine.init_args.kv_cache_gb NUMBER|auto (auto)" in page
    assert "--data.batch_size INT (config: 5; default: 8)" in page
    assert "--model.policy.name TEXT (config: nowhere; required)" in page
    assert "init_args.dataset" not in page, "which every environment has, and this one does not take"
    assert not list(tmp_path.glob("runs"))


def test_help_for_one_class_needs_no_config(capsys):
    print_help(["fit", "--data.engine", "fuchsia_pl.engines.vllm_server.VLLMServerEngine", "--help"])
    page = capsys.readouterr().out
    assert "engine (VLLMServerEngine):" in page
    assert "--data.engine.init_args.urls [TEXT,...] (required)" in page
    assert "kv_cache_gb" not in page


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fuchsia", "f"], ["fit"]),
        (["fuchsia", ""], [*COMMANDS, "--help", "--version"]),
        (["fuchsia", "fit", "--data.sampling.g"], ["--data.sampling.group_size"]),
        (["fuchsia", "fit", "--data.engine.init_args.kv"], ["--data.engine.init_args.kv_cache_gb"]),
        (["fuchsia", "fit", "--config", "quick"], ["quickstart.yaml"]),
        (["fuchsia", "fit", "--config", "=", "quick"], ["quickstart.yaml"]),
        (["fuchsia", "fit", "--config", "my"], ["my.yaml"]),
        (["fuchsia", "serve", "--po"], ["--port"]),
        (["fuchsia", "check-env", "--num"], ["--num-items"]),
        (["fuchsia", "replay", "my"], ["my.yaml"]),
        (["fuchsia", "completion", ""], ["bash"]),
        (["fuchsia", "fit", "--verb"], []),
        (["fuchsia", "validate", "--verb"], ["--verbose"]),
    ],
)
def test_bash_completes(tmp_path, words, expected):
    (tmp_path / "my.yaml").touch()
    (tmp_path / "fuchsia.bash").write_text(bash_completion(packaged_table()))
    listed = " ".join(f"'{word}'" for word in words)
    script = (
        "source fuchsia.bash; complete -p fuchsia >/dev/null || exit 1; "
        f"COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _fuchsia; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "--norc", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout.split(), done.stderr) == (expected, "")


def test_completion_offers_the_packaged_configs():
    assert set(packaged_table().configs) == {str(f.relative_to(CONFIG_FOLDER)) for f in CONFIG_FOLDER.rglob("*.yaml")}
