"""Each recipe trains three steps with `overlays/cpu.yaml`, the quickstart's model and real vLLM, on rows of local files."""

import csv

import pytest

from fuchsia_pl.cli import FuchsiaCLI
from tests.contracts.test_recipes import RECIPES
from tests.integration.kept_engine import KeptEngine
from tests.machine import OVERLAY
from tests.recipes import local_data

pytestmark = pytest.mark.engine
KEPT = ["--data.engine", "tests.integration.kept_engine.KeptEngine"]
# An engine without an adapter is another one: this recipe starts its own, after the kept one has ended.
ALL_WEIGHTS = "r1_zero"
IN_ORDER = sorted(RECIPES, key=lambda file: (file.stem == ALL_WEIGHTS, file))


@pytest.mark.parametrize("recipe", IN_ORDER, ids=lambda file: file.stem)
def test_a_recipe_trains_three_steps_with_the_real_engine(recipe, command_folder):
    words = ["--config", f"recipes/{recipe.name}", "--config", "overlays/cpu.yaml", *OVERLAY]
    if recipe.stem == ALL_WEIGHTS:
        KeptEngine.end()
    else:
        words += KEPT
    sizes = ["--trainer.max_steps", "3", "--data.batch_size", "2", "--data.sampling.group_size", "2"]
    sizes += ["--data.sampling.max_completion_tokens", "32"]
    cli = FuchsiaCLI(["fit", *words, *sizes, *local_data(recipe.stem, command_folder)])
    with (cli.run_folder / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
    assert len(rows) == 3
    assert all(float(row["train/logprob_gap"]) < 0.15 for row in rows)


@pytest.fixture(scope="module", autouse=True)
def engine_ends_with_the_file():
    yield
    KeptEngine.end()
