"""Simulated machines: network namespaces with their own addresses, two for torchrun's nodes and one for vLLM's server."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import OVERLAY

MISSING = "needs root and the `ip` command with network namespaces"
HAS_NAMESPACES = shutil.which("ip") and subprocess.run(["ip", "netns", "list"], capture_output=True).returncode == 0
CAN_SEPARATE = os.geteuid() == 0 and HAS_NAMESPACES
pytestmark = [pytest.mark.engine, pytest.mark.skipif(not CAN_SEPARATE, reason=MISSING)]

BRIDGE = "fpl-bridge"
ADDRESSES = {"fpl-one": "10.77.0.1", "fpl-two": "10.77.0.2", "fpl-server": "10.77.0.3"}
BIN = Path(sys.executable).parent
CONFIGS = ["--config", "quickstart.yaml", *OVERLAY]
KEY = "only-for-this-test"
BOUND_S = 60.0
SERVED = ["--data.engine.init_args.kv_cache_gb", "0.4"]
SMALL = """--trainer.max_steps {steps} --trainer.num_sanity_val_steps 0 --trainer.limit_val_batches 0 --data.batch_size 4
--data.sampling.group_size 4 --data.sampling.max_completion_tokens 12 --trainer.accumulate_grad_batches 1
--trainer.devices 1 --trainer.num_nodes 2 --checkpoint.every_n_steps 1
--trainer.strategy lightning.pytorch.strategies.DDPStrategy --trainer.strategy.timeout 0:00:20"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def remove_machines() -> None:
    for name in ADDRESSES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        # A namespace that an ending process still has open continues without a name.
        subprocess.run(["ip", "link", "del", f"{name}-b"], capture_output=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[None]:
    """A bridge, and three namespaces that can reach only each other, through the bridge."""
    remove_machines()
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for name, address in ADDRESSES.items():
            ip("netns", "add", name)
            ip("link", "add", f"{name}-b", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}-b", "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        remove_machines()


@contextlib.contextmanager
def running(machine: str, folder: Path, name: str, *words: str) -> Iterator[subprocess.Popen]:
    """Runs a command on one of the machines, with its output in `<name>.log`; ends it with all its processes."""
    environment = {**os.environ, "VLLM_API_KEY": KEY, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            ["ip", "netns", "exec", machine, *words],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait(30)


@pytest.fixture(scope="module")
def server(machines, tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    host = ADDRESSES["fpl-server"]
    words = [str(BIN / "fuchsia"), "serve", *CONFIGS, "--host", host, "--port", "8000", *SERVED]
    with running("fpl-server", folder, "server", *words):
        yield f"http://{host}:8000"


def node(number: int, url: str, steps: int) -> list[str]:
    """The command of a node of the run."""
    launcher = (
        f"--nnodes 2 --node-rank {number} --nproc-per-node 1 --master-addr {ADDRESSES['fpl-one']} --master-port 29400"
    )
    urls = ["--data.engine.init_args.urls", json.dumps([url]), "--data.engine.init_args.timeout_s", "120"]
    urls += ["--data.engine.init_args.recovery_timeout_s", "15"]
    configs = [*CONFIGS, "--config", "overlays/server.yaml"]
    return [
        str(BIN / "torchrun"),
        *launcher.split(),
        "-m",
        "fuchsia_pl",
        "fit",
        *configs,
        *urls,
        *SMALL.format(steps=steps).split(),
    ]


@contextlib.contextmanager
def two_nodes(folder: Path, url: str, steps: int) -> Iterator[tuple[subprocess.Popen, subprocess.Popen]]:
    with (
        running("fpl-one", folder, "one", *node(0, url, steps)) as one,
        running("fpl-two", folder, "two", *node(1, url, steps)) as two,
    ):
        yield one, two


def test_two_machines_train_from_the_server_on_a_third_until_the_link_is_cut(server, tmp_path):
    """Both train three steps; then the second machine is disconnected, and both sides end within the bound."""
    run = tmp_path / "runs/quickstart/0"
    logs = [tmp_path / "one.log", tmp_path / "two.log"]

    def said() -> str:
        return "\n".join(log.read_text()[-3000:] for log in logs)

    try:
        with two_nodes(tmp_path, server, 500) as nodes:
            deadline = time.monotonic() + 300
            while not (run / "metrics.csv").exists() or (run / "metrics.csv").read_text().count("\n") < 4:
                assert time.monotonic() < deadline, said()
                assert [process.poll() for process in nodes] == [None, None], said()
                time.sleep(0.5)
            ip("link", "set", "fpl-two-b", "down")
            cut = time.monotonic()
            codes = [process.wait(BOUND_S) for process in nodes]
            assert time.monotonic() - cut < BOUND_S
    finally:
        ip("link", "set", "fpl-two-b", "up")
    assert 0 not in codes
    assert [folder.name for folder in run.parent.iterdir()] == ["0"]  # one folder for both
    for rank in (0, 1):
        steps = [json.loads(line)["step"] for line in (run / f"rollouts.jsonl.rank{rank}").read_text().splitlines()]
        assert steps[:24] == [step for step in range(3) for _ in range(8)]  # 2 items of 4 siblings on each
    assert "Rank 0 of 2 lost another" in logs[0].read_text(), said()
    assert "continue with --ckpt_path" in logs[0].read_text()
