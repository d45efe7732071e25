from __future__ import annotations

import asyncio
import base64
import json
import logging
import re

import numpy as np
import pytest

from index.build import BuildOptions, build
from index.filters import MAX_CHARACTERS
from protos import horace_pb2 as pb
from serve.client import AsyncClient
from serve.http.replies import json_response, search_reply

LITTLE_ENDIAN = {"fp32": "<f4", "fp16": "<f2", "int8": "i1"}


def files(*images):
    """Images as parts of a form."""
    return [("images", (f"{n}.png", data)) for n, data in enumerate(images)]


def as_base64(data):
    """A file as JSON carries it."""
    return base64.b64encode(data).decode()


def test_form_json_and_grpc_give_the_same_vectors(http_serving, stored):
    """To the bit, with every option, one result an image in its order."""
    images = [path.read_bytes() for path in stored.files[:3]]

    async def main():
        async with (
            http_serving(bundle=(str(stored.bundle),)) as (server, http),
            AsyncClient(server.address) as client,
        ):
            expected = await client.embed(images, dims=4, normalize=False)
            form = {"dims": "4", "normalize": "false", "model": "tiny"}
            document = {"images": list(map(as_base64, images)), "dims": 4, "normalize": False}
            one = await http.post("/v1/embed", files=files(*images), data=form)
            other = await http.post("/v1/embed", json=document)
            data_url = "data:image/png;base64," + as_base64(images[0])
            third = await http.post("/v1/embed", json={**document, "images": [data_url]})
            return expected, one.json(), other.json(), third.json()

    expected, one, other, third = asyncio.run(main())
    assert (one["model"], one["fingerprint"], one["dim"]) == ("tiny", stored.fingerprint, 4)
    for reply in (one, other):
        got = np.array([result["vector"] for result in reply["results"]], np.float32)
        np.testing.assert_array_equal(got, expected.vectors)
    assert third["results"] == other["results"][:1]
    assert one["timings"]["total_ms"] >= one["timings"]["inference_ms"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_vectors_come_as_base64_of_any_dtype(http_serving, stored, dtype):
    """The same values as gRPC carries; INT8 has its scale."""
    images = [path.read_bytes() for path in stored.files[:2]]

    async def main():
        async with (
            http_serving(bundle=(str(stored.bundle),)) as (server, http),
            AsyncClient(server.address) as client,
        ):
            form = {"dtype": dtype, "encoding": "base64"}
            reply = await http.post("/v1/embed", files=files(*images), data=form)
            return (await client.embed(images, dtype=dtype)).vectors, reply.json()

    expected, reply = asyncio.run(main())
    assert reply["dtype"] == dtype
    for row, result in zip(expected, reply["results"], strict=True):
        values = np.frombuffer(base64.b64decode(result["vector"]), LITTLE_ENDIAN[dtype])
        scale = np.float32(result.get("scale", 1))
        np.testing.assert_array_equal(values.astype(np.float32) * scale, row)


def test_a_bad_image_is_a_status_of_its_own(http_serving, fake, png):
    """Also where it is no base64; its neighbours are embedded."""

    async def main():
        async with http_serving(fake) as (_, http):
            form = await http.post("/v1/embed", files=files(png(1), b"no image", b"", png(2)))
            texts = [as_base64(png(1)), "?!", "", as_base64(png(2))]
            document = await http.post("/v1/embed", json={"images": texts})
            return form, document

    form, document = asyncio.run(main())
    assert form.status_code == document.status_code == 200
    codes = [result["status"] for result in form.json()["results"]]
    assert codes == ["ok", "unsupported_format", "empty", "ok"]
    results = document.json()["results"]
    assert [result["status"] for result in results] == ["ok", "unreadable", "empty", "ok"]
    assert results[1]["message"] == "image: expected base64, found other characters"
    assert all("vector" in result for result in (results[0], results[3]))
    assert not any("vector" in result for result in results[1:3])


def test_search_finds_what_grpc_finds(http_serving, stored):
    """By images, vectors, ids and combinations; ids are text and are taken back as such."""
    image = stored.files[0].read_bytes()
    served = {"bundle": (str(stored.bundle),), "collection": (str(stored.collection),)}

    async def main():
        async with (
            http_serving(**served) as (server, http),
            AsyncClient(server.address) as client,
        ):
            expected = await client.search([image], k=3, include_vectors=True)

            async def ask(document):
                reply = await http.post("/v1/search", json={"k": 3, **document})
                assert reply.status_code == 200, reply.text
                return reply.json()["results"][0]

            form = await http.post("/v1/search", files=files(image), data={"k": "3"})
            (vector,) = (await client.embed([image])).vectors.tolist()
            by_image = await ask({"images": [as_base64(image)], "include_vectors": True})
            by_vector = await ask({"vectors": [vector], "fingerprint": stored.fingerprint})
            by_id = await ask({"ids": [by_image["hits"][0]["id"]]})
            listed = (await http.get("/v1/collections")).json()
            return expected, form.json()["results"][0], by_image, by_vector, by_id, listed

    expected, form, by_image, by_vector, by_id, listed = asyncio.run(main())
    ids = [str(hit.id) for hit in expected.hits[0]]
    for result in (form, by_image, by_vector):
        assert [hit["id"] for hit in result["hits"]] == ids
    assert [hit["id"] for hit in by_id["hits"]][:2] == ids[1:]  # but for itself
    assert by_image["hits"][0]["key"] == stored.files[0].relative_to(stored.folder).as_posix()
    assert np.float32(by_image["hits"][0]["vector"]) == pytest.approx(expected.hits[0][0].vector)
    assert by_image["hits"][0]["source"] == "folder:images"  # no path of the server's
    (collection,) = listed["collections"]
    assert (collection["name"], collection["count"]) == ("things", 12)


def test_others_have_their_turn_while_a_large_reply_is_laid_out():
    """A thousand queries may have hundreds of hits each."""
    reply = pb.SearchResponse(results=[pb.Hits(hits=[pb.Hit(key="k")])] * 100)
    turns = []

    async def take_turns():
        while True:
            turns.append("mine")
            await asyncio.sleep(0)

    async def main():
        other = asyncio.create_task(take_turns())
        document = await search_reply(reply, {3: {"status": "unreadable"}})
        other.cancel()
        return document

    results = json.loads(json_response(asyncio.run(main())).body)["results"]
    assert [result["status"] for result in results] == ["ok"] * 3 + ["unreadable"] + ["ok"] * 96
    assert len(turns) >= len(results) == 100


def test_a_form_may_have_a_filter_of_any_length_that_is_read(http_serving, stored):
    """As JSON and gRPC may; the description says which."""
    served = {"bundle": (str(stored.bundle),), "collection": (str(stored.collection),)}
    most = MAX_CHARACTERS - len("key != ''")

    async def main():
        async with http_serving(**served) as (_, http):
            image = files(stored.files[0].read_bytes())
            replies = [
                await http.post("/v1/search", files=image, data={"filter": f"key != '{text}'"})
                for text in ("é" * most, "é" * (most + 1))
            ]
            return *replies, (await http.get("/openapi.json")).json()

    read, refused, described = asyncio.run(main())
    assert (read.status_code, refused.status_code) == (200, 400)
    assert "filter: expected at most 65536 characters, found 65537" in refused.text
    content = described["paths"]["/v1/search"]["post"]["requestBody"]["content"]
    for body in content.values():
        assert body["schema"]["properties"]["filter"]["maxLength"] == MAX_CHARACTERS


def test_metadata_comes_as_an_object_where_it_is_asked_for(http_serving, stored, tmp_path):
    """Values as JSON has them; a filter knows them by name."""
    key = stored.files[0].relative_to(stored.folder).as_posix()
    table, out = tmp_path / "facts.csv", tmp_path / "known"
    table.write_text(f"key,price,day\n{key},2.5,2024-05-01\n")
    build(
        BuildOptions(images=str(stored.folder), encoder=str(stored.bundle), out=out, metadata=table)
    )
    image = as_base64(stored.files[0].read_bytes())

    async def main():
        served = {"bundle": (str(stored.bundle),), "collection": (str(out),)}
        async with http_serving(**served) as (_, http):
            asked = {"images": [image], "filter": "day = '2024-05-01'"}
            replies = [
                await http.post("/v1/search", json={**asked, **more})
                for more in ({}, {"include_metadata": True})
            ]
            return [reply.json()["results"][0]["hits"] for reply in replies]

    (plain,), (known,) = asyncio.run(main())
    assert "metadata" not in plain
    assert known["metadata"] == {"price": 2.5, "day": "2024-05-01"}
    assert {name: known[name] for name in plain} == plain


def test_what_the_server_is_can_be_asked(http_serving, fake):
    """Models, liveness and readiness, and a page that fetches nothing from elsewhere."""

    async def main():
        async with http_serving(fake) as (server, http):
            models = (await http.get("/v1/models")).json()["models"]
            assert (models[0]["name"], models[0]["dim"]) == ("fake", 4)
            assert (await http.get("/healthz")).json() == {"status": "alive"}
            assert (await http.get("/readyz")).json() == {"status": "ready"}
            server.health.set_serving(False)
            unready = await http.get("/readyz")
            assert (unready.status_code, unready.json()) == (503, {"status": "not ready"})
            assert (await http.get("/healthz")).status_code == 200
            return (await http.get("/")).text, (await http.get("/openapi.json")).json()

    page, described = asyncio.run(main())
    assert "openapi.json" in page
    assert not re.findall(r"https?://", page)
    assert {"/v1/embed", "/v1/search", "/v1/models", "/v1/collections"} <= set(described["paths"])


def test_a_request_id_comes_back(http_serving, fake, png, caplog):
    """In header and reply, also of a refusal; where there is none that can be logged, ours."""

    async def main():
        async with http_serving(fake) as (_, http):
            caplog.set_level(logging.DEBUG, "horace.request")
            reply = await http.post("/v1/embed", files=files(png(1)))
            ours = reply.headers["x-request-id"]
            assert reply.json()["request_id"] == ours
            assert ours in [record.fields["request_id"] for record in caplog.records]
            good = {"x-request-id": "order-7"}
            reply = await http.post("/v1/embed", files=files(png(1)), headers=good)
            assert (reply.headers["x-request-id"], reply.json()["request_id"]) == ("order-7",) * 2
            reply = await http.post("/v1/embed", json={}, headers=good)
            assert (reply.headers["x-request-id"], reply.status_code) == ("order-7", 400)
            reply = await http.get("/v1/models", headers={"x-request-id": "two words"})
            assert re.fullmatch("[0-9a-f]{16}", reply.headers["x-request-id"])
            reply = await http.post("/v1/embed", files=files(png(1)), data={"request_id": "8"})
            assert (reply.headers["x-request-id"], reply.json()["request_id"]) == ("8", "8")

    asyncio.run(main())
