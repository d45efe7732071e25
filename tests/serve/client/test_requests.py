from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import UsageError
from protos import horace_pb2 as pb
from serve.client import AsyncClient, Client
from serve.client.requests import RequestSize, SearchOptions, group_images, make_queries


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.integers(1, 9))
def test_groups_keep_every_image_in_order_within_the_servers_limits(sizes, most):
    """Nothing is lost, nothing is too large, and an oversize image has its own status."""
    size = RequestSize(images=most, request_bytes=4096 + 2000)
    images = [bytes([n]) * n_bytes for n, n_bytes in enumerate(sizes)]
    groups = list(group_images(images, size))
    assert all(1 <= len(group.images) <= most for group in groups)
    assert all(
        pb.EmbedRequest(images=group.images).ByteSize() <= size.request_bytes for group in groups
    )
    sent = [image.encoded for group in groups for image in group.images]
    assert sent == [image if len(image) + 64 <= 2000 else b"" for image in images]
    refused = [n in g.refused for g in groups for n in range(len(g.images))]
    assert refused == [len(image) + 64 > 2000 for image in images]


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (b"one file", "bytes"),
        (np.zeros((8, 8, 3), np.uint8), r"an array of shape \(8, 8, 3\)"),
        (np.zeros((8, 8), np.uint8), r"an array of shape \(8, 8\)"),
        ("path.png", "str"),
    ],
)
def test_a_single_image_is_not_taken_for_several(images, found):
    """It would be read as its bytes or rows; the line says to put it into a list."""
    with Client("localhost:1") as client, pytest.raises(UsageError, match=f"found {found}; put a"):
        client.embed(images)


def test_a_generator_is_not_called_a_single_image():
    """The line says what takes one."""
    with (
        Client("localhost:1") as client,
        pytest.raises(UsageError, match="found generator; make a list of them, or call embed_iter"),
    ):
        client.embed(image for image in [b"one"])


def test_arguments_that_cannot_be_meant_are_refused_before_a_call():
    """Nothing is sent for them."""
    ones = np.ones((1, 4), np.float32)
    with Client("localhost:1") as client:
        with pytest.raises(UsageError, match="images: expected at least one, found none"):
            client.embed([])
        with pytest.raises(UsageError, match="dtype: expected fp32 or fp16 or int8, found 'fp8'"):
            client.embed([b"1"], dtype="fp8")
        with pytest.raises(UsageError, match="dims: expected an integer, 1 to 4294967295, found 0"):
            client.embed([b"1"], dims=0)
        with pytest.raises(UsageError, match="k: expected an integer, 1 to 4294967295, found 0"):
            client.search(ids=[1], k=0)
        with pytest.raises(
            UsageError, match="expected one of images, vectors, ids and combined, found"
        ):
            client.search()
        with pytest.raises(UsageError, match="found images and ids"):
            client.search([b"1"], ids=[1])
        with pytest.raises(UsageError, match="found an array alone; pass the result of embed"):
            client.search(vectors=ones)
        with pytest.raises(UsageError, match=r"expected shape \(N, D\)"):
            client.search(vectors=ones[0], fingerprint="f")
        with pytest.raises(UsageError, match=r"ids: expected an integer, 0 to .*, found -1"):
            client.search(ids=[-1])
        with pytest.raises(UsageError, match="image array: expected"):
            list(group_images([ones], RequestSize(images=1, request_bytes=10_000)))


def test_many_query_vectors_and_ids_go_in_several_requests():
    """Each within the server's limits, in order, with the fingerprint."""
    size = RequestSize(images=3, request_bytes=10_000)
    vectors = np.arange(28, dtype=np.float32).reshape(7, 4)
    options = SearchOptions(k=10)
    requests = [r for r, _ in make_queries(None, vectors, None, "f").requests(size, options)]
    assert [request.vectors.vectors.rows for request in requests] == [3, 3, 1]
    assert {request.vectors.fingerprint for request in requests} == {"f"}
    requests = [r for r, _ in make_queries(None, None, range(7), None).requests(size, options)]
    assert [list(request.ids.ids) for request in requests] == [[0, 1, 2], [3, 4, 5], [6]]
    assert {request.k for request in requests} == {10}


def test_queries_whose_hits_would_be_too_large_go_in_several_requests():
    """What the server allows of a reply bounds the queries of a request, vectors included."""
    size = RequestSize(images=1000, request_bytes=10 * (256 + 64) * 5, dim=16)

    def parts(options):
        queries = make_queries(None, None, range(12), None)
        return [len(r.ids.ids) for r, _ in queries.requests(size, options)]

    assert parts(SearchOptions(k=10, include_vectors=True)) == [5, 5, 2]
    assert parts(SearchOptions(k=10)) == [6, 6]
    assert parts(SearchOptions(k=10**6)) == [1] * 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": 2**40}, "dims: expected an integer, 1 to 4294967295, found 1099511627776"),
        ({"dims": 2.5}, "dims: expected an integer, 1 to 4294967295, found 2.5"),
        ({"timeout_s": 0}, "timeout_s: expected a positive number of seconds, .*, found 0"),
        ({"timeout_s": "1s"}, "timeout_s: expected a positive number of seconds, .*, found '1s'"),
        ({"timeout_s": float("inf")}, "timeout_s: expected a positive number .*, found inf"),
        ({"model": 5}, "model: expected text, found 5"),
        ({"images": None}, "images: expected a sequence of images, found NoneType; .*"),
        (
            {"images": Path("a.jpg")},
            "images: expected a sequence of images, found PosixPath; read .* with .read_bytes.*",
        ),
    ],
)
def test_wrong_arguments_are_one_line_of_both_clients(arguments, message):
    """What, expected and found; nothing of protobuf, numpy or gRPC, and nothing is sent."""
    arguments = {"images": [b"1"]} | arguments
    of_iterable = f"^{message}$".replace("a sequence", "an iterable")

    async def unblocking():
        async with AsyncClient("localhost:1") as client:
            with pytest.raises(UsageError, match=f"^{message}$"):
                await client.embed(**arguments)
            with pytest.raises(UsageError, match=of_iterable):
                client.embed_iter(**arguments)

    with Client("localhost:1") as client:
        with pytest.raises(UsageError, match=f"^{message}$"):
            client.embed(**arguments)
        with pytest.raises(UsageError, match=of_iterable):
            client.embed_iter(**arguments)
    asyncio.run(unblocking())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 2**40}, "k: expected an integer, 1 to 4294967295, found 1099511627776"),
        ({"ids": [2**64]}, "ids: expected an integer, 0 to 18446744073709551615, found 18.*"),
        ({"ids": ["cat"]}, "ids: expected an integer, 0 to 18446744073709551615, found 'cat'"),
        ({"ids": 7}, "ids: expected a sequence of integers, found 7"),
        ({"collection": 5}, "collection: expected text, found 5"),
        (
            {"ids": None, "vectors": ["cat"], "fingerprint": "f"},
            r"query vectors: expected shape \(N, D\), N at least 1, found list .*",
        ),
    ],
)
def test_wrong_arguments_of_a_search_are_one_line(arguments, message):
    """Refused before anything is sent."""
    with Client("localhost:1") as client, pytest.raises(UsageError, match=f"^{message}$"):
        client.search(**({"ids": [1]} | arguments))


def test_wrong_arguments_of_an_iterable_are_one_line(serving, fake):
    """One file in the place of many, and sizes below one."""

    def blocking(address):
        with Client(address) as client:
            for images in (b"file", "a.jpg", Path("a.jpg"), 5):
                with pytest.raises(UsageError, match="images: expected an iterable of images"):
                    client.embed_iter(images)
            for name in ("images_per_request", "in_flight"):
                with pytest.raises(UsageError, match=f"{name}: expected an integer, 1 to .* 0$"):
                    next(client.embed_iter([b"1"], **{name: 0}))
            with pytest.raises(UsageError, match=r"found str 'a.jpg'; read the file with"):
                client.embed(["a.jpg"])

    async def main():
        async with serving(fake) as server:
            await asyncio.to_thread(blocking, server.address)

    asyncio.run(main())
