"""The encoder behind LitServe, batched: bodies in base64 in JSON, as its guide sends images."""

from __future__ import annotations

import base64
from typing import Any

import litserve
from fastapi import Response

from benchmarks.peers.encoder import PeerEncoder, Setting

SETTING = Setting.read()


class EncoderApi(litserve.LitAPI):
    """Decodes, encodes a batch, and gives the bytes."""

    def setup(self, device: str) -> None:
        """Load the encoder."""
        self._encoder = PeerEncoder(SETTING)

    def decode_request(self, request: dict[str, str], **_: Any) -> Any:
        """Give the pixels of a request."""
        return self._encoder.read(base64.b64decode(request["images"]))

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Keep the requests of a batch apart: they may differ in length."""
        return inputs

    def predict(self, x: Any, **_: Any) -> list[Any]:
        """Encode a batch of requests, or the only one."""
        if SETTING.max_requests == 1:
            return self._encoder.encode([x])
        return self._encoder.encode(x)

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Give each request its vectors."""
        return output

    def encode_response(self, output: Any, **_: Any) -> Response:
        """Give the bytes of a reply."""
        vectors = output[0] if SETTING.max_requests == 1 else output
        return Response(content=vectors.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    api = EncoderApi(max_batch_size=SETTING.max_requests, batch_timeout=0.001)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=SETTING.instances, fast_queue=True
    )
    server.run(
        host="127.0.0.1", port=SETTING.port, num_api_servers=1, log_level="warning",
        generate_client_file=False, access_log=False,
    )  # fmt: skip
