"""The wheel in a separate environment, run in a folder with a user's `envs/` and `configs/`."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from fuchsia_pl import __version__
from tests import doubles, tiny_llama
from tests.contracts.test_structure import ROOT, tracked_files

LIBRARIES = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
MINE = """
from fuchsia_pl.library.arithmetic import Arithmetic

class Mine(Arithmetic):
    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(num_validation=2)
        self.reward_functions, self.reward_weights = [short], {}

def short(rollouts, *args, **kwargs):
    return [1.0 / rollout.num_sampled_tokens for rollout in rollouts]
"""
CONFIG = """
trainer: {accelerator: cpu, precision: 32-true, max_steps: 1, accumulate_grad_batches: 1, num_sanity_val_steps: 0}
model:
  policy: {name: %s, dtype: float32}
data:
  batch_size: 2
  steps_per_epoch: 1
  sampling: {group_size: 2, max_completion_tokens: 4}
  environment: {class_path: envs.mine.Mine}
  engine: {class_path: mine_engine.TinyEngine}
"""


def run(*words: str | Path, cwd: Path) -> str:
    """Runs a command without this process's search path; returns what it printed."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FUCHSIA_RUN_FOLDER")
    }
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*words: str | Path, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words, cwd=cwd)


def new_environment(folder: Path) -> Path:
    """An environment with the libraries of this one, but without the editable install: it reads no .pth file there."""
    venv.create(folder, symlinks=True)
    (places,) = folder.glob("lib/python*/site-packages")
    (places / "libraries.pth").write_text("\n".join(LIBRARIES))
    return folder / "bin"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of the tracked files, since a build writes into its folder."""
    folder = tmp_path_factory.mktemp("wheel") / "checkout"
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="session")
def wheel(checkout) -> Path:
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist", ".", cwd=checkout)
    (file,) = (checkout / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    programs = new_environment(tmp_path_factory.mktemp("installed"))
    pip("--python", programs / "python", "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    return programs


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A user's folder that contains names of this project's rooms."""
    for name in ("envs", "configs"):
        (tmp_path / name).mkdir()
    (tmp_path / "envs/mine.py").write_text(MINE)
    (tmp_path / "configs/mine.yaml").write_text(CONFIG % tiny_model)
    shutil.copy(doubles.__file__, tmp_path / "mine_engine.py")
    (tmp_path / "tests").mkdir()
    shutil.copy(tiny_llama.__file__, tmp_path / "tests")  # which the doubles import
    return tmp_path


def test_the_wheel_installs_one_package_with_the_environments_and_configs(wheel):
    assert wheel.name == f"fuchsia_pl-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"fuchsia_pl", f"fuchsia_pl-{__version__}.dist-info"}
    homes = {"envs/": "fuchsia_pl/library/", "configs/": "fuchsia_pl/configs/", "fuchsia_pl/": "fuchsia_pl/"}
    expected = {
        home + name.removeprefix(room)
        for name in tracked_files()
        for room, home in homes.items()
        if name.startswith(room)
        and (name.endswith((".py", ".yaml", ".typed", ".json")) or name.startswith("fuchsia_pl/report/page/"))
    }
    assert {name for name in names if name.startswith("fuchsia_pl/")} == expected


def test_the_source_archive_builds_the_same_wheel(checkout, wheel, tmp_path):
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=checkout)
    shutil.unpack_archive(tmp_path / f"fuchsia_pl-{__version__}.tar.gz", tmp_path, filter="data")
    source = tmp_path / f"fuchsia_pl-{__version__}"
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist", ".", cwd=source)
    (again,) = (source / "dist").glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_an_editable_install_exposes_the_one_package(checkout, tmp_path):
    programs = new_environment(tmp_path / "venv")
    words = ["install", "--no-deps", "--no-build-isolation", "--no-index", "--editable", checkout]
    pip("--python", programs / "python", *words, cwd=tmp_path)
    code = (
        "from importlib.util import find_spec; from pathlib import Path; import fuchsia_pl;"
        "print(find_spec('envs'), find_spec('configs'), find_spec('fuchsia_pl.library.gsm8k').origin,"
        "Path(fuchsia_pl.__file__).with_name('configs').joinpath('quickstart.yaml').is_file())"
    )
    found = run(programs / "python", "-c", code, cwd=tmp_path).split()
    assert found == ["None", "None", str(checkout / "fuchsia_pl/library/gsm8k.py"), "True"]


def test_the_wheels_quickstart_is_read_beside_folders_of_the_same_names(installed, folder):
    """Also next to a user's config and environment with the same names."""
    (folder / "configs/quickstart.yaml").write_text("not: ours\n")
    (folder / "envs/arithmetic.py").write_text("raise ImportError('not ours')\n")
    printed = run(installed / "fuchsia", "fit", "--config", "quickstart.yaml", "--print_config", cwd=folder)
    assert yaml.safe_load(printed)["data"]["environment"]["class_path"] == "fuchsia_pl.library.arithmetic.Arithmetic"


@pytest.mark.parametrize(
    ("program", "is_package"), [(["fuchsia"], True), (["python", "-m", "fuchsia_pl"], False)], ids=["script", "module"]
)
def test_the_wheels_quickstart_trains_on_an_environment_and_an_engine_of_the_folder(
    installed, folder, program, is_package
):
    if is_package:
        (folder / "envs/__init__.py").touch()
    configs = ["--config", "quickstart.yaml", "--config", "mine.yaml"]
    run(installed / program[0], *program[1:], "fit", *configs, cwd=folder)
    saved = yaml.safe_load((folder / "runs/quickstart/0/config.yaml").read_text())
    assert saved["data"]["environment"]["class_path"] == "envs.mine.Mine"
    rollouts = (folder / "runs/quickstart/0/rollouts.jsonl").read_text().splitlines()
    assert len(rollouts) == 4  # 2 prompts of 2 completions
