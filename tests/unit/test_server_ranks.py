"""Two ranks, each with its own server: if one rank has no server left, both end."""

import time

import psutil
import pytest

from tests.server_double import FakeServer

TWO_RANKS = """
import os, sys
from pathlib import Path
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.engines.vllm_server import VLLMServerEngine
from tests.doubles import make_data, make_module, make_trainer

model, root, *urls = sys.argv[1:]
module = make_module(Path(model))
engine = VLLMServerEngine([urls[int(os.environ.get("LOCAL_RANK", 0))]], timeout_s=20, recovery_timeout_s=1)
data = make_data(module, engine, batch_size=2, steps_per_epoch=1000)
trainer = make_trainer(Path(root), sync=AdapterSync(tolerance=1e9), devices=2, strategy="ddp")
trainer.fit(module, datamodule=data)
"""


@pytest.mark.parametrize("loser", [0, 1])
def test_every_rank_ends_within_a_bound_where_one_has_no_server_left(forkserver, tiny_model, tmp_path, loser):
    servers = [FakeServer(model=str(tiny_model)) for _ in range(2)]
    (tmp_path / "two.py").write_text(TWO_RANKS)
    process = forkserver.start(tmp_path / "two.py", tiny_model, tmp_path, *(s.url for s in servers), cwd=tmp_path)
    end = time.monotonic() + 120
    while not all(len({body["model"] for body in server.bodies}) > 1 for server in servers):
        assert process.poll() is None, process.printed[-3000:]
        assert time.monotonic() < end, process.printed[-3000:]
        time.sleep(0.05)
    others = psutil.Process(process.pid).children(recursive=True)
    assert len(others) == 1
    servers[loser].kill()
    assert process.wait(60) != 0
    _, running = psutil.wait_procs(others, timeout=10)
    assert not running, process.printed[-3000:]
    for words in (
        f"[rank{loser}]",
        "no server was left for 1 s",
        servers[loser].url,
        "Start one with `fuchsia serve`",
    ):
        assert words in process.printed
    servers[1 - loser].kill()
