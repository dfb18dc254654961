"""Whole weights for a vLLM server through vLLM's own weight transfer, from the trainer's GPU to those of the server.

Nothing of this was run on a GPU. See https://docs.vllm.ai/en/v0.32.0/training/weight_transfer/ for what it relies on.
"""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from fuchsia_pl.engines.base import EngineError
from fuchsia_pl.engines.merge import checkpoint_weights
from fuchsia_pl.engines.published import PublishedWeights
from fuchsia_pl.engines.vllm_http import QUICK_TIMEOUT_S, ServerGoneError, UnknownWeightsError, VLLMClient, key_headers

# What a server says it serves while its weights are being replaced, and where that failed half-way.
CHANGING = "changing"
POLL_S = 0.5


class WeightSender:
    """Sends weights from one GPU, to one server at a time.

    Args:
        device_index: Which GPU.
        api_key: What the servers were started with, None where they ask for none.
    """

    def __init__(self, device_index: int, api_key: str | None) -> None:
        self._device_index = device_index
        self._api_key = api_key
        self._lock = asyncio.Lock()
        self._sending: Future[None] | None = None

    async def send(self, url: str, folder: Path, num_workers: int, timeout_s: float) -> None:
        """Sends a model folder to a server's GPUs.

        Raises:
            EngineError: It failed.
        """
        async with self._lock:
            if self._sending is not None:  # one that its caller gave up; NCCL lets none pass by it
                await asyncio.wait([asyncio.wrap_future(self._sending)])
            self._sending = in_thread(
                lambda: send_over_nccl(url, self._api_key, folder, num_workers, self._device_index, timeout_s)
            )
            try:
                # Shielded: what is no longer waited for still has the GPU.
                await asyncio.shield(asyncio.wrap_future(self._sending))
            except Exception as error:  # of NCCL, of vLLM or of its server: none says what a user can do
                raise EngineError(
                    f"vLLM's weight transfer to {url} failed ({type(error).__name__}: {error}): the server needs a GPU and has "
                    "to reach this machine at any port. Start it anew before the next run"
                ) from error


class WeightTransferClient(VLLMClient):
    """A vLLM server whose own weights are replaced. It says which ones it has, and only answers with those count.

    The endpoints are those of vLLM's development mode, which `fuchsia serve` opens where all weights are trained, behind the
    same key as every other.

    Args:
        url: Of the server, without `/v1`.
        api_key: What the server was started with, None where it asks for none.
        sender: Who sends; None on a rank that waits until another has sent.
    """

    def __init__(self, url: str, api_key: str | None, sender: WeightSender | None) -> None:
        super().__init__(url, api_key)
        self._sender = sender
        self._base: str | None = None

    async def serve(self, weights: PublishedWeights, timeout_s: float) -> None:
        """Sends weights to the server, or waits until they were sent, or returns at once where it has them.

        Args:
            weights: A whole model.
            timeout_s: Bound in seconds.

        Raises:
            ServerGoneError: The server does not answer, is broken, or is not sent to by the rank that sends.
            EngineError: It runs and refuses, or the transfer did not end in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if await self._served(timeout_s) == weights.name:
                    return
                if self._sender is not None:
                    await self._replace(self._sender, weights, timeout_s)
                while await self._served(timeout_s) != weights.name:
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            words = (
                f"the vLLM server {self.url} did not have {weights.name} within {timeout_s:g} s: resume the run from its last "
                "checkpoint, with a server that was started anew"
            )
            raise (ServerGoneError if self._sender is None else EngineError)(words) from None

    async def forget(self, names: set[str]) -> None:
        """Nothing is to be freed: new weights take the place of the old ones."""

    async def complete(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Asks for a completion by the weights of the body's name; see `VLLMClient.complete`."""
        if self._base is None:
            self._base = (await self.base_model())["id"]
        await self._check_served(body["model"], timeout_s)
        answer = await super().complete({**body, "model": self._base}, timeout_s)
        # They change only where nothing runs, and never back to what they were: those of before and after are what answered.
        await self._check_served(body["model"], timeout_s)
        return {**answer, "model": body["model"]}

    async def _check_served(self, name: str, timeout_s: float) -> None:
        served = await self._served(timeout_s)
        if served != name:
            raise UnknownWeightsError(f"it has {served}")

    async def _replace(self, sender: WeightSender, weights: PublishedWeights, timeout_s: float) -> None:
        """Leaves a server whose weights are half there paused and without a name: nobody is answered by it."""
        num_workers = (await self._control("GET", "/get_world_size", timeout_s))["world_size"]
        await self._control("POST", "/update_weight_version", timeout_s, {"new_version": CHANGING})
        await self._control("POST", "/pause?mode=wait", timeout_s)
        await sender.send(self.url, weights.folder, num_workers, timeout_s)
        if not (await self._control("POST", "/reset_prefix_cache", timeout_s))["success"]:
            raise EngineError(f"the vLLM server {self.url} did not reset its prefix cache")
        await self._control("POST", "/update_weight_version", timeout_s, {"new_version": weights.name})
        await self._control("POST", "/resume", timeout_s)

    async def _served(self, timeout_s: float) -> str:
        return (await self._control("GET", "/weight_info", timeout_s))["weight_version"]

    async def _control(
        self, method: str, path: str, timeout_s: float, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        response = await self._request(method, path, timeout_s, body)
        if response.is_server_error:
            raise ServerGoneError(f"{path} answered {response.status_code} {response.text}")
        if response.status_code != httpx.codes.OK:
            raise EngineError(
                f"the vLLM server {self.url} answered {path} with {response.status_code}: start it with `fuchsia serve` and the "
                "configs of this run, with which it takes whole weights"
            )
        return response.json()


class FolderSource:
    """The weights of a model folder, as vLLM's `WeightSource` has them.

    Args:
        folder: What `Policy.save_trained` wrote.
        device: Where a tensor is put before it is sent.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def metadata(self) -> list[Any]:
        """Name, type and shape of each tensor, in the order of iteration."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in checkpoint_weights(self.folder)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one at a time on the device."""
        for name, tensor in checkpoint_weights(self.folder):
            yield name, tensor.to(self.device)


class ControlPlane:
    """What vLLM's sender asks of a server (its `VLLMWeightSyncClient`; vLLM's own would go through a proxy).

    Args:
        url: Of the server.
        api_key: Of the server, None where it asks for none.
        timeout_s: Bound of each request in seconds.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self._http = httpx.Client(base_url=url, headers=key_headers(api_key), timeout=timeout_s, trust_env=False)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Makes the server's GPUs join a group."""
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Before the weights."""
        self._post("/start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Returns when the server has received what is announced here."""
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """After the weights."""
        self._post("/finish_weight_update", {"weight_version": weight_version})

    def shutdown_weight_transfer_engine(self) -> None:
        """Makes the server's GPUs leave the group."""
        self._post("/shutdown_weight_transfer_engine", {})

    def close(self) -> None:
        """Closes the connection."""
        self._http.close()

    def _post(self, path: str, body: dict[str, Any]) -> None:
        response = self._http.post(path, json=body)
        if response.is_error:
            raise RuntimeError(f"{path} answered {response.status_code} {response.text}")


def send_over_nccl(
    url: str, api_key: str | None, folder: Path, num_workers: int, device_index: int, timeout_s: float
) -> None:
    """Sends a model folder to a server. A group of its own each time: a server that was started anew knows nothing of an earlier.

    Args:
        url: Of the server.
        api_key: Of the server, None where it asks for none.
        folder: The weights.
        num_workers: GPUs of the server.
        device_index: The GPU to send from.
        timeout_s: Bound of each request to the server; NCCL has none.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    torch.cuda.set_device(device_index)
    address, port = own_address(url)
    info = NCCLTrainerInitInfo(address, port, world_size=num_workers + 1, rank=0)
    source: Any = FolderSource(folder, torch.device("cuda", device_index))
    control = ControlPlane(url, api_key, timeout_s)
    try:
        sender = WeightTransferTrainerFactory.trainer_init(info, client=control, source=source)
        try:
            sender.send_weights()
            control.shutdown_weight_transfer_engine()
        finally:
            sender.shutdown()
    finally:
        control.close()


def own_address(url: str) -> tuple[str, int]:
    """This machine's address as a server sees it, and a free port."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname, port), QUICK_TIMEOUT_S) as connection:
        address = connection.getsockname()[0]
    with socket.socket(connection.family) as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def in_thread(function: Callable[[], None]) -> "Future[None]":
    """Starts a function that may never return; unlike those of an executor, its thread keeps no process from ending."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            function()
        except BaseException as error:  # whoever waits gets it
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="weight-transfer", daemon=True).start()
    return done
