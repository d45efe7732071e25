"""The encoder as every Python-served peer runs it: same graph, same runtime, same pixels.

It is imported in the peers' own environments, which have numpy, onnxruntime, Pillow and
simplejpeg, and Horace's root on their path for `models.preprocess` alone: JPEGs are decoded
by the same code everywhere.

A body is uint8 pixels (N, H, W, C) as they lie in memory, or N JPEGs, each after its length
as a little-endian uint32. A reply is (N, D) float32 as it lies in memory.

Settings come as environment variables: see `Setting`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from models.preprocess import PreprocessSpec, preprocess

LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a peer is to serve.

    Attributes:
        bundle: directory of the encoder.
        payload: `tensor` or `jpeg`.
        port: where to listen.
        instances: of the encoder, that run side by side.
        threads: of ONNX Runtime, in each.
        max_requests: the largest batch, in requests.
    """

    bundle: Path
    payload: str
    port: int
    instances: int
    threads: int
    max_requests: int

    @classmethod
    def read(cls) -> Setting:
        """Read it from the environment."""
        value = os.environ
        return cls(
            bundle=Path(value["PEER_BUNDLE"]),
            payload=value["PEER_PAYLOAD"],
            port=int(value["PEER_PORT"]),
            instances=int(value["PEER_INSTANCES"]),
            threads=int(value["PEER_THREADS"]),
            max_requests=int(value["PEER_MAX_REQUESTS"]),
        )

    def environment(self) -> dict[str, str]:
        """Write it for a process."""
        return {
            "PEER_BUNDLE": str(self.bundle.resolve()),
            "PEER_PAYLOAD": self.payload,
            "PEER_PORT": str(self.port),
            "PEER_INSTANCES": str(self.instances),
            "PEER_THREADS": str(self.threads),
            "PEER_MAX_REQUESTS": str(self.max_requests),
        }


class PeerEncoder:
    """A bundle's graph in ONNX Runtime, with the options that Horace gives it."""

    def __init__(self, setting: Setting) -> None:
        """Load the graph."""
        facts = json.loads((setting.bundle / "bundle.json").read_text())
        self.spec = PreprocessSpec.from_json(facts["preprocessing"])
        self._is_jpeg = setting.payload == "jpeg"
        options = ort.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(
            str(setting.bundle / "encoder.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def read(self, body: bytes) -> Any:
        """Give the pixels of a body, (N, H, W, C) uint8."""
        spec = self.spec
        if self._is_jpeg:
            return np.stack([preprocess(jpeg, spec) for jpeg in split(bytes(body))])
        return np.frombuffer(body, np.uint8).reshape(-1, spec.height, spec.width, spec.channels)

    def encode(self, images: Sequence[Any]) -> list[Any]:
        """Encode the pixels of several requests together; give each its vectors."""
        (vectors_ND,) = self._session.run(None, {"images": np.concatenate(images)})
        ends = np.cumsum([len(part) for part in images])[:-1]
        return np.split(vectors_ND, ends)


def split(body: bytes) -> list[bytes]:
    """Split what `join` joined."""
    files, at = [], 0
    while at < len(body):
        start = at + LENGTH.size
        at = start + LENGTH.unpack_from(body, at)[0]
        files.append(body[start:at])
    return files


def join(files: Sequence[bytes]) -> bytes:
    """Lay files side by side, each after its length."""
    return b"".join(LENGTH.pack(len(file)) + file for file in files)
