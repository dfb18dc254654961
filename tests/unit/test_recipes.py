"""Each recipe trains three steps with `overlays/cpu.yaml`, on rows of local files, with a tiny model and a tiny engine."""

import csv

import pytest
import yaml

from fuchsia_pl.cli import FuchsiaCLI
from tests.contracts.test_recipes import RECIPES
from tests.recipes import local_data

REWARDS = {"reverse_text": "reversed_text", "reasoning_gym": "score"}
# What `overlays/cpu.yaml` sets for the real small model, for one of single characters.
TINY = """
trainer: {accelerator: cpu, precision: 32-true, max_steps: 3}
model:
  policy: {name: %s, dtype: float32}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.001}}
data:
  steps_per_epoch: 3
  sampling: {max_completion_tokens: 6, max_length: 1500}
  engine: {class_path: tests.doubles.TinyEngine}
"""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_trains_three_steps_on_a_cpu(recipe, tiny_model, command_folder):
    (command_folder / "tiny.yaml").write_text(TINY % tiny_model)
    configs = [f"recipes/{recipe.name}", "overlays/cpu.yaml", "tiny.yaml"]
    words = [word for config in configs for word in ("--config", config)]
    cli = FuchsiaCLI(["fit", *words, *local_data(recipe.stem, command_folder)])
    assert cli.run_folder.parent.name == recipe.stem
    with (cli.run_folder / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
    assert len(rows) == 3
    assert all(row[f"reward/{REWARDS.get(recipe.stem, 'correct')}"] for row in rows)
    given, saved = (yaml.safe_load(file.read_text()) for file in (recipe, cli.run_folder / "config.yaml"))
    # the overlay keeps the recipe's objective, which its anchor depends on
    for name, value in given["model"]["loss"].items():
        assert saved["model"]["loss"][name] == value
    assert saved["data"]["environment"]["class_path"] == given["data"]["environment"]["class_path"]
