"""Networks that only answer, as teachers of trainings that take hours."""

from __future__ import annotations

import argparse
import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from torch import Tensor, nn
from trainings import digest, sizes_of

from ofa_deploy.train.precision import prefers_bf16


class Ensemble(nn.Module):
    """The mean of several networks' class probabilities, as logits."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, classes)`."""
        chances = [network(x).float().softmax(1) for network in self.networks]
        return torch.stack(chances).mean(0).clamp(min=1e-7).log()


class OnOpenVino(nn.Module):
    """A network that only answers; with the teachers, in half the time torch takes.

    Args:
        network: Of one output.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._request: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """Its output for `(N, channels, H, W)`."""
        inputs = x.contiguous()
        if self._request is None:
            self._request = self._compiled(inputs).create_infer_request()
        return torch.from_numpy(self._request.infer([inputs.numpy()])[0].copy())

    def _compiled(self, inputs: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            model = openvino.convert_model(self.network, example_input=inputs)
        settings = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if prefers_bf16() else "f32",
        }
        return openvino.Core().compile_model(model, "CPU", settings)


class AskedOnce(nn.Module):
    """A network that is asked but once about each batch, by whichever training.

    Rivals of one recipe see the same batches, and the smallest of them take less time
    than their teacher.

    Args:
        network: Of one output, `(N, classes)`.
        folder: Keeps what it said, in a file of its weights' name.
    """

    def __init__(self, network: nn.Module, folder: Path) -> None:
        super().__init__()
        self.network = network
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"said-{digest({}, sizes_of(network))}.sqlite"
        self._said = sqlite3.connect(path, isolation_level=None)
        # What a power cut loses is asked again.
        self._said.execute("PRAGMA synchronous = OFF")
        self._said.execute(
            "CREATE TABLE IF NOT EXISTS said (batch BLOB PRIMARY KEY, logits BLOB)"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Its output for `(N, channels, H, W)`."""
        batch = hashlib.sha256(x.permute(0, 2, 3, 1).numpy().tobytes()).digest()
        query = "SELECT logits FROM said WHERE batch = ?"
        if row := self._said.execute(query, (batch,)).fetchone():
            values = np.frombuffer(row[0], dtype=np.float32).reshape(len(x), -1)
            return torch.from_numpy(values.copy())
        logits: Tensor = self.network(x).float()
        said = (batch, logits.numpy().tobytes())
        self._said.execute("INSERT OR IGNORE INTO said VALUES (?, ?)", said)
        return logits


def asked_once(teacher: nn.Module, args: argparse.Namespace) -> AskedOnce:
    """A teacher whose words are kept for whoever is trained on the same batches."""
    return AskedOnce(teacher, args.work / "teachers")
