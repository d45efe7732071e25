from __future__ import annotations

import asyncio
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.errors import UsageError
from protos import horace_pb2 as pb
from serve.client import AsyncClient, Client, Combination, EmbedResult
from serve.client.requests import (
    RequestSize,
    SearchOptions,
    group_images,
    make_queries,
    split,
)
from serve.client.results import OK_STATUS, Timings


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


def test_a_request_that_is_full_takes_no_further_image():
    """One that alone is larger goes all the same, where the server takes it."""
    size = RequestSize(images=9, request_bytes=1 << 20, full_bytes=4096 + 2000)
    groups = list(group_images([b"1" * n for n in (900, 900, 900, 5000, 10)], size))
    assert [len(group.images) for group in groups] == [2, 1, 1, 1]
    assert not any(group.refused for group in groups)


@pytest.mark.parametrize("image", [b"1" * 1000, np.zeros((20, 50), np.uint8)])
def test_a_group_is_cut_anew_as_it_was_cut(image):
    """To the byte: an image that just goes into a request does so then, too."""
    (group,) = group_images([image] * 2, RequestSize(images=9, request_bytes=1 << 20))
    parts = list(split(group, RequestSize(images=9, request_bytes=4096 + 64 + 1000)))
    assert [(part.first, len(part.images), part.refused) for part in parts] == [
        (0, 1, {}), (1, 1, {}),
    ]  # fmt: skip


def test_a_view_counts_by_its_bytes():
    """Of items of four bytes it has fewer."""
    size = RequestSize(images=9, request_bytes=4096 + 2000)
    (group,) = group_images([memoryview(array("I", [0] * 500))], size)
    assert list(group.refused) == [0]


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (b"one file", "bytes"),
        (np.zeros((8, 8, 3), np.uint8), r"an array of shape \(8, 8, 3\)"),
        (np.zeros((8, 8), np.uint8), r"an array of shape \(8, 8\)"),
        (memoryview(b"one file"), "memoryview"),
    ],
)
def test_a_single_image_is_not_taken_for_several(images, found):
    """It would be read as its bytes or rows; the line says to put it into a list."""
    with Client("localhost:1") as client, pytest.raises(UsageError, match=f"found {found}; put a"):
        client.embed(images)


class Tensor:
    """Another library's array: NumPy reads it, and it can be iterated over."""

    def __array__(self):
        raise AssertionError("asked for its content")

    def __iter__(self):
        raise AssertionError("asked for its content")


UINT8 = r"make it uint8, \(N, H, W\) or \(N, H, W, C\), or a list of files' bytes"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            Image.new("RGB", (8, 8)),
            r"found Image; take its file's bytes, or np.asarray\(image.convert\('RGB'\)\), "
            "and put a single image into a list",
        ),
        (
            Tensor(),
            r"found Tensor; take np.asarray\(...\) of it, and put a single image into a list",
        ),
        (
            "path.png",
            r"found str; read the file with Path\(...\).read_bytes\(\), "
            "and put a single image into a list",
        ),
        (None, "found NoneType"),
        (7, "found int"),
        (
            np.array([b"1", b"2"], object),
            r"found an array of shape \(2,\); make a list of them, or call embed_iter",
        ),
        (np.zeros((8, 8, 3)), rf"found an array of shape \(8, 8, 3\); {UINT8}"),
        (np.zeros(99, np.uint8), rf"found an array of shape \(99,\); {UINT8}"),
    ],
)
def test_what_is_no_sequence_of_images_is_told_how_it_becomes_one(images, message):
    """Into a list goes what is an image; the rest becomes one first, or never."""
    with (
        Client("localhost:1") as client,
        pytest.raises(UsageError, match=f"^images: expected a sequence of images, {message}$"),
    ):
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
        for ask in (client.embed, client.search):
            with pytest.raises(UsageError, match="image array: expected"):
                ask([b"1", ones])
            with pytest.raises(UsageError, match=r"found str 'a.jpg'; read the file with"):
                ask([b"1", "a.jpg"])


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


@pytest.mark.parametrize("kind", ["images", "vectors", "combined"])
def test_a_long_filter_leaves_less_room_for_queries(kind):
    """It goes with every request, none of which may be larger than the server takes."""
    size = RequestSize(images=1000, request_bytes=200_000)
    images = [b"x" * 1000] * 300
    given = {
        "images": images,
        "vectors": np.ones((300, 250), np.float32),
        "combined": [Combination(positives=[data]) for data in images],
    }
    asked = dict.fromkeys(("images", "vectors", "ids", "fingerprint", "combined")) | {
        kind: given[kind],
        "fingerprint": "f",
    }
    options = SearchOptions(k=1, filter=f"label = '{'é' * 30_000}'")
    requests = [request for request, _ in make_queries(**asked).requests(size, options)]
    assert len(requests) == 3
    assert max(request.ByteSize() for request in requests) <= size.request_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": 2**40}, "dims: expected an integer, 1 to 4294967295, found 1099511627776"),
        ({"dims": 2.5}, "dims: expected an integer, 1 to 4294967295, found 2.5"),
        ({"timeout_s": 0}, "timeout_s: expected a positive number of seconds, .*, found 0"),
        ({"timeout_s": "1s"}, "timeout_s: expected a positive number of seconds, .*, found '1s'"),
        ({"timeout_s": float("inf")}, "timeout_s: expected a positive number .*, found inf"),
        ({"timeout_s": 10**400}, "timeout_s: expected a positive number .*, found 10000.*"),
        ({"dtype": ["fp32"]}, r"dtype: expected fp32 or fp16 or int8, found \['fp32'\]"),
        ({"model": 5}, "model: expected text, found 5"),
        ({"model": "a\udcff"}, r"model: expected text that UTF-8 can write, found 'a\\udcff'"),
        ({"images": None}, "images: expected a sequence of images, found NoneType"),
        (
            {"images": Path("a.jpg")},
            "images: expected a sequence of images, found PosixPath; read .*read_bytes.*",
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
        ({"filter": "\ud800"}, r"filter: expected text that UTF-8 can write, found '\\ud800'"),
        ({"diversity": "0.5"}, "diversity: expected a number, 0 to 1, found '0.5'"),
        ({"min_score": 10**400}, "min_score: expected a number, -1 to 1, found 1000.*"),
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


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_an_example_may_be_what_an_image_may_be(kind):
    """Any bytes of a file, in any of Python's wrappings, and pixels."""
    one = Combination(
        positives=[kind(b"file"), np.ones((2, 2), np.uint8)],
        negatives=[np.int64(7)],
        negative_weight=np.array(0.25),
    )
    (combined,) = make_queries(None, None, None, None, [one]).combinations
    file, pixels = combined.positives
    assert file.image.encoded == b"file"
    assert pixels.image.raw.pixels == b"\1" * 4
    assert combined.negatives == [pb.Example(id=7)]
    assert combined.negative_weight == 0.25


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (Path("a.jpg"), r"PosixPath\('a.jpg'\); read the file with Path\(...\).read_bytes\(\)"),
        ("a.jpg", r"'a.jpg'; read the file with Path\(...\).read_bytes\(\)"),
        ("70", "'70'; make an id an integer"),
        ([0.5, 1.0], r"\[0.5, 1.0\]"),
        (None, "None"),
        (Image.new("L", (8, 8)), r"<PIL.*>; take its file's bytes, or np.asarray.*"),
        (
            EmbedResult(
                vectors=np.eye(4, dtype=np.float32),
                statuses=(OK_STATUS,) * 4,
                fingerprint="f",
                model="m",
                timings=Timings(),
            ),
            r"EmbedResult\(vectors=array.*",
        ),
    ],
)
def test_what_is_no_example_is_told_what_one_is(example, found):
    """An image, a vector or an id, and not only the last of them."""
    what = "an image's bytes, uint8 pixels, a vector as an array of floats, or an id"
    with (
        Client("localhost:1") as client,
        pytest.raises(UsageError, match=f"^example: expected {what}, found {found}$"),
    ):
        client.search(combined=[Combination(positives=[example])])


@pytest.mark.parametrize(
    ("combined", "found"),
    [
        (Combination(positives=[1]), "one; put it into a list"),
        ((one for one in [Combination(positives=[1])]), "<generator .*>; make a list of them"),
        (5, "5; make a list of them"),
    ],
)
def test_combinations_come_in_a_sequence(combined, found):
    """They are gone through more than once."""
    expected = f"^combined: expected a sequence of Combination, found {found}$"
    with Client("localhost:1") as client, pytest.raises(UsageError, match=expected):
        client.search(combined=combined)


@pytest.mark.parametrize("weight", ["x", "0.5", None, float("nan"), 11, -1, [1]])
def test_a_weight_is_a_number(weight):
    """Within its bounds."""
    with pytest.raises(UsageError, match=r"^negative_weight: expected a number, 0 to 10, found"):
        Combination(positives=[1], negative_weight=weight)


@pytest.mark.parametrize("examples", [b"file", bytearray(b"file"), memoryview(b"file"), "a.jpg"])
def test_one_example_is_not_taken_for_several(examples):
    """Its bytes would be read as ids."""
    with pytest.raises(UsageError, match=r"^positives: expected a list of examples"):
        Combination(positives=examples)


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

    async def main():
        async with serving(fake) as server:
            await asyncio.to_thread(blocking, server.address)

    asyncio.run(main())
