"""The double of a vLLM server: the endpoints that `VLLMServerEngine` uses, over real HTTP, and its failures."""

import asyncio
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fuchsia_pl.engines.base import VERSION_FILE, EngineSpec, SamplingParams
from fuchsia_pl.types import ServedModel

IDS = [5, 2]
SAMPLING = SamplingParams(1.0, max_tokens=4, seed=7, stop=("</a>",), stop_token_ids=(2,))


class _Http(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def handle_error(self, request, client_address) -> None: ...


class FakeServer:
    """Answers with two ids. Their logprobs are the sum of the requested adapter's weights, through a prefix cache like vLLM's.

    `mode` is the treatment of completions: "well", "hang" (no answer), "cut" (the connection is closed), or a status code.
    """

    def __init__(self, model: str = "/models/tiny", max_model_len: int = 64, api_key: str | None = None) -> None:
        self.model, self.max_model_len, self.api_key = model, max_model_len, api_key
        self.mode: str | int = "well"
        self.health: str | int = 200
        self.change: dict = {}  # replaces fields of the one choice of each answer
        self.answers: dict = {}  # replaces fields of each answer
        self.bodies: list[dict] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.release = threading.Event()
        self.takes_weights = False  # like vLLM in development mode, which accepts new weights of its model
        self.controls: list[str] = []  # requests in that mode, except `GET /weight_info`
        self.resets = True  # whether it clears its prefix cache
        self.gpus = ["GPU-a", "GPU-b"]
        self._open(port=0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _open(self, port: int) -> None:
        self.adapters: dict[str, str] = {}
        self.cache: dict[tuple, float] = {}
        self.weight_version, self.weights = "default", Path()
        self.connections: list[socket.socket] = []
        self._http = _Http(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": self}))
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self.release.set()

    def restart(self) -> None:
        """Starts it again on the same port, without adapters."""
        self.mode, self.health, self.release = "well", 200, threading.Event()
        self._open(self.port)

    def respond(self, method: str, path: str, body: dict, key: str | None) -> tuple[int, dict]:
        if path == "/health":
            return self._perhaps(self.health, {})
        if self.api_key is not None and key != f"Bearer {self.api_key}":
            return 401, {"error": "Unauthorized"}
        if path == "/v1/models":
            base = {"id": self.model, "root": self.model, "parent": None, "max_model_len": self.max_model_len}
            return 200, {
                "data": [base, *({"id": n, "root": p, "parent": self.model} for n, p in self.adapters.items())]
            }
        if path == "/v1/load_lora_adapter":
            return self._load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            self.unloads.append(body["lora_name"])
            return (200, {}) if self.adapters.pop(body["lora_name"], None) else (404, {})
        if path != "/v1/completions":
            return self._control(f"{method} {path}", body) if self.takes_weights else (404, {"detail": "Not Found"})
        self.bodies.append(body)
        if body["model"] not in self.adapters and not (self.takes_weights and body["model"] == self.model):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        return self._perhaps(200 if self.mode == "well" else self.mode, self._completion(body))

    def _control(self, asked: str, body: dict) -> tuple[int, dict]:
        if asked == "GET /weight_info":
            return 200, {"weight_version": self.weight_version}
        self.controls.append(asked)
        if asked == "GET /get_world_size":
            return 200, {"world_size": len(self.gpus)}
        if asked == "POST /collective_rpc":
            assert body == {"method": "device_uuid"}
            return 200, {"results": self.gpus}
        if asked == "POST /update_weight_version":
            self.weight_version = body["new_version"]
        elif asked == "POST /reset_prefix_cache":
            self.cache.clear()
            return 200, {"success": self.resets}
        elif asked not in ("POST /pause?mode=wait", "POST /resume"):
            return 404, {"detail": "Not Found"}
        return 200, {}

    def _perhaps(self, mode: str | int, answer: dict) -> tuple[int, dict]:
        if mode == "hang":
            self.release.wait(60)
        if isinstance(mode, str):
            raise ConnectionAbortedError
        return mode, answer if mode == 200 else {"error": "as it was told to"}

    def _load(self, name: str, path: str) -> tuple[int, dict]:
        self.loads.append(name)
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        if not (Path(path) / "adapter_model.safetensors").exists():
            return 404, {"error": {"message": f"Loading lora {name} failed: No adapter found for {path}"}}
        self.adapters[name] = path
        return 200, {}

    def _completion(self, body: dict) -> dict:
        path = self.adapters.get(body["model"])
        file = self.weights / "model.safetensors" if path is None else Path(path) / "adapter_model.safetensors"
        key = (body["model"], path, tuple(body["prompt"]))
        if key not in self.cache:
            self.cache[key] = sum(float(t.sum()) for t in load_file(file).values())
        value = self.cache[key]
        choice = {
            "token_ids": IDS,
            "logprobs": {"token_logprobs": [value] * len(IDS)},
            "finish_reason": "stop",
            "stop_reason": None,
        }
        if "prompt_logprobs" in body:  # a wrong id has another logprob
            entries = [None, *({str(token): {"logprob": value, "rank": 1}} for token in body["prompt"][1:])]
            top = {"token_id:3": value - 1.0, **{f"token_id:{token}": value for token in body["logprob_token_ids"]}}
            of_sampled = {"token_logprobs": [value - 1.0], "top_logprobs": [top]}
            choice |= {"token_ids": [3], "logprobs": of_sampled, "prompt_logprobs": entries, "finish_reason": "length"}
        return {"model": body["model"], "choices": [{**choice, **self.change}], **self.answers}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.fake.connections.append(self.connection)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.fake.respond(
            self.command, self.path, json.loads(body or b"{}"), self.headers.get("Authorization")
        )
        status, words = answer[0], json.dumps(answer[1]).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(words)))
        self.end_headers()
        self.wfile.write(words)

    do_POST = do_GET

    def log_message(self, *args) -> None: ...


def make_spec(root: Path, **changes) -> EngineSpec:
    model = ServedModel("/models/tiny", "float32", changes.pop("lora_rank", 4), Path)
    return EngineSpec(model, **{"max_length": 64, "seed": 0, "log_file": root / "run" / "engine.log", **changes})


def wait_until(condition, timeout_s: float = 5.0) -> None:
    end = time.perf_counter() + timeout_s
    while not condition():
        assert time.perf_counter() < end, "waited in vain"
        time.sleep(0.01)


def load(engine, root: Path, version: int, weight: float = -0.25) -> None:
    """Loads an adapter into the engine. Its weights sum to `weight`, which the double returns as every logprob."""
    folder = root / f"adapter-{version}-{weight}"
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.tensor([weight])}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4}))
    (folder / VERSION_FILE).write_text(str(version))
    asyncio.run(engine.load_weights(folder, version))


def ask(engine, number: int = 1, sampling=SAMPLING):
    async def gather():
        return await asyncio.gather(*(engine.generate([1, 10 + n], sampling) for n in range(number)))

    return asyncio.run(gather())
