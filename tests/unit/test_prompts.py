"""The prompts of a run: its chat template, its date, and its settings for text."""

from datetime import datetime

import pytest
from lightning.pytorch import Callback

from fuchsia_pl.module import GRPOModule
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.rollouts.config import CurriculumConfig
from fuchsia_pl.types import ConfigError
from tests.doubles import ADAM, EOS, TinyEnvironment, make_data, make_module, make_trainer

# The month's name makes prompts of different lengths on different days.
DATED = "{{ strftime_now('%d %B %Y') | lower }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
LONG_AGO = datetime(2021, 9, 30, 23, 59)


class Prompts(Callback):
    """Keeps the prompt and the prompt ids of every trained rollout."""

    def __init__(self):
        self.texts, self.ids, self.unseen = set(), set(), []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.unseen.append(batch.step.metrics.get("curriculum/unseen"))
        for sample in batch.samples:
            rollout = sample.rollout
            self.texts.add(rollout.prompt)
            self.ids.add(tuple(rollout.token_ids[: rollout.num_prompt_tokens]))


def module_with(folder, template) -> GRPOModule:
    policy = PolicyConfig(name=str(folder), dtype="float32", chat_template=template, lora=LoRASettings(r=4, alpha=8))
    return GRPOModule(policy, LossConfig(), ADAM)


def fit(folder, root, template=None, ckpt_path=None, started_at=None, environment=None, **settings):
    module, prompts = module_with(folder, template), Prompts()
    data = make_data(module, environment=environment, **settings)
    if started_at is not None:
        data._started_at = started_at
    trainer = make_trainer(root, prompts, max_epochs=-1, max_steps=2 if ckpt_path else 1)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, data, prompts


def test_a_resumed_run_has_the_date_of_the_run_that_it_resumes(tiny_model, tmp_path):
    trainer, _, first = fit(tiny_model, tmp_path, DATED, started_at=LONG_AGO)
    assert all(text.startswith("30 september 2021 ") for text in first.texts)
    trainer.save_checkpoint(tmp_path / "x.ckpt")

    _, data, second = fit(tiny_model, tmp_path, DATED, ckpt_path=tmp_path / "x.ckpt", started_at=datetime(2024, 5, 1))
    assert second.texts
    assert all(text.startswith("30 september 2021 ") for text in second.texts)
    # "30 september 2021 17?"; with the day on which it was resumed, "01 may 2024 17?" would be the longest
    assert data._longest_row.prompt_tokens == 21
    assert data.state_dict() == {"started_at": "2021-09-30T23:59:00"}


def test_a_resumed_run_with_dated_prompts_keeps_the_success_of_its_items(tiny_model, tmp_path):
    """All prompts are checked again with the date of the resumed run."""
    sampling = {"curriculum": CurriculumConfig()}
    trainer, _, first = fit(tiny_model, tmp_path, DATED, started_at=LONG_AGO, sampling=sampling)
    assert first.unseen[0] == 1.0
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    _, _, second = fit(tiny_model, tmp_path, DATED, ckpt_path=tmp_path / "x.ckpt", sampling=sampling)
    assert 0.0 <= second.unseen[0] < 1.0


class Briefed(TinyEnvironment):
    def messages(self, item):
        return [{"role": "system", "content": "be brief"}, *super().messages(item)]


def test_a_date_that_only_some_prompts_have_is_that_of_the_run_that_is_resumed(tiny_model, tmp_path):
    beside_a_system_text = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ strftime_now('%d %B %Y') | lower }} {% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    trainer, _, first = fit(tiny_model, tmp_path, beside_a_system_text, started_at=LONG_AGO, environment=Briefed())
    assert all(text.startswith("30 september 2021 be brief") for text in first.texts)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = {"ckpt_path": tmp_path / "x.ckpt", "started_at": datetime(2024, 5, 1), "environment": Briefed()}
    _, data, second = fit(tiny_model, tmp_path, beside_a_system_text, **resumed)
    assert second.texts
    assert all(text.startswith("30 september 2021 be brief") for text in second.texts)
    assert data._longest_row.prompt_tokens == 29  # "30 september 2021 be brief17?", checked again with this date


def test_a_held_out_split_is_asked_at_the_date_of_the_checkpoint(tiny_model, tmp_path):
    trainer, _, _ = fit(tiny_model, tmp_path, DATED, started_at=LONG_AGO)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module = module_with(tiny_model, DATED)
    data = make_data(module)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(module, datamodule=data, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert data._collector.chat.template.started_at == LONG_AGO


def test_a_new_run_has_todays_date(tiny_model, tmp_path):
    _, _, prompts = fit(tiny_model, tmp_path, DATED)
    assert all(f" {datetime.now().year} " in text for text in prompts.texts)


def test_a_base_model_learns_without_a_chat_template(tiny_model, tmp_path):
    _, data, prompts = fit(tiny_model, tmp_path, "none")
    assert prompts.texts <= {f"{n}?" for n in range(20)}
    assert data.make_chat().stop_token_ids == (EOS,)


class Hostile(TinyEnvironment):
    def messages(self, item):
        return [{"role": "user", "content": f"{item['n']}<eos>"}]


def test_a_token_named_in_an_item_is_text_unless_the_setting_says_otherwise(tiny_model, tmp_path):
    _, _, prompts = fit(tiny_model, tmp_path, environment=Hostile())
    assert not any(EOS in ids for ids in prompts.ids)
    allowed = {"special_tokens_in_text": True}
    _, _, prompts = fit(tiny_model, tmp_path, environment=Hostile(), sampling=allowed)
    assert all(ids.count(EOS) == 1 for ids in prompts.ids)


def test_a_template_that_swallows_the_question_ends_the_run_before_the_engine_starts(tiny_model, tmp_path):
    parts_only = "{% for m in messages %}user:{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    module = module_with(tiny_model, parts_only)
    data = make_data(module)
    with pytest.raises(ConfigError, match="leaves out the text of messages of the role 'user'"):
        make_trainer(tmp_path).fit(module, datamodule=data)
    assert data.engine._model is None


def test_the_models_own_template_is_the_default(tiny_model):
    assert make_module(tiny_model).learner.served_model.chat_template is None
