from __future__ import annotations

import asyncio

from models.errors import HoraceError
from serve.reloading import Reloads


def test_a_hook_that_fails_is_told_and_the_others_run(caplog):
    """A damaged key file keeps no bundle from being read again."""
    read = []

    async def keys() -> None:
        raise HoraceError("keys.json", expected="JSON", found="none")

    async def ours() -> None:
        raise KeyError("a bug")

    async def bundles() -> None:
        read.append("bundles")

    async def main() -> Reloads:
        reloads = Reloads()
        for hook in (keys, ours, bundles):
            reloads.register(hook.__name__, hook)
        assert await reloads.run() == ["keys", "ours"]
        assert await reloads.run() == ["keys", "ours"]
        return reloads

    reloads = asyncio.run(main())
    assert repr(reloads) == "<Reloads of keys, ours, bundles>"
    assert read == ["bundles", "bundles"]
    assert reloads.statistics().failures == {"keys": 2, "ours": 2, "bundles": 0}
    assert reloads.statistics().runs == 2
    assert "reload of keys refused, what was there stays: keys.json: expected JSON" in caplog.text


def test_reloads_follow_one_another():
    """The second waits for the first: no file is read by two at once."""
    order = []

    async def main() -> None:
        reloads, go = Reloads(), asyncio.Event()

        async def slow() -> None:
            order.append("begins")
            await go.wait()
            order.append("ends")

        reloads.register("slow", slow)
        both = asyncio.gather(reloads.run(), reloads.run())
        while not order:
            await asyncio.sleep(0)
        go.set()
        await both

    asyncio.run(main())
    assert order == ["begins", "ends"] * 2
