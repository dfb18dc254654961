"""`fuchsia plan`: without weights and without a network, and its options hold."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file

from fuchsia_pl.cli.options import GPU_GIB
from fuchsia_pl.cli.plan import PlanCLI, gpu_memory, plan
from fuchsia_pl.cli.run_command import HANDLERS
from fuchsia_pl.cli.run_folder import CONFIG_FOLDER
from fuchsia_pl.policy.architectures import KNOWN, architecture_of
from fuchsia_pl.policy.model_folder import blank_model
from fuchsia_pl.policy.plan import GIB
from fuchsia_pl.types import ConfigError
from tests.unit.policy.test_teacher_adapter import save_adapter
from tests.unit.test_cli import TINY

RECIPES = sorted(f"recipes/{file.name}" for file in (CONFIG_FOLDER / "recipes").glob("*.yaml"))
GPU_CONFIGS = ("gsm8k.yaml", "countdown.yaml", "function_calling.yaml", "reasoning_gym.yaml", *RECIPES)
NUM_WEIGHTS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "PrimeIntellect/Qwen3-0.6B-Reverse-Text-SFT": 596_049_920,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def planned(*words: str, gpu: str = "24", gpus: int | None = None):
    return PlanCLI(["fit", *words], gpu_memory(gpu), gpus).found


def test_it_is_a_command():
    assert HANDLERS["plan"] is plan


@pytest.mark.parametrize("config", GPU_CONFIGS)
def test_each_config_fits_the_card_of_its_first_comment(config):
    header = (CONFIG_FOLDER / config).read_text().splitlines()[0]
    gib = re.search(r"one GPU with (\d+) GiB", header)[1]
    cli = PlanCLI(["fit", "--config", config], float(gib), None)
    assert cli.found.plan.fits
    assert cli.found.options == ()
    assert cli.model.policy_config.checkpointing.enabled
    assert cli.model.policy_config.max_tokens_per_micro_batch is not None


def test_the_figures_of_gsm8k():
    """The weights of Qwen2.5-1.5B and of its adapter by hand."""
    found = planned("--config", "gsm8k.yaml", "--data.engine.init_args.kv_cache_gb", "4")
    weights = 1_543_714_304
    adapter = 32 * 28 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))  # q and o, k and v, the MLP
    assert found.plan.size("trainer", "frozen weights") == found.plan.size("engine", "weights") == 2 * weights
    assert found.plan.size("trainer", "LoRA, gradients, optimizer") == 16 * adapter
    assert found.plan.size("engine", "KV cache") == 4 * GIB
    # 2 x 28 layers x 2 heads x 128 x 2 bytes = 28672 bytes per token
    assert found.figures["KV cache"].startswith("149,796 tokens: 146 of 256 rows")
    assert found.figures["sync"].startswith(f"{4 * adapter / 2**20:.0f} MiB")
    assert found.figures["largest micro-batch"] == "16,384 tokens"
    assert found.figures["micro-batches of a step"].startswith("at most ")


def test_with_the_printed_options_it_fits(tiny_model, tmp_path, monkeypatch, capsys):
    """A tiny model beside vLLM: two contexts of 0.5 GiB, a workspace of 0.4, graphs of 1, and a cache of 2."""
    monkeypatch.chdir(tmp_path)
    vllm = "class_path: fuchsia_pl.engines.vllm_colocated.VLLMColocatedEngine, init_args: {kv_cache_gb: 2.0}"
    (tmp_path / "tiny.yaml").write_text((TINY % tiny_model).replace("class_path: tests.doubles.TinyEngine", vllm))
    words = ["--config", "tiny.yaml", "--gpu", "3.9"]
    assert plan(words) == 1
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Each of these makes it fit, the cheapest first:")
    options = [line.split() for line in lines[start + 1 :]]
    assert options == [
        ["--data.engine.init_args.kv_cache_gb", "1"],
        ["--data.engine.init_args.enforce_eager", "true"],
    ]
    for option in options:
        assert plan([*words, *option]) == 0
        assert "fits: " in capsys.readouterr().out


def test_a_teachers_adapter_counts_and_a_missing_one_is_one_line(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY % tiny_model)
    save_adapter(tiny_model, tmp_path / "teacher")
    size = sum(4 * tensor.numel() for tensor in load_file(tmp_path / "teacher/adapter_model.safetensors").values())
    found = planned("--config", "tiny.yaml", "--data.teacher.adapter", "teacher")
    assert found.plan.size("trainer", "adapter of the teacher") == size
    assert planned("--config", "tiny.yaml").plan.size("trainer", "adapter of the teacher") == 0
    with pytest.raises(SystemExit):
        planned("--config", "tiny.yaml", "--data.teacher.adapter", "nowhere")
    assert "data.teacher.adapter='nowhere' is not the folder of a PEFT adapter" in capsys.readouterr().err


def test_more_gpus_and_json(capsys):
    words = ["--config", "gsm8k.yaml", "--model.policy.name", "Qwen/Qwen2.5-7B-Instruct", "--gpu", "h100", "--json"]
    plan(words)
    one = json.loads(capsys.readouterr().out)
    plan([*words, "--gpus", "8", "--config", "overlays/fsdp.yaml"])
    eight = json.loads(capsys.readouterr().out)

    def size(found, name):
        return next(part["num_bytes"] for part in found["plan"]["parts"] if part["name"] == name)

    assert one["fits"] is eight["fits"] is True
    assert size(one, "frozen weights") == 8 * size(eight, "frozen weights") == 2 * 7_615_616_512
    assert one["peak"] == sum(part["num_bytes"] for part in one["plan"]["parts"])
    assert "8 GPUs of 79.1 GiB" in eight["title"]


def test_a_folder_needs_only_its_config(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(tiny_model / "config.json", only)
    (tmp_path / "tiny.yaml").write_text(TINY % only)
    found = planned("--config", "tiny.yaml")
    assert found.plan.fits
    assert "KV cache" not in found.figures  # the engine of the tests has none
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--gpu", "h10"), "--gpu 'h10' is neither a number of GiB above 0 nor one of h100, .* Did you mean h100?"),
        (("--gpu", "0"), "neither a number of GiB above 0"),
        (("--gpu", "24", "--gpus", "0"), "--gpus must be 1 or more, got 0"),
        (("--gpu", "24", "--gpus", "3"), "data.batch_size=32 is no multiple of the 3 ranks"),
        (("--gpu", "24", "--model.policy.name", "org/none"), "--model.policy.name PATH"),
        (
            ("--gpu", "24", "--model.policy.max_tokens_per_micro_batch", "900"),
            "less than the longest row has, 1023 tokens",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, reason, capsys):
    with pytest.raises(SystemExit) as caught:
        plan(["--config", "gsm8k.yaml", *words])
    assert caught.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(error) == 1
    assert re.search(reason, error[0])


@pytest.mark.parametrize("name", KNOWN)
def test_known_architectures_have_the_published_number_of_weights(name, tmp_path):
    architecture_of(name).save_pretrained(tmp_path)
    assert blank_model(tmp_path).num_parameters() == NUM_WEIGHTS[name]


def test_names_of_gpus():
    assert gpu_memory("H100") == GPU_GIB["h100"]
    with pytest.raises(ConfigError, match="Did you mean rtx4090"):
        gpu_memory("rtx409")
