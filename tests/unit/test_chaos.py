"""Ten kills at random moments; `make chaos` makes a hundred."""

import random

from tests.chaos import Chaos


def test_ten_kills_change_nothing(tmp_path):
    chaos = Chaos(tmp_path, random.Random(0))
    chaos.run(10)
    assert chaos.counts["kills"] == 10
