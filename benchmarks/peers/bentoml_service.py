"""The encoder behind BentoML, batched: bodies in base64 in JSON, replies likewise."""

from __future__ import annotations

import base64

import bentoml

from benchmarks.peers.encoder import PeerEncoder, Setting

SETTING = Setting.read()


@bentoml.service(
    workers=SETTING.instances, traffic={"timeout": 60}, logging={"access": {"enabled": False}}
)
class EncoderService:
    """Decodes and encodes batches."""

    def __init__(self) -> None:
        self._encoder = PeerEncoder(SETTING)

    @bentoml.api(
        batchable=True, max_batch_size=SETTING.max_requests, max_latency_ms=60_000, route="/embed"
    )
    def embed(self, bodies: list[str]) -> list[str]:
        """Give the vectors of each body."""
        images = [self._encoder.read(base64.b64decode(body)) for body in bodies]
        parts = self._encoder.encode(images)
        return [base64.b64encode(part.tobytes()).decode() for part in parts]
