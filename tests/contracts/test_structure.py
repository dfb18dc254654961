"""The structure of the project: allowed imports, lengths of files, and headers of files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.class_change import fresh_arguments
from fuchsia_pl.cli.run_folder import CONFIG_FOLDER

ROOT = Path(__file__).parents[2]
LIBRARY = "fuchsia_pl.library"  # the name under which the modules of `envs/` are imported
SOURCES = sorted([*ROOT.glob("fuchsia_pl/**/*.py"), *ROOT.glob("envs/**/*.py")])

# DESIGN: a room may import rooms of a lower rank and itself. `engines.base` and `engines.vllm_*` are separate rooms.
RANKS = {
    "types": 0,
    "samples": 0.3,
    "loop": 0,
    "scratch": 0,
    "progress": 0,
    "stopping": 0.1,
    "orphans": 0.2,
    "files": 0.5,
    "run_record": 0.6,
    "batch": 0.5,
    "objectives": 1,
    "engines.base": 1,
    "envs": 1,
    "rollouts": 2,
    "policy": 2,
    "engines": 2,
    "gateway": 2,
    "evaluation": 2.5,
    "module": 3,
    "datamodule": 3,
    "report": 3,
    "callbacks": 3.5,
    "cli": 4,
    "__init__": 5,  # exports names of all rooms, and imports each one when it is first used
    "__main__": 5,
}
# The only imports of a higher rank, each with its reason. They are inside a function, so no import is circular.
UPWARD = {
    # A Trainer made by hand has no AdapterSync: the module adds it, as `LightningModule.configure_callbacks` provides for.
    ("fuchsia_pl.module", "fuchsia_pl.callbacks.defaults"),
}
# Stricter than the ranks: the rooms that these rooms may import, and the libraries that the lowest rooms may use.
ONLY_FROM = {
    "batch": {"types", "samples"},
    "samples": {"types"},
    "module": {"policy", "objectives", "types", "samples", "batch"},
    "datamodule": {
        "evaluation",
        "rollouts",
        "envs",
        "engines.base",
        "engines",  # the server of a teacher
        "objectives",
        "types",
        "samples",
        "batch",
        "loop",
        "progress",
        "stopping",
    },
    "objectives": {"types", "batch"},
    "engines.base": {"types"},
    "gateway": {"types", "envs", "loop", "scratch"},
    "envs": {"types", "scratch"},
}
THIRD_PARTIES: dict[str, set[str]] = {
    "types": set(),
    "samples": set(),
    "loop": set(),
    "progress": set(),
    "scratch": set(),
    "stopping": set(),
    "orphans": set(),
    "files": set(),
    "batch": {"torch"},
    "gateway": {"starlette", "uvicorn"},
    "objectives": {"torch"},
    "engines.base": set(),
    "envs": {
        *(
            "datasets",
            "fastmcp",
            "httpx",
            "jsonschema",
            "math_verify",
            "mcp",
            "mcp_types",
            "openai",
            "pyarrow",
            "pydantic",
        ),
        *("tokenizers", "torch", "transformers"),
    },
}
ONLY_IN = {
    "vllm": ("engines/vllm_",),
    "peft": ("policy/",),
    "fastmcp": (
        "envs/tools/",
        "top-level envs/function_calling/server.py",
        "top-level envs/verifiers/server.py",
    ),
    "verifiers": ("top-level envs/verifiers/",),
    "math_verify": ("envs/rewards/math_worker.py",),
    "openai": ("envs/rewards/judge.py",),
    "starlette": ("gateway/",),
    "uvicorn": ("gateway/",),
}


def imports_at_top(file: Path) -> set[str]:
    """The modules that a file imports at module level."""
    return {str(node.module) for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom)}


def room_of(module: str) -> str:
    parts = module.split(".")[1:]
    if parts[:2] == ["engines", "base"]:
        return "engines.base"
    return parts[0] if parts else "__init__"


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports anywhere. Relative imports would hide the room and are not used."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            is_package = node.module == "fuchsia_pl"  # from which submodules are imported by name
            found |= {f"fuchsia_pl.{alias.name}" for alias in node.names} if is_package else {str(node.module)}
    return found - {"fuchsia_pl.__version__"}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", SOURCES, ids=module_name)
def test_imports_go_one_way(file):
    name = module_name(file)
    ours = {module for module in imports_of(file) if module.split(".")[0] == "fuchsia_pl"}
    if name.startswith("envs"):
        own = ".".join([LIBRARY, *name.split(".")[1:2]])  # an environment of several files imports its own
        allowed = ("fuchsia_pl.envs.", "fuchsia_pl.types.", f"{own}.")
        assert all(f"{module}.".startswith(allowed) for module in ours)
        return
    assert not {module for module in ours if f"{module}.".startswith(f"{LIBRARY}.")}, (
        "environments arrive by class path"
    )
    room = room_of(name)
    upward = {module for module in ours if (name, module) in UPWARD}
    assert not upward & imports_at_top(file)
    for module in ours - {"fuchsia_pl"} - upward:
        other = room_of(module)
        assert other in RANKS, f"{name} imports {module}: import it from the file that defines it"
        if other != room:
            assert RANKS[other] < RANKS[room], f"{name} (rank {RANKS[room]}) imports {module} (rank {RANKS[other]})"
            assert not (room == "rollouts" and other == "engines"), "rollouts see the protocol only"
            assert other in ONLY_FROM.get(room, RANKS), f"{name} imports {module}"


def test_environments_and_configs_have_one_name():
    """A module imported as `envs.x` and as `fuchsia_pl.library.x` would have each of its classes twice."""
    assert {link: (ROOT / "fuchsia_pl" / link).readlink() for link in ("library", "configs")} == {
        "library": Path("../envs"),
        "configs": Path("../configs"),
    }
    for file in [*SOURCES, *ROOT.glob("tests/**/*.py")]:
        assert not {module for module in imports_of(file) if module.split(".")[0] == "envs"}, file
    for file in ROOT.glob("configs/**/*.yaml"):
        assert not re.search(r"class_path: envs\b", file.read_text()), file


@pytest.mark.parametrize("file", SOURCES, ids=module_name)
def test_libraries_stay_in_their_rooms(file):
    is_ours = file.is_relative_to(ROOT / "fuchsia_pl")
    path = str(file.relative_to(ROOT / "fuchsia_pl")) if is_ours else f"top-level {file.relative_to(ROOT)}"
    for module in imports_of(file):
        places = ONLY_IN.get(module.split(".")[0])
        assert places is None or path.startswith(places), f"{path} imports {module}"
    room = room_of(module_name(file))
    if room in THIRD_PARTIES and file.is_relative_to(ROOT / "fuchsia_pl"):
        outside = {module.split(".")[0] for module in imports_of(file)} - sys.stdlib_module_names - {"fuchsia_pl"}
        assert outside <= THIRD_PARTIES[room]


def test_only_engine_files_named_after_vllm_import_ours_for_it():
    for file in ROOT.glob("fuchsia_pl/engines/*.py"):
        if not file.name.startswith("vllm_"):
            assert not {name for name in imports_of(file) if name.startswith("fuchsia_pl.engines.vllm_")}, file


@pytest.mark.parametrize("file", SOURCES, ids=module_name)
def test_files_and_functions_stay_small(file):
    text = file.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 70, node.name
            arguments = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            limit = 8 if node.name == "__init__" else 7  # constructors have an argument per setting
            assert len([a for a in arguments if a not in ("self", "cls")]) <= limit, node.name


@pytest.mark.parametrize("file", sorted(ROOT.glob("fuchsia_pl/callbacks/*.py")), ids=module_name)
def test_callbacks_see_module_and_data_module_with_their_types(file):
    """A renamed attribute then fails the type checker. What Lightning leaves undeclared is in `access` alone."""
    tree = ast.parse(file.read_text())
    bases = {ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {base for base in bases if base.split(".")[-1].startswith("Protocol")}
    assert not calls & {"cast", "typing.cast"}
    assert file.name == "access.py" or "type: ignore" not in file.read_text()


def test_durations_are_of_a_clock_that_never_goes_back():
    """`time.time` follows the system's clock, which may be set back during a run."""
    calls = [
        (file, node) for file in SOURCES for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
    ]
    wall = [f"{module_name(file)}:{node.lineno}" for file, node in calls if ast.unparse(node.func) == "time.time"]
    assert not wall


def tracked_files() -> list[str]:
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in out.stdout.splitlines() if (ROOT / name).exists()]


def test_the_top_level_holds_what_it_should():
    allowed = {"fuchsia_pl", "configs", "envs", "tests", "pyproject.toml", "README.md", "LICENSE", "Makefile"}
    top = {name.split("/")[0] for name in tracked_files()}
    assert {name for name in top if not name.startswith(".")} == allowed


class OnlyParser(FuchsiaCLI):
    """Makes the parser of `fuchsia fit` and parses nothing."""

    def parse_arguments(self, parser, args):
        self.config = {"subcommand": None}

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...


@pytest.fixture(scope="module")
def parser():
    return OnlyParser(["fit"]).parser


@pytest.mark.parametrize("file", sorted(CONFIG_FOLDER.rglob("*.yaml")), ids=lambda file: file.name)
def test_every_config_parses_and_names_only_keys_that_exist(file, parser):
    # Each header contains the command; that of an overlay also contains the config that it changes.
    (*before, _) = re.findall(r"--config ([\w/.]+\.yaml)", next(line for line in file.open() if "--config" in line))
    words = [word for name in (*(CONFIG_FOLDER / name for name in before), file) for word in ("--config", str(name))]
    with fresh_arguments():
        assert parser.parse_args(["fit", *words]).fit.model.policy.name
