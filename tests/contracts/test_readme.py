"""The five README pages are correct: commands run, environments train, and links, map, settings and metrics exist."""

import csv
import io
import json
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
from fuchsia_pl.cli.report import report
from fuchsia_pl.cli.run_command import HANDLERS
from fuchsia_pl.cli.runs import runs as list_runs
from fuchsia_pl.cli.serve import serve
from fuchsia_pl.objectives.presets import PRESETS
from tests.contracts.test_structure import ROOT, tracked_files
from tests.doubles import TINY
from tests.reward_models import save_reward_model
from tests.unit.test_serve import StartedError, start_nothing

NAMES = ("README.md", "configs/README.md", "envs/README.md", "fuchsia_pl/README.md", "tests/README.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
TEXT = "\n".join(PAGES.values())
COMMANDS = [line.partition(" #")[0].strip() for line in re.findall(r"^(fuchsia .*)$", TEXT, flags=re.MULTILINE)]
MAKE_TARGETS = re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE) + re.findall(r"`make (\w+)`", TEXT)
QUICKSTART = "fuchsia fit --config quickstart.yaml"
MOST_LINES = 230
FEW_ITEMS = ["--data.environment.init_args.largest", "20"]  # of the quickstart, whose prompts are all checked


def section(page: str, title: str) -> str:
    """The text under a heading of level 2, up to the next one."""
    return PAGES[page].split(f"\n## {title}\n")[1].split("\n## ")[0]


def code_block(page: str, title: str, language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", section(page, title), flags=re.DOTALL)[number]


# Files that a page tells its reader to write: page, section, number of the block in it, maximum number of lines.
FILES = {
    "my_envs.py": ("README.md", "Your own environment", 0, 20),
    "my_task.py": ("README.md", "Your model, your file, your GPU", 0, 8),
    "my_gym.yaml": ("envs/README.md", "reasoning-gym", 0, 25),
    "my_sums.py": ("envs/README.md", "Audit a reward", 0, 25),
    "my_helpful.py": ("envs/README.md", "Reward models", 0, 25),
    "my_games.py": ("envs/README.md", "Conversations", 0, 40),
    "my_server.py": ("envs/README.md", "Tools", 0, 10),
    "my_turns.py": ("envs/README.md", "Rewards for turns", 0, 25),
    "my_tools.py": ("envs/README.md", "Tools", 1, 10),
    "my_agent.py": ("envs/README.md", "Any agent", 0, 25),
    "my_taskset.py": ("envs/README.md", "Tasksets of verifiers", 0, 25),
    "my_module.py": ("configs/README.md", "Objectives", 0, 15),
}


# Configs that a page shows: page, section, number of the block in it.
CONFIGS = {
    "two_tasks.yaml": ("envs/README.md", "Several environments", 0),
    "by_success.yaml": ("envs/README.md", "Items by success", 0),
    "by_level.yaml": ("envs/README.md", "Items by success", 1),
}


def language_of(name: str) -> str:
    return "yaml" if name.endswith(".yaml") else "python"


def write_files(folder: Path) -> None:
    for name, (page, title, number, _) in FILES.items():
        (folder / name).write_text(code_block(page, title, language_of(name), number))
    for name, (page, title, number) in CONFIGS.items():
        (folder / name).write_text(code_block(page, title, "yaml", number))
    rows = [json.dumps({"question": f"How much is {n} times 6?", "answer": str(6 * n)}) for n in range(1, 11)]
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text("\n".join(rows))
    (folder / "prompts.jsonl").write_text('{"prompt": "2 plus 3?"}\n{"prompt": "4 plus 5?", "id": "b"}\n')


def shortened(command: str) -> str:
    """The command with 4 steps in place of ten or more: from five steps on, a run of the tiny model is warned about."""
    return re.sub(r"max_steps \d\d\b", "max_steps 4", command.replace(" 50 ", " 4 "))


class Runs:
    """Runs commands of the pages in one folder, each once: a tiny model, a tiny engine, two steps, four held-out items."""

    def __init__(self, tiny_model: Path) -> None:
        settings = yaml.safe_load(TINY % tiny_model)
        settings["data"]["sampling"]["max_length"] = 4000
        limits = dict.fromkeys(("limit_val_batches", "limit_test_batches", "limit_predict_batches"), 4)
        settings["trainer"] |= {**limits, "max_epochs": -1, "accumulate_grad_batches": 2}
        settings["model"]["policy"]["max_tokens_per_micro_batch"] = None  # of the configs for a GPU
        del settings["data"]["environment"]
        Path("tiny.yaml").write_text(yaml.safe_dump(settings))
        write_files(Path())
        save_reward_model(Path("reward-model"), max_position_embeddings=4000)
        self._folders: dict[str, Path | None] = {}
        assert self.folder(QUICKSTART) == Path("runs/quickstart/0")  # commands continue from its checkpoint
        assert (
            FuchsiaCLI(["fit", "--config", "quickstart.yaml", "--config", "tiny.yaml", *FEW_ITEMS]).run_folder.name
            == "1"
        )

    def folder(self, command: str) -> Path | None:
        """Runs a command unless it has run already; returns its run folder, None for a command without one."""
        if command not in self._folders:
            self._folders[command] = self._run(command)
        return self._folders[command]

    def rows(self, command: str) -> list[dict[str, str]]:
        """The rows of `metrics.csv` that are training steps."""
        with (self.folder(command) / "metrics.csv").open() as stream:
            return [row for row in csv.DictReader(stream) if row["train/loss"]]

    def _run(self, command: str) -> Path | None:
        # With a tokenizer of single characters, prompts are long, and rendering thousands of them takes long.
        command = shortened(command)
        command = re.sub(r"max_length \d+", "max_length 4000", command)
        words = shlex.split(re.sub(r"--model.policy.name \S+", "", command))[1:]
        if (
            "quickstart.yaml" in words
            and "--data.environment" not in command
            and not {"two_tasks.yaml", "overlays/easy_gym.yaml"} & set(words)
        ):
            words += FEW_ITEMS
        if "countdown.yaml" in words or "function_calling.yaml" in words:
            words += ["--data.environment.init_args.num_train", "20"]
        if "reasoning_gym.yaml" in words:
            words += ["--data.environment.init_args.num_items", "20"]
        if words[0] == "check-env":
            assert check_env(words[1:]) == 0
            return None
        if words[0] in OF_A_RUN or "--input" in words:
            self._run_handler(words)
            return None
        if words[0] == "serve":
            of_a_run = "--config" not in words
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("os.execve", start_nothing)
                with pytest.raises(StartedError):
                    serve(words[1:] if of_a_run else [*words[1:], "--config", "tiny.yaml"])
            return None
        last = max(index for index, word in enumerate(words) if word == "--config") + 2
        words = [*words[:last], "--config", "tiny.yaml", *words[last:]]
        if "--print_config" in words:
            with pytest.raises(SystemExit) as caught:
                FuchsiaCLI(words)
            assert caught.value.code == 0
            return None
        return FuchsiaCLI(words).run_folder

    @staticmethod
    def _run_handler(words: list[str]) -> None:
        """Runs a command about a finished run, this machine or a GPU."""
        if words[0] == "doctor":
            words = [*words, "--config", "tiny.yaml", "--data.sampling.max_length", "2000"]  # the tiny model has 2048
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("2 plus 2?\n/base\n"))
            code = {**HANDLERS, "report": report, "runs": list_runs}[words[0]](words[1:])
        assert code == 0


# Commands that take no settings of a run, or take them from a run.
OF_A_RUN = ("report", "eval", "chat", "export", "runs", "doctor", "plan")


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("pages")
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(sys, "argv", ["fuchsia"])
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv(RUN_FOLDER_VARIABLE, raising=False)
        patch.setattr("fuchsia_pl.cli.app.chatter_to", lambda folder: None)
        yield Runs(tiny_model)


def loss_of(overlay: Path) -> dict:
    return yaml.safe_load(overlay.read_text())["model"]["loss"]


# Commands of several ranks start processes; tests/integration/test_several_ranks.py runs them.
@pytest.mark.parametrize("command", [c for c in dict.fromkeys(COMMANDS) if "--trainer.devices" not in c])
def test_every_command_runs(runs, command):
    folder = runs.folder(command)
    verb = command.split()[1]
    if verb == "fit" and folder:
        steps = re.search(r"max_steps (\d+)", shortened(command))
        assert len(runs.rows(command)) == (int(steps[1]) if steps else 2)
    elif verb in ("validate", "test", "predict") and "--input" not in command:
        split = {"validate": "validation"}.get(verb, verb)
        assert (folder / f"rollouts-{split}.jsonl").exists()
    else:
        assert folder is None


@pytest.mark.parametrize("overlay", sorted((ROOT / "configs/algorithms").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_algorithm_has_an_overlay_whose_command_trains(runs, overlay):
    header = [line for line in overlay.read_text().splitlines() if line.startswith("#")]
    (command,) = [line.removeprefix("#").strip() for line in header if "fuchsia fit" in line]
    loss = loss_of(overlay)
    assert loss["loss_type"] == overlay.stem
    short, number = f"{QUICKSTART} --config algorithms/{overlay.stem}.yaml", loss.get("mini_batches", 1)
    if number == 1:
        assert command == short
        assert len(runs.rows(command)) == 2
    else:  # 25 phases, of which one is run here
        assert command == f"{short} --trainer.max_steps {25 * number} --data.steps_per_epoch {25 * number}"
        sizes = ("data.batch_size", "trainer.max_steps", "data.steps_per_epoch")
        assert len(runs.rows(" ".join([short, *(f"--{size} {number}" for size in sizes)]))) == number


def test_there_is_an_overlay_for_every_algorithm():
    assert {file.stem for file in (ROOT / "configs/algorithms").glob("*.yaml")} == set(PRESETS)
    listed = re.findall(r"^\| `(\w+)` \|", section("configs/README.md", "Objectives"), flags=re.MULTILINE)
    assert set(listed) == {"loss_type", *PRESETS}  # the header, and one row per preset


def test_the_mini_batches_of_the_overlays_fit_the_items_of_every_config():
    sizes = [yaml.safe_load(file.read_text())["data"]["batch_size"] for file in (ROOT / "configs").glob("*.yaml")]
    for file in (ROOT / "configs/algorithms").glob("*.yaml"):
        assert [size for size in sizes if size % loss_of(file).get("mini_batches", 1)] == []


def test_no_gap_is_left_to_fill():
    assert "@@" not in TEXT


def test_the_first_page_is_short():
    assert len(PAGES["README.md"].splitlines()) <= MOST_LINES


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*NAMES, ".github/CONTRIBUTING.md"])
def test_every_relative_link_resolves(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    assert links
    for link in links:
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{name} links to {link}"


def test_every_block_of_python_compiles():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) >= len(FILES)
    for block in blocks:
        compile(block, "a page", "exec")


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_short(name):
    page, title, number, most = FILES[name]
    assert (
        len([line for line in code_block(page, title, language_of(name), number).splitlines() if line.strip()]) <= most
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shown_configs_are_short(name):
    page, title, number = CONFIGS[name]
    assert len(code_block(page, title, "yaml", number).splitlines()) <= 25


def test_the_mixture_that_a_page_shows_trains_on_both_of_its_parts(runs):
    (command,) = [command for command in COMMANDS if "two_tasks.yaml" in command]
    rows = runs.rows(command)
    # 5 items a phase and weights 3 to 1: of the first 5 items 4 are sums, of the first 10 eight (7.5, rounded)
    found = [(float(row["sums/rollout/groups"]), float(row["guesses/rollout/groups"])) for row in rows]
    assert found == [(4, 1), (4, 1)]
    assert all(row["guesses/reward/close"] and row["sums/reward/correct"] for row in rows)


def test_the_curriculum_that_a_page_shows_measures_the_items(runs):
    (command,) = [command for command in COMMANDS if "by_success.yaml" in command]
    first, second = (float(row["curriculum/unseen"]) for row in runs.rows(command))
    assert 1.0 == first > second


def test_the_curriculum_by_level_begins_with_the_easiest_items(runs):
    (command,) = [command for command in COMMANDS if "by_level.yaml" in command]
    rows = runs.rows(command)
    assert [float(row[f"curriculum/level_{task}"]) for row in rows for task in ("chain_sum", "letter_counting")] == [
        0.0
    ] * 4
    assert all(row["reward/accuracy_chain_sum"] for row in rows)


@pytest.mark.parametrize(
    ("module", "reward"),
    [
        *(("my_envs", "names_it"), ("my_task", "correct"), ("my_helpful", "reward_model"), ("my_games", "close")),
        ("my_turns", "right"),
        ("my_tools", "correct"),
        ("my_agent", "right"),
    ],
)
def test_the_environments_train(runs, module, reward):
    """With the tiny model and its few characters; `tests/integration/test_environments.py` uses the real one."""
    (command,) = [command for command in COMMANDS if f" {module}." in command and " fit " in command]
    assert len([row for row in runs.rows(command) if row[f"reward/{reward}"]]) == 2


def test_the_taskset_of_verifiers_trains(runs):
    (command,) = [command for command in COMMANDS if " my-taskset " in command and " fit " in command]
    assert len([row for row in runs.rows(command) if row["reward/digits"] and row["reward/reply_chars"]]) == 2


def test_the_command_finds_environments_in_the_current_folder(tmp_path):
    write_files(tmp_path)
    (command,) = [command for command in COMMANDS if "fit" in command and "my_envs" in command]
    words = [str(Path(sys.executable).parent / "fuchsia"), *shlex.split(command)[1:], "--print_config"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["data"]["environment"]["class_path"] == "my_envs.Mention"


def test_the_settings_shown_as_yaml_train(runs):
    Path("shown.yaml").write_text(code_block("configs/README.md", "Settings", "yaml"))
    folder = runs.folder(f"{QUICKSTART} --config shown.yaml")
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["lr_scheduler"]["class"].endswith(
        ".TransformersSchedule"
    )


def dotted(settings: dict, prefix: str = "") -> set[str]:
    """All dotted keys of nested settings, those of sections included."""
    keys = {f"{prefix}{key}" for key in settings}
    nested = [dotted(value, f"{prefix}{key}.") for key, value in settings.items() if isinstance(value, dict)]
    return keys.union(*nested)


def test_every_setting_named_exists(runs, capsys):
    overlays = [
        "--config gsm8k.yaml --config overlays/fsdp.yaml --config overlays/wandb.yaml",
        "--config function_calling.yaml",
        "--config overlays/teacher_prompt.yaml",
    ]
    known: set[str] = set()
    for words in ("", "--config overlays/server.yaml", *overlays):
        with pytest.raises(SystemExit):
            FuchsiaCLI([*shlex.split(f"fit --config quickstart.yaml {words}"), "--print_config"])
        known |= dotted(yaml.safe_load(capsys.readouterr().out))
    sections = {key for key in known if "." not in key}
    # Not the table of other trainers' names, nor file names and functions such as `checkpoint.py` or `data.env()`.
    text = re.sub(r"<!-- names -->.*?<!-- /names -->", "", TEXT, flags=re.DOTALL)
    words = re.findall(r"(?<![\w./-])(?:--)?((?:[a-z_]+)(?:\.[a-z_]+)+)(?![\w.(/])", text)
    named = {word for word in words if word.split(".")[0] in sections and word.rsplit(".", 1)[1] not in SUFFIXES}
    assert len(named) >= 50
    assert named <= known | ALSO_SETTINGS


SUFFIXES = {"py", "yaml", "md", "csv", "jsonl", "html"}
# Settings of DDP by class path, which no config names, and of classes that none of the configs above uses.
ALSO_SETTINGS = {
    "trainer.strategy.timeout",
    "data.environment.init_args.taskset",
    "data.environment.init_args.reward_model",
}


def test_the_make_targets_exist():
    defined = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"quickstart", "test", "setup"} <= set(MAKE_TARGETS) <= defined


def mapped(page: str) -> set[str]:
    return {line.split()[0] for line in code_block(page, "File map", "text").splitlines() if line.strip()}


def test_the_file_map_is_the_tree():
    files = {name for name in tracked_files() if name.startswith(("fuchsia_pl/", "envs/", "configs/"))}
    tree = {name.removesuffix("__init__.py") for name in files if not name.endswith("py.typed")}
    assert mapped("fuchsia_pl/README.md") == tree


def test_the_map_of_the_tests_is_their_folder():
    inside = [name.removeprefix("tests/") for name in tracked_files() if name.startswith("tests/")]
    top = {name.split("/")[0] + "/" * ("/" in name) for name in inside}
    assert mapped("tests/README.md") == {f"tests/{name}" for name in top - {"__init__.py", "README.md"}}


def test_the_benchmark_has_a_place_for_its_tables():
    (page,) = re.findall(r"-m tests\.bench (\S+)", (ROOT / "Makefile").read_text())
    assert re.search(r"<!-- bench -->\n.*<!-- /bench -->", PAGES[page], flags=re.DOTALL)


def test_the_tests_of_the_table_of_faults_exist():
    table = section("tests/README.md", "Fault, outcome, test")
    named = re.findall(r"^\|.*\| `([\w/]+\.py)::(\w+)` \|$", table, flags=re.MULTILINE)
    assert len(named) == len([line for line in table.splitlines() if line.startswith("|")]) - 2
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / file).read_text(), flags=re.MULTILINE), name


def generic(metric: str) -> str:
    """A metric as the table names it. The parts are those of `two_tasks.yaml`."""
    metric = re.sub(r"^(sums|guesses)/rollout/groups$", "<part>/rollout/groups", metric)
    metric = re.sub(r"^(sums|guesses)/.*", "<part>/<metric>", metric)
    metric = re.sub(r"^curriculum/level_.*", "curriculum/level_<kind>", metric)
    return re.sub(r"^count/.*", "count/<name>", re.sub(r"^reward/(?!mean$).*", "reward/<name>", metric))


def test_the_metrics_table_lists_what_is_logged_and_nothing_else(runs):
    metrics = section("fuchsia_pl/README.md", "Metrics")
    listed = set(re.findall(r"^\| `([\w/<>]+)` \|", metrics, flags=re.MULTILINE))
    (with_critic,) = [command for command in COMMANDS if "advantage gae" in command]
    (with_tools,) = [command for command in COMMANDS if " my_tools." in command and " fit " in command]
    with_budget = f"{QUICKSTART} --trainer.accumulate_grad_batches 1 --model.policy.max_tokens_per_micro_batch 8192"
    (with_teacher,) = [command for command in COMMANDS if "teacher_prompt.yaml" in command]
    columns = set()
    shown = [command for command in COMMANDS if any(config in command for config in CONFIGS)]
    for command in (QUICKSTART, with_critic, with_tools, with_budget, with_teacher, *shown):
        columns |= runs.rows(command)[0].keys() - {"epoch", "step"}
    train = {name for name in columns if not name.startswith("validation/")}
    assert columns - train
    assert {generic(name) for name in train} == listed
    assert {generic(name.removeprefix("validation/")) for name in columns - train} <= listed
