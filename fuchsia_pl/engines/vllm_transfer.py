"""Whole weights for a vLLM server through vLLM's own weight transfer, from the trainer's GPU to those of the server.

Untested on a GPU. The protocol is described at https://docs.vllm.ai/en/v0.32.0/training/weight_transfer/.
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
from fuchsia_pl.engines.server_client import HostedModel, ServerGoneError, UnknownWeightsError
from fuchsia_pl.engines.vllm_http import QUICK_TIMEOUT_S, VLLMClient, key_headers
from fuchsia_pl.engines.vllm_worker import gpu_uuid
from fuchsia_pl.types import ConfigError

# The weight version of a server while its weights are replaced, and after a replacement failed half-way.
CHANGING = "changing"
POLL_S = 0.5


class WeightSender:
    """Sends weights from one GPU, to one server at a time.

    Args:
        device_index: Index of the GPU.
        api_key: Key of the servers, None if they require none.
    """

    def __init__(self, device_index: int, api_key: str | None) -> None:
        self.device_index = device_index
        self._api_key = api_key
        self._lock = asyncio.Lock()
        self._sending: Future[None] | None = None

    async def send(self, url: str, folder: Path, num_workers: int, timeout_s: float) -> None:
        """Sends a model folder to a server's GPUs.

        Raises:
            EngineError: The transfer failed.
        """
        async with self._lock:
            if self._sending is not None:  # its caller has timed out, but NCCL allows no second transfer beside it
                await asyncio.wait([asyncio.wrap_future(self._sending)])
            self._sending = in_thread(
                lambda: send_over_nccl(url, self._api_key, folder, num_workers, self.device_index, timeout_s)
            )
            try:
                # Shielded: a transfer still occupies the GPU after its caller has timed out.
                await asyncio.shield(asyncio.wrap_future(self._sending))
            except Exception as error:  # errors of NCCL, of vLLM or of its server, none with a remedy for the user
                raise EngineError(
                    f"vLLM's weight transfer to {url} failed ({type(error).__name__}: {error}): the server needs a GPU and has "
                    "to reach this machine at any port. Start it anew before the next run"
                ) from error


class WeightTransferClient(VLLMClient):
    """Client of a vLLM server whose own weights are replaced. It checks the server's weight version around each request.

    The endpoints are those of vLLM's development mode. `fuchsia serve` opens them if all weights are trained, behind the same
    key as every other endpoint.

    Args:
        url: Of the server, without `/v1`.
        api_key: Key that the server was started with, None if it requires none.
        sender: Sends the weights; None on a rank that waits for another rank to send them.
    """

    def __init__(self, url: str, api_key: str | None, sender: WeightSender | None) -> None:
        super().__init__(url, api_key)
        self._sender = sender
        self._base: str | None = None

    async def model(self) -> HostedModel:
        """The model that the server was started with. The sending rank also compares the server's GPUs with its own.

        Raises:
            ConfigError: The server is on the GPU that sends. NCCL refuses a group with one GPU twice.
        """
        if self._sender is not None:
            answer = await self._control("POST", "/collective_rpc", QUICK_TIMEOUT_S, {"method": "device_uuid"})
            if gpu_uuid(self._sender.device_index) in answer["results"]:
                raise ConfigError(
                    f"the vLLM server {self.url} is on the trainer's GPU, and NCCL sends weights to other GPUs only: start it "
                    "with another CUDA_VISIBLE_DEVICES, train an adapter, or use VLLMColocatedEngine"
                )
        return await super().model()

    async def load(self, weights: PublishedWeights, timeout_s: float) -> None:
        """Sends weights to the server, or waits until another rank has sent them. Returns at once if the server has them.

        Args:
            weights: A whole model.
            timeout_s: Bound in seconds.

        Raises:
            ServerGoneError: The server does not answer, is broken, or got no weights from the sending rank in time.
            EngineError: The server refuses them, or the transfer did not end in time.
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
            message = (
                f"the vLLM server {self.url} did not have {weights.name} within {timeout_s:g} s: resume the run from its last "
                "checkpoint, with a server that was started anew"
            )
            raise (ServerGoneError if self._sender is None else EngineError)(message) from None

    async def forget(self, names: set[str]) -> None:
        """Does nothing: new weights replace the old ones."""

    async def _answer(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer that the weights named in the body have computed, although the server lists only its base model."""
        if self._base is None:
            self._base = (await self.model()).id
        await self._check_served(body["model"], timeout_s)
        answer = await super()._answer({**body, "model": self._base}, timeout_s)
        # Weights never change back, so weights that are the same before and after the request have answered it.
        await self._check_served(body["model"], timeout_s)
        return {**answer, "model": body["model"]}

    async def _check_served(self, name: str, timeout_s: float) -> None:
        served = await self._served(timeout_s)
        if served != name:
            raise UnknownWeightsError(f"the server has {served}")

    async def _replace(self, sender: WeightSender, weights: PublishedWeights, timeout_s: float) -> None:
        """Replaces the server's weights. If this fails, the server stays paused, with a weight version that no request names."""
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
    """The weights of a model folder, with the interface of vLLM's `WeightSource`.

    Args:
        folder: A folder that `Policy.save_trained` wrote.
        device: Device to which a tensor is copied before it is sent.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def metadata(self) -> list[Any]:
        """Name, type and shape of each tensor, in the order of iteration."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in checkpoint_weights(self.folder)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and tensor. One tensor at a time is on the device."""
        for name, tensor in checkpoint_weights(self.folder):
            yield name, tensor.to(self.device)


class ControlPlane:
    """Requests of vLLM's sender to a server (a `VLLMWeightSyncClient`; vLLM's own one would use a proxy).

    Args:
        url: Of the server.
        api_key: Of the server, None if it requires none.
        timeout_s: Bound of each request in seconds.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self._http = httpx.Client(base_url=url, headers=key_headers(api_key), timeout=timeout_s, trust_env=False)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Makes the server's GPUs join a group."""
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Prepares the server for new weights; called before they are sent."""
        self._post("/start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Returns when the server has received the announced weights."""
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Completes the update; called after the weights are sent."""
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
    """Sends a model folder to a server. Each transfer creates a group, since a restarted server is in no earlier one.

    Args:
        url: Of the server.
        api_key: Of the server, None if it requires none.
        folder: The weights.
        num_workers: Number of GPUs of the server.
        device_index: Index of the GPU that sends.
        timeout_s: Bound of each request to the server. NCCL has no bound.
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
    """The address of this machine for a server, and a free port."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname, port), QUICK_TIMEOUT_S) as connection:
        address = connection.getsockname()[0]
    with socket.socket(connection.family) as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def in_thread(function: Callable[[], None]) -> "Future[None]":
    """Runs a function that may never return. Unlike a thread of an executor, its thread does not delay the end of the process."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            function()
        except BaseException as error:  # raised where the future is awaited
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="weight-transfer", daemon=True).start()
    return done
