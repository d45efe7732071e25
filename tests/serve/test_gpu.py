"""A model on CUDA, served."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient

from models.bundle import SHIPPED_BUNDLE
from models.encoder import open_encoder
from serve.client import Client

pytestmark = pytest.mark.gpu

PATIENCE_S = 60

IMAGES = np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8)


def test_a_gpu_serves_the_vectors_of_a_cpu(start_server):
    """In requests of every size; and the server ends as ever."""
    expected = open_encoder(SHIPPED_BUNDLE, threads=1).encode(IMAGES[..., None])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    server = start_server("--bundle", f"m={SHIPPED_BUNDLE},provider=cuda")
    with Client(server.address) as client:
        for count in (1, 5, 32, 33, 100):
            found = client.embed(list(IMAGES[:count])).vectors
            assert (found * expected[:count]).sum(axis=1).min() > 1 - 1e-5
    assert server.stop() == 0


def test_loads_and_unloads_leave_the_gpus_memory_as_it_is(start_server):
    """A night of them must not fill it."""
    torch = pytest.importorskip("torch")
    server = start_server("--bundle", f"m={SHIPPED_BUNDLE},provider=cuda", "--model-control")

    def free():
        return torch.cuda.mem_get_info()[0]

    with Client(server.address) as client, InferenceServerClient(server.address) as control:
        control.unload_model("m")
        control.load_model("m")
        loaded = free()
        for _ in range(5):
            assert client.embed(list(IMAGES)).vectors.shape == (100, 512)
            control.unload_model("m")
            control.load_model("m")
        deadline_s = time.monotonic() + PATIENCE_S
        while loaded - free() > 64 << 20:  # the version before is closed once nobody has it
            assert time.monotonic() < deadline_s, "what was unloaded is still there"
            time.sleep(0.1)
    assert server.stop() == 0
