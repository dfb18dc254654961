"""Each recipe states its source, its expected figure and its card, and the page lists the same."""

import re

import pytest

from fuchsia_pl.cli.run_folder import CONFIG_FOLDER, find_configs
from tests.contracts.test_readme import section

RECIPES = sorted((CONFIG_FOLDER / "recipes").glob("*.yaml"))
NAMES = {
    *("countdown_3b.yaml", "gsm8k_qwen2.5_0.5b.yaml", "gsm8k_qwen2.5_1.5b.yaml", "r1_zero.yaml", "reverse_text.yaml"),
    "reasoning_gym.yaml",
}


def header(recipe) -> list[str]:
    return [line for line in recipe.read_text().splitlines() if line.startswith("#")]


def test_the_recipes_are_there():
    assert {file.name for file in RECIPES} == NAMES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_states_card_commands_figure_source_and_differences(recipe):
    lines = header(recipe)
    assert re.search(r"one GPU with \d+ GiB; not run on a GPU yet\.$", lines[0])
    command = f"#   fuchsia fit --config recipes/{recipe.name}"
    assert lines[1:3] == [command, f"{command} --config overlays/cpu.yaml"]
    starts = [line.split(":")[0] for line in lines[3:] if re.match(r"# [A-Z]\w+: ", line)]
    assert starts == ["# Expected", "# Source", "# Differences"]
    assert re.search(r"\d", next(line for line in lines if line.startswith("# Expected")))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_the_page_has_the_figure_and_the_card_of_the_recipe(recipe):
    (row,) = re.findall(
        rf"^\| \[`{re.escape(recipe.name)}`\].*$", section("configs/README.md", "Recipes"), flags=re.MULTILINE
    )
    expected, source, card = (cell.strip() for cell in row.split("|")[2:5])
    text = "\n".join(header(recipe))
    figure = re.search(r"\d+(\.\d+)?", expected)[0]
    assert figure in text.split("# Expected:")[1].split("# Source:")[0]
    assert f"one GPU with {card}" in text
    assert re.split(r"[,;]", source)[0].lower().replace(" ", "") in text.lower().replace(" ", "")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_found_by_its_name(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (f"recipes/{recipe.name}", f"recipes/{recipe.stem}"):
        assert find_configs(["fit", "--config", name])[-1] == str(recipe)
