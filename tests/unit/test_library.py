"""The names that the package exports."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fuchsia_pl

ROOT = Path(__file__).parents[2]
EXPORTED = [
    "AdapterSync",
    "GRPOModule",
    "LoRASettings",
    "LossConfig",
    "PolicyConfig",
    "RolloutDataModule",
    "SamplingConfig",
    "VLLMColocatedEngine",
    "default_callbacks",
]


def loaded_by(code: str) -> set[str]:
    """The modules that a new interpreter has loaded after some code, without those of its start."""
    script = f"import sys; before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"
    return set(
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.split()
    )


def test_importing_the_package_loads_only_the_standard_library():
    loaded = loaded_by("import fuchsia_pl; fuchsia_pl.__version__; dir(fuchsia_pl)")
    assert "fuchsia_pl" in loaded
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"fuchsia_pl"}
    assert {name for name in loaded if name.startswith("fuchsia_pl.")} == set()


def test_a_settings_class_is_imported_without_vllm():
    loaded = loaded_by("from fuchsia_pl import LossConfig, LoRASettings")
    assert "fuchsia_pl.objectives.config" in loaded
    assert "vllm" not in loaded


def test_names_are_exported_and_listed():
    assert sorted(fuchsia_pl.__all__) == EXPORTED
    assert set(EXPORTED) <= set(dir(fuchsia_pl))
    assert "__version__" in dir(fuchsia_pl)


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_name_is_that_of_its_module_for_python_and_for_type_checkers(name):
    """The imports that type checkers see name the same modules as the table that Python uses."""
    tree = ast.parse(Path(fuchsia_pl.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    (module,) = [node.module for node in imports if name in [alias.name for alias in node.names]]
    assert getattr(fuchsia_pl, name) is getattr(importlib.import_module(module), name)
    assert getattr(fuchsia_pl, name).__module__ == module


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'fuchsia_pl' has no attribute 'GRPOTrainer'$"):
        fuchsia_pl.GRPOTrainer  # noqa: B018


def test_submodules_are_imported_as_before():
    from fuchsia_pl import orphans

    assert orphans.__name__ == "fuchsia_pl.orphans"


def test_the_version_is_a_literal_in_the_package_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fuchsia_pl.__version__"}
    # Setuptools reads a literal from the source and imports the package only if there is none.
    tree = ast.parse(Path(fuchsia_pl.__file__).read_text())
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__version__"]
    assert [ast.literal_eval(value) for value in values] == [fuchsia_pl.__version__]
