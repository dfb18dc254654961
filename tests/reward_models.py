"""Tiny reward models in folders, and the double of a vLLM server that has one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from tests.doubles import save_tiny_model

MAX_LENGTH = 96


def save_reward_model(folder: Path, num_labels: int = 1, **config) -> Path:
    """A two-layer classifier with random weights over the characters of the tiny model, and its tokenizer."""
    save_tiny_model(folder)
    of_policy = LlamaConfig.from_pretrained(folder).to_dict()
    torch.manual_seed(7)
    changes = {"num_labels": num_labels, "max_position_embeddings": MAX_LENGTH, **config}
    LlamaForSequenceClassification(LlamaConfig(**{**of_policy, **changes})).save_pretrained(folder)
    return folder


def plain_outputs(folder: Path, text: str) -> list[float]:
    """The outputs of a model for one text, computed by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer.encode(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return model(ids).logits[0].tolist()


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Says nothing: a test's client may be gone."""


class RewardServerDouble:
    """Answers `/v1/models`, `/classify` and `/pooling` of vLLM 0.32 by the model of a folder, one row at a time.

    `failures` are the status codes of the next answers to POST requests.
    """

    def __init__(self, folder: Path, name: str | None = None, key: str | None = None) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.name, self.key = name or str(folder), key
        self.failures: list[int] = []
        self.asked: list[tuple[str, dict]] = []
        self.hangs = threading.Event()
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"double": self}))
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name, "root": self.name, "max_model_len": MAX_LENGTH}]}
        self.asked.append((path, body))
        if self.failures:
            return self.failures.pop(0), {"error": {"message": "on purpose"}}
        with torch.no_grad():
            outputs = [self.model(torch.tensor([row])).logits[0].sigmoid() for row in body["input"]]
            if body["use_activation"] is False:
                outputs = [output.logit() for output in outputs]
        field = {"/classify": "probs", "/pooling": "data"}[path]
        data = [{"index": index, field: output.tolist()} for index, output in enumerate(outputs)]
        return 200, {"data": data[::-1]}  # each with its index, in any order


class _Handler(BaseHTTPRequestHandler):
    double: RewardServerDouble

    def do_GET(self):
        self._respond({})

    def do_POST(self):
        self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _respond(self, body: dict) -> None:
        if self.double.key is not None and self.headers["Authorization"] != f"Bearer {self.double.key}":
            status, found = 401, {"error": "Unauthorized"}
        else:
            status, found = self.double.answer(self.path, body)
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Says nothing."""
