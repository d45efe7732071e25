"""Filters and combined queries, through a real server and its clients."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import numpy as np
import pytest
from PIL import Image

import index.combine
import serve.client.combining
from index.build import BuildOptions, build
from index.collection import Collection, id_of
from index.storage.manifest import read_manifest, write_manifest
from models.encoder import open_encoder
from models.errors import UsageError
from models.vectors import finish_vectors
from models.wire import vectors_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.client import AsyncClient, Client, Combination
from serve.combining import read_combinations
from serve.errors import PreconditionError, RequestError
from tests.combined import search_combined

COUNT = 60


@pytest.fixture
def place(tmp_path, make_bundle):
    """A bundle, a folder of images of three classes, and the collection of them."""
    folder = tmp_path / "private" / "images"
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        (folder / f"c{n % 3}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"c{n % 3}" / f"{n:02}.png")
    bundle = make_bundle()
    out = tmp_path / "things"
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out, index="hnsw"))
    return bundle, folder, out


@pytest.fixture
def searching(place, serving):
    """A server of that collection, with a client: an async context manager's maker."""
    bundle, _, out = place

    def run(**options):
        return serving(bundle=(str(bundle.path),), collection=(str(out),), **options)

    return run


def ids_of(result):
    """The ids of all hits."""
    return [[hit.id for hit in hits] for hits in result.hits]


def test_a_filter_holds_for_every_kind_of_query(place, searching):
    """Images, vectors, ids and combinations: all hits are of the label, and k of them."""
    bundle, folder, _ = place
    path = folder / "c0" / "00.png"

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            file = path.read_bytes()
            vectors = (await client.embed([file])).vectors
            kinds = {
                "images": [file],
                "vectors": vectors,
                "ids": [id_of("c0/00.png")],
                "combined": [Combination(positives=[file])],
            }
            for name, queries in kinds.items():
                result = await client.search(
                    **{name: queries}, fingerprint=bundle.fingerprint, k=15, filter="label = 'c1'"
                )
                (hits,) = result.hits
                assert {hit.label for hit in hits} == {"c1"}
                assert len(hits) == 15
            few = await client.search(ids=[id_of("c0/00.png")], filter="key in ('c1/01.png')")
            assert ids_of(few) == [[id_of("c1/01.png")]]
            none = await client.search(ids=[id_of("c0/00.png")], filter="label = 'c9'")
            assert none.hits == ((),)

    asyncio.run(main())


def test_a_bad_filter_is_refused_whole(searching):
    """INVALID_ARGUMENT, the character and the columns, before an image is embedded."""

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            with pytest.raises(RequestError) as error:
                await client.search([b"junk"], filter="colour = 'red'")
            assert str(error.value) == (
                "filter, character 1: expected a column: id, key, label, source, digest, "
                "found 'colour'"
            )
            with pytest.raises(RequestError, match="character 9: expected a text between quotes"):
                await client.search(ids=[1], filter="label = 7")

    asyncio.run(main())


def test_a_filter_cannot_ask_for_what_a_reply_does_not_say(place, searching):
    """A source is known to it by its public name, without the directories."""

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            ids = [id_of("c0/00.png")]
            (hits,) = (await client.search(ids=ids, filter="source = 'folder:images'")).hits
            assert len(hits) == 10
            for filter in ("source contains 'private'", "source contains '/'"):
                assert (await client.search(ids=ids, filter=filter)).hits == ((),)

    asyncio.run(main())


def test_a_combined_query_finds_what_the_collection_finds(place, searching):
    """Images, a vector and stored ids in one query; the stored ones are left out."""
    bundle, folder, out = place
    paths = sorted(folder.rglob("*.png"))[:4]
    files = [path.read_bytes() for path in paths]
    stored = [id_of("c1/01.png"), id_of("c2/05.png")]
    encoder = open_encoder(bundle.path)
    pixels = np.stack([encoder.preprocess(file) for file in files])
    vectors = finish_vectors(encoder.encode(pixels))
    encoder.close()
    with Collection.open(out) as collection:
        expected = search_combined(
            collection,
            [
                index.combine.Combination(
                    positives=[vectors[0], stored[0], vectors[1]],
                    negatives=[vectors[2], stored[1]],
                    negative_weight=0.7,
                ),
                index.combine.Combination(positives=[vectors[3]]),
            ],
            5,
            fingerprint=bundle.fingerprint,
        ).ids.tolist()

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            result = await client.search(
                combined=[
                    Combination(
                        positives=[files[0], stored[0], vectors[1] * 9],
                        negatives=[files[2], stored[1]],
                        negative_weight=0.7,
                    ),
                    Combination(positives=[files[3]]),
                ],
                fingerprint=bundle.fingerprint,
                k=5,
                include_vectors=True,
            )
            assert ids_of(result.raise_for_status()) == expected
            assert not set(stored) & set(ids_of(result)[0])
            assert result.hits[0][0].vector.shape == (16,)
            assert result.timings.inference_ms > 0
            stored_only = await client.search(combined=[Combination(positives=stored)])
            assert stored_only.timings.inference_ms == 0

    asyncio.run(main())


def test_a_bad_example_is_named_and_the_other_queries_are_answered(place, searching):
    """The status of its query says which one it is, and what is wrong with it."""
    bundle, folder, _ = place
    file = (folder / "c0" / "00.png").read_bytes()
    flat = np.zeros(16, np.float32)
    own = id_of("c0/00.png")
    queries = [
        Combination(positives=[file, b"junk"], negatives=[b""]),
        Combination(positives=[file], negatives=[own, b"junk"]),
        Combination(positives=[file, 5]),
        Combination(positives=[flat]),
        Combination(positives=[own], negatives=[own], negative_weight=1.0),
        Combination(positives=[file], negatives=[own]),
    ]

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            result = await client.search(combined=queries, fingerprint=bundle.fingerprint, k=3)
            assert [status.code for status in result.statuses] == [
                "unsupported_format",
                "unsupported_format",
                "not_found",
                "wrong_query",
                "wrong_query",
                "ok",
            ]
            messages = [status.message for status in result.statuses]
            assert messages[0].startswith("positive 2: ")
            assert messages[1].startswith("negative 2: ")
            assert messages[2] == (
                "positive 2: id: expected one of the 60 of this collection, found 5"
            )
            assert messages[3].startswith("positive 1: query vector: expected finite values")
            assert "cancel out" in messages[4]
            assert [len(hits) for hits in result.hits] == [0, 0, 0, 0, 0, 3]

    asyncio.run(main())


def test_an_example_of_many_vectors_is_refused_unread(monkeypatch):
    """It counts as one of a request's, and may not cost as many as fit into a message."""

    def read(*_, **__):
        raise AssertionError("read")

    monkeypatch.setattr("serve.combining.read_query_vectors", read)
    for rows in (0, 1 << 20):
        many = pb.VectorQueries(vectors=pb.Vectors(dtype=pb.INT8, rows=rows, dim=16))
        query = pb.Combination(positives=[pb.Example(vector=many)])
        (read_one,), _ = read_combinations(pb.Combined(queries=[query]), served=None)
        (example,) = read_one.positives
        assert example.status.code == pb.WRONG_QUERY
        assert example.status.message == f"expected one vector, found {rows}"


def test_what_no_client_of_ours_sends_is_a_status_or_a_refusal(place, searching):
    """Examples of nothing, several vectors in one, no positives, weights out of bounds."""
    bundle, _, _ = place
    own = pb.Example(id=id_of("c0/00.png"))
    two = pb.VectorQueries(
        vectors=vectors_to_wire(np.ones((2, 16), np.float32)), fingerprint=bundle.fingerprint
    )
    queries = [
        pb.Combination(),
        pb.Combination(positives=[pb.Example()]),
        pb.Combination(positives=[pb.Example(vector=two)]),
        pb.Combination(positives=[own], negative_weight=99),
        pb.Combination(positives=[own], negative_weight=float("nan")),
        pb.Combination(positives=[own]),
    ]

    async def main():
        async with (
            searching() as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            reply = await stub.Search(pb.SearchRequest(combined=pb.Combined(queries=queries), k=2))
            assert [hits.status.code for hits in reply.results] == [pb.WRONG_QUERY] * 5 + [pb.OK]
            assert [hits.status.message for hits in reply.results] == [
                "positives: expected at least one, found none",
                "positive 1: expected an image, a vector or an id, found none",
                "positive 1: expected one vector, found 2",
                "negative weight: expected 0 to 10, found 99",
                "negative weight: expected 0 to 10, found nan",
                "",
            ]
            many = pb.Combined(queries=[pb.Combination(positives=[own] * 1025)])
            for request, message in (
                (
                    pb.SearchRequest(combined=many),
                    "examples: expected 1 to 1024 a request, found 1025",
                ),
                (pb.SearchRequest(combined=pb.Combined()), "queries: expected 1 to 1024 a request"),
                (
                    pb.SearchRequest(ids=pb.IdQueries(ids=[1]), effort=10_001),
                    "effort: expected 0 to 10000, found 10001",
                ),
                (
                    pb.SearchRequest(ids=pb.IdQueries(ids=[1]), min_score=float("nan")),
                    "minimal score: expected -1 to 1, found nan",
                ),
                (
                    pb.SearchRequest(ids=pb.IdQueries(ids=[1]), diversity=2),
                    "diversity: expected 0 to 1, found 2",
                ),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stub.Search(request)
                assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert message in error.value.details()

    asyncio.run(main())


def test_an_example_of_another_encoder_is_refused_by_name_of_both(searching):
    """As a query vector is."""

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            with pytest.raises(PreconditionError, match=f"found encoder {'a' * 64}"):
                await client.search(
                    combined=[Combination(positives=[np.ones(16, np.float32)])],
                    fingerprint="a" * 64,
                )

    asyncio.run(main())


@pytest.fixture
def hasty(tmp_path, make_bundle):
    """A bundle, 600 images behind an index that weighs one candidate, and the same without."""
    images = tmp_path / "noise-images-idx3-ubyte"
    header = np.array([0x00000803, 600, 28, 28], ">u4").tobytes()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (600, 28, 28)) * (rng.random((600, 28, 28)) < 0.02)
    images.write_bytes(header + pixels.astype(np.uint8).tobytes())
    bundle = make_bundle()
    for kind in ("hnsw", "flat"):
        options = BuildOptions(
            images=f"idx:{images}", encoder=str(bundle.path), out=tmp_path / kind, index=kind
        )
        build(options)
    manifest = read_manifest(tmp_path / "hnsw")
    segment = replace(manifest.segments[0], parameters={"efSearch": 1})
    write_manifest(tmp_path / "hnsw", replace(manifest, segments=(segment,)))
    return bundle.path, tmp_path / "hnsw", tmp_path / "flat"


def test_more_effort_finds_what_exact_search_finds(hasty, serving):
    """And where the collection has no index it changes nothing."""
    bundle, *collections = map(str, hasty)

    async def main():
        async with (
            serving(bundle=(bundle,), collection=tuple(collections)) as server,
            AsyncClient(server.address) as client,
        ):
            (model,) = await client.list_models()
            queries = np.random.default_rng(1).standard_normal((100, 16)).astype(np.float32)

            async def search(name, **how):
                query = {"vectors": queries, "fingerprint": model.fingerprint}
                return ids_of(await client.search(**query, collection=name, k=1, **how))

            exact = await search("hnsw", exact=True, effort=1)
            assert await search("hnsw") != exact
            assert await search("hnsw", effort=600) == exact
            for how in ({}, {"effort": 1}, {"effort": 600}, {"exact": True}):
                assert await search("flat", **how) == exact

    asyncio.run(main())


def test_hits_near_enough_and_hits_that_differ(searching):
    """Through the server as in the collection; a diverse k is bounded."""
    ids = [id_of("c0/00.png")]

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            (hits,) = (await client.search(ids=ids, k=59)).hits
            least = (hits[6].score + hits[7].score) / 2
            (near,) = (await client.search(ids=ids, k=59, min_score=least)).hits
            assert near == hits[:7]
            (diverse,) = (await client.search(ids=ids, k=5, diversity=0.8)).hits
            assert diverse[0] == hits[0]
            assert len({hit.id for hit in diverse}) == 5
            assert diverse != hits[:5]
            one = Combination(positives=ids)
            (combined,) = (await client.search(combined=[one], k=5, diversity=0.8)).hits
            assert [hit.id for hit in combined] == [hit.id for hit in diverse]
            with pytest.raises(RequestError, match="k: expected 1 to 100 with diversity"):
                await client.search(ids=ids, k=101, diversity=0.1)
            with pytest.raises(UsageError, match="min_score: expected a number, -1 to 1, found 2"):
                await client.search(ids=ids, min_score=2)
            with pytest.raises(UsageError, match="diversity: expected a number, 0 to 1, found 'x'"):
                await client.search(ids=ids, diversity="x")

    asyncio.run(main())


def test_more_combinations_than_a_request_holds_go_in_several(place, searching):
    """A combination is never cut."""
    ids = [id_of(f"c{n % 3}/{n:02}.png") for n in range(12)]
    queries = [Combination(positives=ids[n : n + 4]) for n in range(9)]

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            some = ids_of(await client.search(combined=queries, k=3))
            many = ids_of(await client.search(combined=queries * 31, k=3))
            assert many == some * 31, "1116 examples: the server takes 1024"

    asyncio.run(main())


def test_what_a_client_cannot_mean_is_refused_before_it_is_sent():
    """No list, no positive, no number, no fingerprint."""
    one = Combination(positives=[1])
    with Client("127.0.0.1:1") as client:
        for combined, message in (
            (one, "combined: expected a sequence of Combination, found one; put it into a list"),
            ([], "combined: expected at least one, found none"),
            ([7], "combined: expected a Combination each, found 7"),
            ([Combination(positives=[-1])], "id of an example: expected an integer"),
            (
                [Combination(positives=[np.ones(4, np.float32)])],
                "vector of an example: expected the fingerprint of the encoder",
            ),
            (
                [Combination(positives=[np.ones((2, 4), np.float32)])],
                r"vector of an example: expected shape \(D,\), found \(2, 4\)",
            ),
        ):
            with pytest.raises(UsageError, match=message):
                client.search(combined=combined)
        with pytest.raises(UsageError, match="one of images, vectors, ids and combined, found ids"):
            client.search(ids=[1], combined=[one])
        with pytest.raises(UsageError, match="filter: expected text, found 7"):
            client.search(ids=[1], filter=7)
        with pytest.raises(UsageError, match="effort: expected an integer, 1 to"):
            client.search(ids=[1], effort=0)
    for arguments, message in (
        ({"positives": []}, "positives: expected at least one"),
        ({"positives": b"file"}, "positives: expected a list of examples"),
        ({"positives": [1], "negative_weight": 11}, "negative_weight: expected a number, 0 to 10"),
    ):
        with pytest.raises(UsageError, match=message):
            Combination(**arguments)


def test_client_and_collection_agree_on_the_weight():
    """The client does not load faiss to learn it."""
    for name in ("NEGATIVE_WEIGHT", "MAX_NEGATIVE_WEIGHT"):
        assert getattr(serve.client.combining, name) == getattr(index.combine, name)
