from __future__ import annotations

import asyncio
import io
import threading
import time
from types import SimpleNamespace

import grpc
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from index.build import BuildOptions, build
from index.collection import Collection, id_of
from index.ranking import Ranking
from index.storage.writer import CollectionWriter
from models.encoder import open_encoder
from models.vectors import finish_vectors
from models.wire import vectors_from_wire, vectors_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve import searching as serve_searching
from serve.client import AsyncClient
from serve.errors import PreconditionError, RequestError, UnknownNameError
from serve.searching import Query, public_source, select
from serve.services import RequestLimits
from serve.watchdog import WatchdogOptions

COUNT = 60


@pytest.fixture
def place(tmp_path, make_bundle):
    """A bundle, a folder of images, and the collection that the one made of the other."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        (folder / f"c{n % 3}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"c{n % 3}" / f"{n:02}.png")
    bundle = make_bundle()
    out = tmp_path / "things"
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out))
    return bundle, folder, out


@pytest.fixture
def searching(place, serving):
    """A server of that collection, with a client: an async context manager's maker."""
    bundle, _, out = place

    def run(**options):
        return serving(bundle=(str(bundle.path),), collection=(str(out),), **options)

    return run


def direct(place, vectors, k):
    """Neighbours as the collection itself gives them: ids and scores."""
    bundle, _, out = place
    with Collection.open(out) as collection:
        found = collection.search(vectors, k, fingerprint=bundle.fingerprint)
        return found.ids.tolist(), found.scores.tolist()


def ids_of(result):
    """The ids of all hits."""
    return [[hit.id for hit in hits] for hits in result.hits]


def test_images_vectors_and_ids_find_what_the_collection_finds(place, searching):
    """The three ways to ask for stored images agree with a search in the collection."""
    bundle, folder, _ = place
    paths = sorted(folder.rglob("*.png"))[:4]
    keys = [path.relative_to(folder).as_posix() for path in paths]
    files = [path.read_bytes() for path in paths]
    encoder = open_encoder(bundle.path)
    vectors = finish_vectors(encoder.encode(np.stack([encoder.preprocess(f) for f in files])))
    ids, scores = direct(place, vectors, 5)

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            (info,) = await client.list_collections()
            assert (info.name, info.count, info.model) == ("things", COUNT, "tiny")
            assert (info.fingerprint, info.metric, info.index) == (
                bundle.fingerprint,
                "cosine",
                "Flat",
            )
            by_image = await client.search(files, k=5)
            assert ids_of(by_image) == ids
            assert [[hit.score for hit in hits] for hits in by_image.hits] == scores
            assert [hits[0].key for hits in by_image.hits] == keys
            assert [hits[0].label for hits in by_image.hits] == [key[:2] for key in keys]
            embedded = await client.embed(files)
            assert ids_of(await client.search(vectors=embedded, k=5)) == ids
            array = embedded.vectors * 3  # length does not matter
            by_array = await client.search(vectors=array, fingerprint=bundle.fingerprint, k=5)
            assert ids_of(by_array) == ids
            by_id = await client.search(ids=[id_of(key) for key in keys], k=4)
            assert ids_of(by_id) == [row[1:] for row in ids], "each is left out of its own"
            assert by_image.timings.search_ms > 0
            assert by_image.timings.inference_ms > 0

    asyncio.run(main())


def test_vectors_of_another_dimension_are_refused_unread(monkeypatch):
    """What they would take in memory is not what a collection's take."""

    def read(*_):
        raise AssertionError("read")

    monkeypatch.setattr("serve.searching.vectors_from_wire", read)
    collection = SimpleNamespace(fingerprint="a" * 64, dim=16)
    served = SimpleNamespace(name="c", collection=collection)
    vectors = pb.Vectors(dtype=pb.INT8, rows=1, dim=1 << 20)
    queries = pb.VectorQueries(vectors=vectors, fingerprint="a" * 64)
    with pytest.raises(RequestError, match=r"expected 16 dimensions.*, found 1048576; embed"):
        serve_searching.read_query_vectors(queries, served)


def test_lengths_count_where_distances_are_compared(place, serving):
    """The query of a Euclidean collection stays as its encoder made it, like what is stored."""
    bundle, folder, out = place
    files = [path.read_bytes() for path in sorted(folder.rglob("*.png"))[:6]]
    encoder = open_encoder(bundle.path)
    vectors = encoder.encode(np.stack([encoder.preprocess(file) for file in files]))
    sizes = np.linspace(1, 6, 6, dtype=np.float32)[:, None]  # one direction: lengths alone differ
    rows = pa.table({"key": [f"{n}.png" for n in range(6)], "source": ["folder:far"] * 6})
    far = out.with_name("far")
    with CollectionWriter.create(
        far, name="far", fingerprint=bundle.fingerprint, dim=bundle.dim,
        encoder=str(bundle.path), metric="euclidean",
    ) as writer:  # fmt: skip
        writer.add(rows, vectors[:1] * sizes, fingerprint=bundle.fingerprint)

    async def main():
        async with (
            serving(bundle=(str(bundle.path),), collection=(str(far),)) as server,
            AsyncClient(server.address) as client,
        ):
            by_array = await client.search(
                vectors=vectors[:1] * sizes, fingerprint=bundle.fingerprint, k=1
            )
            assert ids_of(by_array) == [[id_of(f"{n}.png")] for n in range(6)]
            by_image = await client.search(files[:1], k=1)
            assert ids_of(by_image) == [[id_of("0.png")]]
            others = np.stack([np.zeros_like(vectors[0]), np.full_like(vectors[0], np.inf)])
            nought = await client.search(vectors=others, fingerprint=bundle.fingerprint, k=1)
            assert ids_of(nought) == [[id_of("0.png")], []], "the shortest is the next to zero"
            assert nought.statuses[1].message.endswith(
                "expected finite values, found values that are not finite"
            )

    asyncio.run(main())


def test_stored_vectors_come_where_asked_for(place, searching):
    """With `include_vectors` every hit has its unit vector, and its score is their product."""
    _, folder, _ = place
    file = next(folder.rglob("*.png")).read_bytes()

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            query = (await client.embed([file])).vectors[0]
            (hits,) = (await client.search([file], include_vectors=True, exact=True)).hits
            assert len(hits) == 10
            for hit in hits:
                assert hit.vector @ query == pytest.approx(hit.score, abs=1e-5)
            (plain,) = (await client.search([file])).hits
            assert plain[0].vector is None

    asyncio.run(main())


@pytest.mark.parametrize("filter", ["", "label = 'nobody'"])
def test_stored_vectors_are_read_once_for_all_queries(place, monkeypatch, filter):
    """Each hit has its own, whatever the other queries have found, and if they found nothing."""
    with Collection.open(place[2]) as collection:
        vectors = collection.vectors(collection.ids[:20])
        query = Query(
            k=5,
            exact=True,
            include_vectors=True,
            ranking=Ranking(),
            selection=select(collection, filter) if filter else None,
        )
        reads = []

        def read(ids, stored=collection.vectors):
            reads.append(ids)
            return stored(ids)

        monkeypatch.setattr(collection, "vectors", read)
        ok = [pb.ItemStatus()] * 20
        results = serve_searching.search_vectors(collection, vectors, ok, query, lambda: None)
        assert len(reads) == 1
        for hits in results:
            ids = [hit.id for hit in hits.hits]
            assert len(ids) == (0 if filter else 5)
            np.testing.assert_array_equal(vectors_from_wire(hits.vectors), read(ids))


def test_a_bad_query_has_a_status_and_the_others_their_hits(place, searching):
    """Broken images, unknown ids, vectors without a direction."""
    bundle, folder, _ = place
    path = next(folder.rglob("*.png"))
    id_ = id_of(path.relative_to(folder).as_posix())
    vectors = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    vectors[1], vectors[2, 3], vectors[3, 3] = 0, np.nan, np.inf

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            by_image = await client.search([b"junk", path.read_bytes()], k=1)
            assert [status.code for status in by_image.statuses] == ["unsupported_format", "ok"]
            assert [len(hits) for hits in by_image.hits] == [0, 1]
            assert by_image.hits[1][0].id == id_
            by_id = await client.search(ids=[5, id_, 2**63 + 1], k=2)
            assert [status.code for status in by_id.statuses] == ["not_found", "ok", "not_found"]
            assert (
                by_id.statuses[0].message
                == "id: expected one of the 60 of this collection, found 5"
            )
            assert [len(hits) for hits in by_id.hits] == [0, 2, 0]
            by_vector = await client.search(vectors=vectors, fingerprint=bundle.fingerprint, k=3)
            assert [status.code for status in by_vector.statuses] == [
                "ok",
                "wrong_query",
                "wrong_query",
                "wrong_query",
                "ok",
            ]
            assert "only zeros" in by_vector.statuses[1].message
            assert "not finite" in by_vector.statuses[2].message
            assert "not finite" in by_vector.statuses[3].message
            only_bad = await client.search([b"junk"])
            assert only_bad.hits == ((),)

    asyncio.run(main())


def test_vectors_of_another_encoder_are_refused_by_name_of_both(place, searching):
    """Of equal dimension or not: FAILED_PRECONDITION, with both fingerprints."""
    bundle, _, _ = place

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            with pytest.raises(PreconditionError) as error:
                await client.search(vectors=np.ones((1, 16), np.float32), fingerprint="a" * 64)
        assert str(error.value) == (
            f"query vectors for collection 'things': expected encoder {bundle.fingerprint}, "
            f"found encoder {'a' * 64}; embed the queries with model 'tiny'"
        )

    asyncio.run(main())


def test_what_cannot_be_searched_is_refused_whole(place, searching):
    """No queries, no fingerprint, other dimensions, too many neighbours, unknown names."""
    bundle, _, _ = place
    ones = np.ones((1, 16), np.float32)
    cut = np.ones((1, 8), np.float32)

    async def main():
        async with (
            searching(max_neighbours=50) as server,
            AsyncClient(server.address) as client,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Search(pb.SearchRequest())
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.value.details() == (
                "queries: expected images, vectors, ids or combined, found none"
            )
            nameless = pb.VectorQueries(vectors=vectors_to_wire(ones))
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Search(pb.SearchRequest(vectors=nameless))
            assert "send the fingerprint that came with them" in error.value.details()
            with pytest.raises(RequestError, match="64 hex digits, found 'xxxxx"):
                await client.search(vectors=ones, fingerprint="x" * 20_000)
            with pytest.raises(
                RequestError, match=r"expected 16 dimensions.*found 8; embed without"
            ):
                await client.search(vectors=cut, fingerprint=bundle.fingerprint)
            with pytest.raises(RequestError, match=r"^k: expected 1 to 50, found 51$"):
                await client.search(vectors=ones, fingerprint=bundle.fingerprint, k=51)
            with pytest.raises(UnknownNameError, match="expected 'things', found 'cats'"):
                await client.search(ids=[1], collection="cats")

    asyncio.run(main())


def test_a_reply_that_would_be_too_large_is_refused_before_the_search(place, searching):
    """Queries times neighbours is bounded, as requests are."""

    async def main():
        async with (
            searching(max_message_mib=1) as server,
            AsyncClient(server.address) as client,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            request = pb.SearchRequest(ids=pb.IdQueries(ids=[1] * 1000), k=1000)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await pb_grpc.HoraceStub(channel).Search(request)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "reply: expected at most 1048576 bytes" in error.value.details()
            split = await client.search(ids=[1] * 10, k=1000)
            assert [status.code for status in split.statuses] == ["not_found"] * 10

    asyncio.run(main())


def test_more_neighbours_than_images_gives_all_images(place, searching):
    """The rest is not padded with hits that do not exist."""

    async def main():
        async with searching() as server, AsyncClient(server.address) as client:
            file = io.BytesIO()
            Image.new("L", (28, 28), 9).save(file, "PNG")
            (hits,) = (await client.search([file.getvalue()], k=100)).hits
            assert len({hit.id for hit in hits}) == COUNT

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["ids", "images", "combined"])
def test_searches_that_wait_are_bounded(place, searching, monkeypatch, kind):
    """Beyond the bound a search is refused before its images are computed; there is a next time."""
    from serve.pool import ThreadPool

    monkeypatch.setattr(ThreadPool, "waiting", property(lambda pool: 10**6))
    image = pb.Image(encoded=next(place[1].rglob("*.png")).read_bytes())
    example = pb.Combination(positives=[pb.Example(image=image)])
    request = {
        "ids": pb.SearchRequest(ids=pb.IdQueries(ids=[1])),
        "images": pb.SearchRequest(images=pb.ImageQueries(images=[image])),
        "combined": pb.SearchRequest(combined=pb.Combined(queries=[example])),
    }[kind]

    async def main():
        async with (
            searching() as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            statistics = server.catalog.model("tiny").engine.statistics
            before = statistics()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await pb_grpc.HoraceStub(channel).Search(request)
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.value.details().startswith("searches: expected fewer than 256 that wait")
            assert statistics() == before

    asyncio.run(main())


def test_a_search_has_its_place_before_its_images_are_embedded(place, searching, eventually):
    """A burst at an idle server: what is embedded is searched, what is beyond is never embedded."""
    images = pb.ImageQueries(images=[pb.Image(encoded=next(place[1].rglob("*.png")).read_bytes())])
    request = pb.SearchRequest(images=images)
    gate = threading.Event()

    async def main():
        async with (
            searching() as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            server.services._limits = RequestLimits(max_waiting_searches=2)
            engine = server.catalog.model("tiny").engine
            search = pb_grpc.HoraceStub(channel).Search
            for _ in range(server._decode_pool.size):
                server._decode_pool.submit(lambda: gate.wait(60))
            try:
                embedded = [search(request), search(request)]
                await eventually(lambda: engine.statistics().held_requests == 2)
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await search(request)
                assert error.value.details().startswith("searches: expected fewer than 2 that wait")
                assert dict(error.value.trailing_metadata())["retry-after-ms"] == "1000"
                by_id = await search(pb.SearchRequest(ids=pb.IdQueries(ids=[1])))
                assert len(by_id.results) == 1, "it waits for no encoder"
            finally:
                gate.set()
            for call in embedded:
                assert (await call).results[0].hits
            assert (await search(request)).results[0].hits

    asyncio.run(main())


@pytest.fixture
def slow_search(monkeypatch):
    """Searches take 5 ms a query, in pieces of 20; gives the sizes of those that were begun."""
    asked = []
    search = Collection.search

    def slow(collection, queries_QD, k, **options):
        asked.append(len(queries_QD))
        time.sleep(0.005 * len(queries_QD))
        return search(collection, queries_QD, k, **options)

    monkeypatch.setattr(Collection, "search", slow)
    monkeypatch.setattr(serve_searching, "PIECE_PRODUCTS", 1)
    return asked


@pytest.mark.usefixtures("vigilant")
def test_a_search_that_takes_long_is_answered_and_one_nobody_waits_for_ends(
    place, searching, slow_search, eventually
):
    """No thread is taken for stuck: not by many queries, nor by callers that leave."""
    bundle, _, _ = place
    vectors = np.random.default_rng(0).normal(size=(160, 16)).astype(np.float32)
    queries = pb.VectorQueries(vectors=vectors_to_wire(vectors), fingerprint=bundle.fingerprint)
    request = pb.SearchRequest(vectors=queries, exact=True, k=3)

    async def main():
        options = WatchdogOptions(stuck_s=0.4)
        async with (
            searching(watchdog=options) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            search = pb_grpc.HoraceStub(channel).Search
            leaving = [search(request), search(request)]
            await eventually(lambda: slow_search)
            for call in leaving:
                call.cancel()
            await eventually(lambda: server.calls.active == 0)
            left = len(slow_search)
            answered = await search(request)
            assert [len(one.hits) for one in answered.results] == [3] * 160
            begun = len(slow_search) - left - len(answered.results) // 20
            assert begun <= server._search_pool.size, "a piece at most is begun for who has left"
            assert (server._search_pool.alive, server.health.serving) == (True, True)
            assert repr(server.recovery) == "<Recovery well, 0 so far>"

    asyncio.run(main())


@pytest.mark.parametrize("diversity", [0.0, 0.5])
@pytest.mark.parametrize("filter", ["", "label = 'c1'"])
def test_pieces_find_what_one_call_finds(place, monkeypatch, filter, diversity):
    """Also where one piece has fewer columns than another, as all its queries leave one out."""
    with Collection.open(place[2]) as collection:
        selection = select(collection, filter) if filter else None
        query = Query(
            k=COUNT,
            exact=True,
            include_vectors=False,
            ranking=Ranking(diversity=diversity),
            selection=selection,
        )
        vectors = collection.vectors(collection.ids)
        without_QW = np.full((COUNT, 1), -1)
        without_QW[:30, 0] = collection.ids[:30]
        pieces = []
        whole = query.search(collection, vectors, lambda: None, without_QW)
        monkeypatch.setattr(serve_searching, "PIECE_PRODUCTS", 1)
        parts = query.search(collection, vectors, lambda: pieces.append(1), without_QW)
        np.testing.assert_array_equal(parts.ids, whole.ids)
        np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-6)
        assert len(pieces) == (6 if diversity else 4)


def test_what_differs_is_picked_among_more_than_are_asked_for(place):
    """As the collection ranks them itself."""
    with Collection.open(place[2]) as collection:
        ranking, vectors = Ranking(diversity=0.9), collection.vectors(collection.ids[:4])
        near = collection.search(vectors, ranking.pool(3), fingerprint=collection.fingerprint)
        query = Query(k=3, exact=False, include_vectors=False, ranking=ranking)
        found = query.search(collection, vectors, lambda: None)
        np.testing.assert_array_equal(found.ids, ranking.rank(collection, near, 3).ids)
        assert not np.array_equal(found.ids, near.ids[:, :3])


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("fashion-mnist:train", "fashion-mnist:train"),
        ("folder:/data/private/photos", "folder:photos"),
        ("wds:/data/shard-{000..009}.tar", "wds:shard-{000..009}.tar"),
        ("idx:/data/images.gz,/data/labels.gz", "idx:images.gz,labels.gz"),
    ],
)
def test_a_reply_names_a_source_without_its_place(uri, public):
    """Callers learn what a hit comes from, and nothing of the server's directories."""
    assert public_source(uri) == public


def test_hits_carry_metadata_where_it_is_asked_for(place, serving, tmp_path):
    """Typed as JSON has it; filters name its columns; unasked for, nothing is sent."""
    bundle, folder, _ = place
    table, out = tmp_path / "facts.csv", tmp_path / "known"
    lines = [f"c{n % 3}/{n:02}.png,{n}.5,2024-05-{1 + n % 30:02}" for n in range(COUNT - 1)]
    table.write_text("\n".join(["key,price,day", *lines]))
    options = BuildOptions(images=str(folder), encoder=str(bundle.path), out=out, metadata=table)
    build(options)

    async def main():
        async with (
            serving(bundle=(str(bundle.path),), collection=(str(out),)) as server,
            AsyncClient(server.address) as client,
        ):
            asked = {"ids": [id_of("c0/00.png")], "k": 3, "filter": "price > 55"}
            (hits,) = (await client.search(**asked, include_metadata=True)).hits
            assert {hit.key: dict(hit.metadata) for hit in hits} == {
                f"c{n % 3}/{n}.png": {"price": n + 0.5, "day": f"2024-05-{1 + n % 30}"}
                for n in (55, 56, 57, 58)
                if f"c{n % 3}/{n}.png" in {hit.key for hit in hits}
            }
            assert len(hits) == 3
            (hits,) = (await client.search(**asked)).hits
            assert [hit.metadata for hit in hits] == [{}] * 3
            asked["filter"] = "price is null"
            (hits,) = (await client.search(**asked, include_metadata=True)).hits
            assert [hit.metadata for hit in hits] == [{"price": None, "day": None}]

    asyncio.run(main())


def test_metadata_that_no_reply_takes_is_refused(place, serving, tmp_path):
    """What it takes is counted, whatever was reckoned; the error says what to ask for."""
    bundle, folder, _ = place
    table, out = tmp_path / "facts.csv", tmp_path / "known"
    lines = [f"c{n % 3}/{n:02}.png,{'word ' * 1000}" for n in range(COUNT)]
    table.write_text("\n".join(["key,text", *lines]))
    build(BuildOptions(images=str(folder), encoder=str(bundle.path), out=out, metadata=table))

    async def main():
        async with (
            serving(
                bundle=(str(bundle.path),), collection=(str(out),), max_message_mib=1
            ) as server,
            AsyncClient(server.address) as client,
        ):
            asked = {"ids": [id_of("c0/00.png")] * 4, "k": 59}
            assert len((await client.search(**asked)).hits) == 4
            with pytest.raises(RequestError, match=r"bytes of metadata, found 11\d{5}; .*fewer"):
                await client.search(**asked, include_metadata=True)

    asyncio.run(main())
