"""The audit of reasoning-gym's datasets. Known good and bad ones of version 0.1.25 are named here, not in the code."""

import asyncio
import logging

import pytest

from fuchsia_pl.envs import ConfigError
from fuchsia_pl.envs.audit import AuditSettings, FindingKind, audit
from fuchsia_pl.library.reasoning_gym import ReasoningGym, Task
from fuchsia_pl.library.reasoning_gym.audited import audit_task

pytest.importorskip("reasoning_gym")
SOUND = ("chain_sum", "family_relationships", "leg_counting", "number_sorting", "spell_backward")
UNSOUND = [
    ("game_of_life_halting", FindingKind.PAYS_JUNK),  # any text: it compares bool(answer)
    ("complex_arithmetic", FindingKind.PAYS_JUNK),  # "nan": min(1.0, nan) is 1.0
    ("coin_flip", FindingKind.PAYS_JUNK),  # "0", the first character of most golds
    *((name, FindingKind.EVALUATES) for name in ("spiral_matrix", "string_insertion", "binary_matrix", "n_queens")),
    *((name, FindingKind.RAISES) for name in ("boxnet", "coin_flip", "game_of_life", "prime_factorization")),
    # Their stored answers are null.
    *(
        (name, FindingKind.GOLD_UNPAID)
        for name in ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
    ),
    ("composite", FindingKind.NOT_MADE),
]


@pytest.fixture(scope="module")
def findings():
    names = dict.fromkeys((*SOUND, *(name for name, _ in UNSOUND)))
    tasks = [audit_task(Task(name), seed=0) for name in names]
    return {one.task: one.findings for one in audit(tasks, AuditSettings(num_items=4, timeout_s=0.5))}


@pytest.mark.parametrize("name", SOUND)
def test_sound_datasets_have_no_findings(findings, name):
    assert findings[name] == ()


@pytest.mark.parametrize(("name", "kind"), UNSOUND)
def test_the_fault_of_a_dataset_is_found(findings, name, kind):
    assert kind in [found.kind for found in findings[name]]


def prepared(environment: ReasoningGym):
    async def prepare_and_close():
        try:
            await environment.prepare()
            return environment.train_items()
        finally:
            await environment.close()

    return asyncio.run(prepare_and_close())


def test_an_unsound_dataset_is_refused_when_the_environment_is_prepared(caplog):
    tasks = [Task("chain_sum"), Task("complex_arithmetic")]
    with pytest.raises(ConfigError) as caught:
        prepared(ReasoningGym(tasks, num_items=4, num_validation=2))
    sentence = str(caught.value)
    assert "complex_arithmetic pays for junk ('nan'): earns 1" in sentence
    assert "chain_sum" not in sentence
    assert "allow_unsound: true" in sentence
    with caplog.at_level(logging.WARNING):
        items = prepared(ReasoningGym(tasks, num_items=4, num_validation=2, allow_unsound=True))
    assert {item["task"] for item in items} == {"chain_sum", "complex_arithmetic"}
    assert "complex_arithmetic pays for junk ('nan'): earns 1" in caplog.text


def test_all_tasks_are_those_of_the_library_and_the_configured_ones_keep_their_settings():
    from reasoning_gym.factory import DATASETS

    environment = ReasoningGym([Task("chain_sum", config={"max_terms": 3})])
    try:
        tasks = {task.name: task.argument for task in environment.audit_tasks(all_tasks=True)}
    finally:
        asyncio.run(environment.close())
    assert set(tasks) == set(DATASETS)
    assert tasks["chain_sum"]["config"] == {"max_terms": 3}
    assert tasks["leg_counting"]["config"] == {}
    assert [task.name for task in environment.audit_tasks(all_tasks=False)] == ["chain_sum"]
