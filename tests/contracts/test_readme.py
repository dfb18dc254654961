"""The README keeps its word: its commands run, its environment trains, its map and its metrics are those of the tree."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.check_env import check_env
from fuchsia_pl.cli.launch import RUN_FOLDER_VARIABLE
from fuchsia_pl.cli.serve import serve
from fuchsia_pl.objectives.presets import PRESETS
from tests.contracts.test_structure import ROOT, tracked_files
from tests.unit.test_cli import TINY
from tests.unit.test_serve import StartedError, start_nothing

README = (ROOT / "README.md").read_text()
SECTIONS = {section.split("\n")[0]: section for section in README.split("\n## ")}
COMMANDS = re.findall(r"^(fuchsia .*)$", README, flags=re.MULTILINE)
MAKE_TARGETS = re.findall(r"^make (\w+)", README, flags=re.MULTILINE) + re.findall(r"`make (\w+)`", README)


def code_block(section: str, language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], flags=re.DOTALL)[number]


# The files that the README has its reader write: section, number of the block in it, most lines it may have.
FILES = {
    "my_envs.py": ("Write your own environment", 0, 20),
    "my_games.py": ("Conversations", 0, 40),
    "my_server.py": ("Tools", 0, 10),
    "my_tools.py": ("Tools", 1, 10),
}


def write_files(folder: Path) -> None:
    for name, (section, number, _) in FILES.items():
        (folder / name).write_text(code_block(section, "python", number))


@pytest.fixture
def tiny_config(tiny_model, tmp_path, monkeypatch) -> Path:
    """The overrides that make a command of the README run in a second: a tiny model, a tiny engine, two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fuchsia"])
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv(RUN_FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr("fuchsia_pl.cli.app.chatter_to", lambda folder: None)
    settings = yaml.safe_load(TINY % tiny_model)
    settings["data"]["sampling"]["max_length"] = 4000
    settings["trainer"] |= {"limit_val_batches": 1.0, "max_epochs": -1}
    del settings["data"]["environment"]
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def run(command: str, tiny_config: Path) -> None:
    """Runs a command of the README with the tiny overrides after its own configs."""
    # A tokenizer with a token for each character needs room, and to render thousands of items with it takes long.
    words = shlex.split(re.sub(r"max_length \d+", "max_length 4000", command))[1:]
    if "countdown.yaml" in words or "function_calling.yaml" in words:
        words += ["--data.environment.init_args.num_train", "20"]
    if words[0] == "check-env":
        assert check_env(words[1:]) == 0
        return
    if words[0] == "serve":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.execve", start_nothing)
            with pytest.raises(StartedError):
                serve([*words[1:], "--config", str(tiny_config)])
        return
    last = max(index for index, word in enumerate(words) if word == "--config") + 2
    FuchsiaCLI([*words[:last], "--config", str(tiny_config), *words[last:]])


def test_every_command_under_use_runs(tiny_config):
    # Commands of several ranks start processes; tests/integration/test_several_ranks.py runs them.
    listed = [c for c in COMMANDS if "class_path my_" not in c and "--trainer.devices" not in c]
    assert len(listed) >= 12
    for command in listed:
        if "--print_config" in command:
            with pytest.raises(SystemExit) as caught:
                run(command, tiny_config)
            assert caught.value.code == 0
        else:
            run(command, tiny_config)
    for number, steps in enumerate([2, 3, 50]):
        with Path(f"runs/quickstart/{number}/metrics.csv").open() as stream:
            assert len([row for row in csv.DictReader(stream) if row["train/loss"]]) == steps
    for number, split in {3: "validation", 4: "test", 5: "predict"}.items():
        assert Path(f"runs/quickstart/{number}/rollouts-{split}.jsonl").exists()


@pytest.mark.parametrize("overlay", sorted((ROOT / "configs/algorithms").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_algorithm_has_an_overlay_whose_command_trains(tiny_config, overlay):
    header = [line for line in overlay.read_text().splitlines() if line.startswith("#")]
    (command,) = [line.removeprefix("#").strip() for line in header if "fuchsia fit" in line]
    assert command == f"fuchsia fit --config quickstart.yaml --config algorithms/{overlay.stem}.yaml"
    assert yaml.safe_load(overlay.read_text())["model"]["loss"]["loss_type"] == overlay.stem
    run(command, tiny_config)
    with Path("runs/quickstart/0/metrics.csv").open() as stream:
        assert len([row for row in csv.DictReader(stream) if row["train/loss"]]) == 2


def test_there_is_an_overlay_for_every_algorithm():
    assert {file.stem for file in (ROOT / "configs/algorithms").glob("*.yaml")} == set(PRESETS)


def test_the_updates_of_the_overlays_fit_the_steps_of_the_quickstart():
    steps = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())["data"]["steps_per_epoch"]
    for file in (ROOT / "configs/algorithms").glob("*.yaml"):
        assert steps % yaml.safe_load(file.read_text())["model"]["loss"].get("num_policy_updates", 1) == 0


def test_no_gap_is_left_to_fill():
    assert "@@" not in README


@pytest.mark.parametrize("name", FILES)
def test_the_environments_are_short(name):
    section, number, most = FILES[name]
    assert len([line for line in code_block(section, "python", number).splitlines() if line.strip()]) <= most


@pytest.mark.parametrize(
    ("module", "reward"), [("my_envs", "names_it"), ("my_games", "close"), ("my_tools", "correct")]
)
def test_the_environments_are_checked_and_train(tiny_config, monkeypatch, module, reward):
    """With the tiny model, which knows hardly a letter; `tests/integration/test_environments.py` has the real one."""
    write_files(Path())
    monkeypatch.syspath_prepend(".")
    for command in [command for command in COMMANDS if f"class_path {module}" in command]:
        run(command, tiny_config)
    with Path("runs/quickstart/0/metrics.csv").open() as stream:
        assert len([row for row in csv.DictReader(stream) if row[f"reward/{reward}"]]) == 2


def test_the_command_finds_environments_in_the_current_folder(tmp_path):
    write_files(tmp_path)
    (command,) = [command for command in COMMANDS if "fit" in command and "my_envs" in command]
    words = [str(Path(sys.executable).parent / "fuchsia"), *shlex.split(command)[1:], "--print_config"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["data"]["environment"]["class_path"] == "my_envs.Mention"


def test_the_settings_that_it_shows_train(tiny_config):
    file = Path("shown.yaml")
    file.write_text(code_block("Use", "yaml"))
    run(f"fuchsia fit --config quickstart.yaml --config {file}", tiny_config)
    with Path("runs/quickstart/0/hparams.yaml").open() as stream:
        assert yaml.safe_load(stream)["lr_scheduler"] == "TransformersSchedule"


def test_the_make_targets_exist():
    defined = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"quickstart", "test", "setup"} <= set(MAKE_TARGETS) <= defined


def test_the_file_map_is_the_tree():
    mapped = {line.split()[0] for line in code_block("File map", "text").splitlines() if line.strip()}
    files = {name for name in tracked_files() if name.startswith(("fuchsia_pl/", "envs/", "configs/"))}
    tree = {name.removesuffix("__init__.py") for name in files if not name.endswith("py.typed")}
    assert {name for name in mapped if not name.startswith("tests/")} == tree
    assert all((ROOT / name).exists() for name in mapped)


def test_the_tests_of_the_table_of_faults_exist():
    table = (ROOT / "tests/README.md").read_text()
    named = re.findall(r"^\|.*\| `([\w/]+\.py)::(\w+)` \|$", table, flags=re.MULTILINE)
    assert len(named) == len([line for line in table.splitlines() if line.startswith("|")]) - 2
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / file).read_text(), flags=re.MULTILINE), name


def generic(metric: str) -> str:
    return re.sub(r"^count/.*", "count/<name>", re.sub(r"^reward/(?!mean$).*", "reward/<name>", metric))


def test_the_metrics_table_lists_what_is_logged_and_nothing_else(tiny_config, monkeypatch):
    listed = set(re.findall(r"^\| `([\w/<>]+)` \|", SECTIONS["Metrics"], flags=re.MULTILINE))
    (with_critic,) = [command for command in COMMANDS if "advantage gae" in command]
    columns = set()
    (with_tools,) = [command for command in COMMANDS if "class_path my_tools" in command]
    write_files(Path())
    monkeypatch.syspath_prepend(".")
    for number, command in enumerate(["fuchsia fit --config quickstart.yaml", with_critic, with_tools]):
        run(command, tiny_config)
        with Path(f"runs/quickstart/{number}/metrics.csv").open() as stream:
            columns |= set(next(csv.reader(stream))) - {"epoch", "step"}
    train = {name for name in columns if not name.startswith("validation/")}
    assert columns - train
    assert {generic(name) for name in train} == listed
    assert {generic(name.removeprefix("validation/")) for name in columns - train} <= listed
