"""`--bundle triton://...`: the same Embed in front of real tritonservers, one of which dies."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import numpy as np
import pytest

from models.encoder import open_encoder
from serve.client import AsyncClient, RetryPolicy
from tests.tritonserver import SITE_PACKAGES, tritonserver
from train.export.triton import TritonOptions, write_model

ONCE = RetryPolicy(attempts=1)
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 28, 28, 1), dtype=np.uint8)


@pytest.mark.parametrize("frontend", ["native"])  # it has no part in this
def test_a_triton_killed_under_load_fails_no_request(serving, make_bundle, tmp_path):
    """Its requests in flight go to the other; when it is back, it is used again."""
    bundle = make_bundle("cats", dim=16)
    repository = tmp_path / "repository"
    write_model(
        TritonOptions(
            bundle=bundle.path, out=repository, backend="python", threads=1,
            site_packages=SITE_PACKAGES,
        )
    )  # fmt: skip
    expected = open_encoder(bundle.path, threads=1).encode(IMAGES)

    async def load(client: AsyncClient, going: asyncio.Event, answered: list[int]) -> None:
        """Ask for one image after the other; every answer is held to the encoder's own."""
        n = 0
        while going.is_set():
            reply = await client.embed([IMAGES[n % 64]], normalize=False)
            assert reply.raise_for_status().vectors[0].tobytes() == expected[n % 64].tobytes()
            answered.append(n)
            n += 1

    async def scenario(stack: ExitStack):
        first = stack.enter_context(tritonserver(repository, tmp_path))
        second = stack.enter_context(tritonserver(repository, tmp_path))
        uri = f"mine=triton://{first.address},{second.address}/cats,instances=4"
        going, answered = asyncio.Event(), []
        going.set()
        async with (
            serving(bundle=(uri,)) as server,
            AsyncClient(server.address, retry=ONCE) as client,
        ):
            (model,) = await client.list_models()
            assert (model.name, model.fingerprint) == ("mine", bundle.fingerprint)
            callers = [asyncio.create_task(load(client, going, answered)) for _ in range(16)]

            async def answer(count: int) -> None:
                """Wait for so many more answers."""
                enough = len(answered) + count
                async with asyncio.timeout(120):
                    while len(answered) < enough:
                        assert not any(caller.done() for caller in callers), callers
                        await asyncio.sleep(0.01)

            await answer(200)
            first.kill()
            await answer(200)
            encoder = server.catalog.models["mine"].encoder
            assert f"{first.address} failed" in repr(encoder)
            port = int(first.address.rpartition(":")[2])
            again = tritonserver(repository, tmp_path, port=port)
            await asyncio.to_thread(stack.enter_context, again)
            async with asyncio.timeout(240):
                while f"{first.address} failed" in repr(encoder):
                    await answer(20)
            going.clear()
            await asyncio.gather(*callers)

    with ExitStack() as stack:
        asyncio.run(scenario(stack))
