"""The encoder behind mosec: a stage that decodes and one that encodes, as its guide advises.

Without JPEGs there is one stage: every further one is a hand-over between processes.
"""

from __future__ import annotations

import sys
from typing import Any

from mosec import Server, Worker

from benchmarks.peers.encoder import PeerEncoder, Setting

SETTING = Setting.read()


class Decode(Worker):
    """Reads bodies."""

    def __init__(self) -> None:
        super().__init__()
        self._encoder = PeerEncoder(SETTING)

    def deserialize(self, data: bytes) -> Any:
        """Give the pixels of a body."""
        return self._encoder.read(data)

    def forward(self, data: Any) -> Any:
        """Pass them on."""
        return data


class Encode(Worker):
    """Encodes batches."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self._encoder = PeerEncoder(SETTING)

    def deserialize(self, data: bytes) -> Any:
        """Give the pixels of a body, where this is the first stage."""
        return self._encoder.read(data)

    def forward(self, data: Any) -> Any:
        """Encode a batch of requests, or the only one."""
        if SETTING.max_requests == 1:
            return self._encoder.encode([data])[0]
        return self._encoder.encode(data)

    def serialize(self, data: Any) -> bytes:
        """Give the bytes of a reply."""
        return bytes(data.tobytes())


if __name__ == "__main__":
    sys.argv += ["--port", str(SETTING.port), "--address", "127.0.0.1", "--log-level", "warning"]
    server = Server()
    if SETTING.payload == "jpeg":
        server.append_worker(Decode, num=2)
    server.append_worker(
        Encode, num=SETTING.instances, max_batch_size=SETTING.max_requests, max_wait_time=1
    )
    server.run()
