"""Gold answers that a reward cannot use are found before training."""

import threading

import pytest

from fuchsia_pl.envs.golds import MAX_FOUND, bad_golds, check_golds, checks_gold
from fuchsia_pl.envs.items import ItemSource, load_items
from fuchsia_pl.envs.rows import first_rows
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEngine, TinyEnvironment, make_data, make_module, make_trainer


@checks_gold(lambda item: f"{item['n']} is odd" if item["n"] % 2 else None)
def even_gold(rollouts, *args, **kwargs):
    return [float(r.sibling) for r in rollouts]


class Golds(TinyEnvironment):
    def __init__(self, train=(0, 2, 4, 6, 8, 10), validation=(0, 2)) -> None:
        super().__init__()
        self.reward_functions, self.reward_weights = [even_gold], {}
        self.train, self.validation = train, validation

    def train_items(self):
        return [{"n": n} for n in self.train]

    def validation_items(self):
        return [{"n": n} for n in self.validation]


def test_items_with_unusable_golds_are_named_in_order_up_to_the_limit():
    items = [{"n": n} for n in (2, 1, 4, 3, 5, 6, 7, 9)]
    assert bad_golds(Golds(), items, limit=2) == [
        "item 1: 1 is odd",
        "item 3: 3 is odd",
        "5 of 8 items have a gold answer that cannot be used",
    ]
    assert bad_golds(Golds(), items, limit=5) == [f"item {i}: {items[i]['n']} is odd" for i in (1, 3, 4, 6, 7)]
    assert bad_golds(Golds(), items, indices=[0, 3, 5]) == ["item 3: 3 is odd"]
    assert bad_golds(Golds(), []) == []


def test_an_item_of_a_file_is_named_by_its_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 2}\n\n{"n": 3}\n{"n": 4}\n')
    items = first_rows(load_items("X", "train", ItemSource(str(file), None, None, "train"), {}), 2)
    assert list(items) == [{"n": 2}, {"n": 3}]
    assert bad_golds(Golds(), items) == [f"item 1 ({file}, line 3): 3 is odd"]
    assert len(first_rows(items, 5)) == 2


def test_an_exception_of_a_check_is_reported():
    assert bad_golds(Golds(), [{"n": 2}, {"m": 2}, {"n": "x"}])[:2] == [
        "item 1: there is no field 'n'",
        "item 2: the check of its gold answer raised TypeError: not all arguments converted during string formatting",
    ]


def test_checking_stops_after_many_unusable_golds():
    checked = []

    class Counting(Golds):
        def check_gold(self, item):
            checked.append((item["n"], threading.get_ident()))
            return "no"

    found = bad_golds(Counting(), [{"n": n} for n in range(5000)], limit=1)
    assert found[1].startswith("at least ")
    assert MAX_FOUND <= len(checked) < MAX_FOUND + 10


def test_the_error_names_the_split_the_items_and_their_number():
    with pytest.raises(ConfigError, match=r"Golds has gold answers in its train items .*: item 1: 3 is odd\. Correct"):
        check_golds(Golds(), "train", [{"n": 2}, {"n": 3}], [0, 1])
    assert check_golds(Golds(), "train", [{"n": 2}, {"n": 3}], [0]) == [0]


@pytest.mark.parametrize(
    ("environment", "settings", "words"),
    [
        (Golds(train=(0, 2, 4, 5, 6, 7)), {}, "in its train items .*item 3: 5 is odd; item 5: 7 is odd"),
        (Golds(validation=(2, 1)), {"limit_val_batches": 1.0}, "in its validation items .*item 1: 1 is odd"),
    ],
)
def test_a_fit_refuses_them_before_the_engine_starts(tiny_model, tmp_path, environment, settings, words):
    module, engine = make_module(tiny_model), TinyEngine()
    with pytest.raises(ConfigError, match=words):
        make_trainer(tmp_path, **settings).fit(module, datamodule=make_data(module, engine, environment))
    assert not hasattr(engine, "spec")


def test_held_out_items_that_are_not_used_are_not_checked(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()
    data = make_data(module, engine, Golds(validation=(1,)))
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    assert hasattr(engine, "spec")
