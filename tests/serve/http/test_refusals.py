from __future__ import annotations

import asyncio
import contextlib
import gc
import re
from types import FrameType

import httpx
import pytest

from serve.errors import RequestError
from serve.http.body import _read_json
from serve.http.linger import Linger
from serve.http.options import HttpOptions
from serve.operation.logs import LINES_PER_S, RateFilter


def files(*images):
    """Images as parts of a form."""
    return [("images", (f"{n}.png", data)) for n, data in enumerate(images)]


def test_numbers_of_a_body_are_bounded_too():
    """Each takes its place in memory; a search by a thousand vectors has fewer."""
    with pytest.raises(RequestError, match=r"body: expected at most 1048576 commas, found more"):
        _read_json(b"[" + b"," * 1_048_577, 8)


async def raw_request(url, head, body=b""):
    """Open a connection and send what no well-behaved client would."""
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
    return reader, writer


PNG = "iVBORw0KGgo="


EMBED = [
    ({}, 400, "images: expected a list that is not empty, found None"),
    ({"images": []}, 400, "images: expected a list that is not empty, found []"),
    ({"images": "abc"}, 400, "images: expected a list that is not empty, found 'abc'"),
    ({"images": [7]}, 400, "images[0]: expected text, the base64 of a file, found 7"),
    ({"images": [PNG], "model": "cat"}, 404, "model: expected 'fake', found 'cat'"),
    ({"images": [PNG], "model": 7}, 400, "model: expected text, found 7"),
    ({"images": [PNG], "dims": 99}, 400, "dims: expected 1 to 4, found 99"),
    ({"images": [PNG], "dims": 0}, 400, "dims: expected an integer, 1 to 4294967295, found 0"),
    ({"images": [PNG], "dims": True}, 400, "dims: expected an integer"),
    ({"images": [PNG], "normalize": 1}, 400, "normalize: expected true or false, found 1"),
    ({"images": [PNG], "dtype": "bf16"}, 400, "dtype: expected fp32 or fp16 or int8, found"),
    ({"images": [PNG], "dtype": "fp16"}, 400, "dtype: expected fp32 where vectors are numbers"),
    ({"images": [PNG], "encoding": "hex"}, 400, "encoding: expected float or base64, found"),
    ({"images": [PNG], "dmis": 4}, 400, "field: expected one of images, model, version"),
    ({"images": [PNG] * 9}, 400, "images: expected 1 to 8 a request, found 9; split the"),
    ([1], 400, "body: expected a JSON object, found list"),
]


def test_what_embed_cannot_mean_is_refused(http_serving, fake):
    """With the status of its kind and one line."""

    async def main():
        async with http_serving(fake, max_images_per_request=8) as (_, http):
            for document, status, message in EMBED:
                reply = await http.post("/v1/embed", json=document)
                assert reply.status_code == status, document
                assert message in reply.json()["error"]["message"]

    asyncio.run(main())
    assert fake.batches == []


def test_fields_in_the_address_are_refused(http_serving, fake):
    """A filter that nobody reads would give hits that were not asked for."""

    async def main():
        async with http_serving(fake) as (_, http):
            reply = await http.post("/v1/embed?dims=2", files=files(b"x"))
            assert reply.status_code == 400
            message = reply.json()["error"]["message"]
            assert message == "query: expected none: fields are in the body, found 'dims=2'"

    asyncio.run(main())
    assert fake.batches == []


SEARCH = [
    ({}, "queries: expected one of images, vectors, ids and combined, found none"),
    ({"ids": [1], "images": [PNG]}, "found images and ids"),
    ({"ids": [True]}, "ids: expected ids, as numbers or as text, found True"),
    ({"ids": ["x"]}, "ids: expected ids, as numbers or as text, found 'x'"),
    ({"vectors": [[1], [1, 2]]}, "vectors: expected vectors of one length"),
    ({"vectors": [["1"]]}, "vectors: expected numbers, found something else"),
    ({"vectors": [[]]}, "vectors: expected a list that is not empty"),
    ({"vectors": [[1.0] * 8]}, "expected the fingerprint of the encoder that made them"),
    ({"combined": [{"positives": [{}]}]}, "expected one of image, vector and id in each"),
    ({"combined": [{"positives": [{"image": "?"}]}]}, "positives: expected an image in base64"),
    ({"combined": [{"nonsense": 1}]}, "expected an object of positives, negatives, negative"),
    ({"ids": [1], "k": 2000}, "k: expected 1 to 1000, found 2000"),
    ({"ids": [1], "fingerprint": "f" * 65}, "fingerprint: expected 64 hex digits, found 'fff"),
]


def test_what_search_cannot_mean_is_refused(http_serving, stored):
    """As 400, in one line."""
    served = {"bundle": (str(stored.bundle),), "collection": (str(stored.collection),)}

    async def main():
        async with http_serving(**served) as (_, http):
            for document, message in SEARCH:
                reply = await http.post("/v1/search", json=document)
                assert reply.status_code == 400, reply.text
                assert message in reply.json()["error"]["message"]

    asyncio.run(main())


FORM = "multipart/form-data; boundary=b"
OPEN_FORM = b"--b\r\nContent-Disposition: form-data; name=images\r\n\r\nx"


def a_body(content, kind=None, **headers):
    """A body of some type."""
    named = {"content-type": kind} if kind else {}
    return {"content": content, "headers": {**named, **headers}}


def a_form(*images, headers=None, **fields):
    """A form of images and fields."""
    return {"files": [("images", data) for data in images], "data": fields, "headers": headers}


BODIES = [
    (a_body(b"{", "application/json"), 400, "body: expected JSON, found"),
    (
        a_body(b'{"ids":[' + b"{}," * 5000 + b"0]}", "application/json"),
        400,
        "body: expected at most 4160 lists and objects, found more; split the request",
    ),
    (
        a_body(b"[" + b'"",' * 5000 + b"0]", "application/json"),
        400,
        "body: expected at most 4224 quotation marks, found more; split the request",
    ),
    (a_body(b"x"), 415, "expected application/json or multipart/form-data, not compressed"),
    (a_body(b"x", "text/plain"), 415, "found content-type 'text/plain'"),
    (
        a_body(b"x", "application/json", **{"content-encoding": "gzip"}),
        415,
        "found content-encoding 'gzip'",
    ),
    (a_body(b"x", "multipart/form-data"), 400, "form: expected a boundary in content-type"),
    (a_body(b"x", FORM), 400, "multipart form: found"),
    (a_body(OPEN_FORM, FORM), 400, "multipart form: expected the boundary that ends it"),
    (a_form(b"x", dims=["1", "2"]), 400, "field 'dims': expected one value, found several"),
    (a_form(b"x", model=b"\xff"), 400, "field 'model': expected UTF-8, found other bytes"),
    (a_form(b"x", model="m" * 300000), 400, "field 'model': expected at most 262144 bytes"),
    (a_form(*[b"x"] * 9), 400, "images: expected 1 to 8 a request, found more than 8"),
    (
        {"files": [("file", ("a.jpg", b"x" * 20000))]},
        400,
        "field: expected one of images, model, version, dims, normalize, dtype, encoding, ",
    ),
    (
        a_form(b"x", headers={"x-timeout-ms": "soon"}),
        400,
        "x-timeout-ms: expected milliseconds, 1 or more, found 'soon'",
    ),
    (a_form(b"x", headers={"x-timeout-ms": "0"}), 400, "x-timeout-ms: expected milliseconds"),
    (a_form(b"x" * (1 << 20)), 413, "body: expected at most 1048576 bytes, found"),
]


def test_a_body_that_cannot_be_read_is_refused(http_serving, fake):
    """With a status of HTTP, a code for programs and one line for people."""
    codes = {400: "invalid_argument", 413: "body_too_large", 415: "unsupported_media_type"}

    async def main():
        async with http_serving(fake, max_images_per_request=8, max_message_mib=1) as (_, http):
            for body, status, message in BODIES:
                reply = await http.post("/v1/embed", **body)
                error = reply.json()["error"]
                assert (reply.status_code, error["code"]) == (status, codes[status]), error
                assert message in error["message"]

    asyncio.run(main())
    assert fake.batches == []


def test_ways_that_lead_nowhere_are_json_too(http_serving, fake):
    """What is not there, and what may not be done with what is."""

    async def main():
        async with http_serving(fake) as (_, http):
            missing, wrong = await http.get("/v2/embed"), await http.get("/v1/embed")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
            assert wrong.headers["allow"] == "POST"

    asyncio.run(main())


def test_a_body_is_refused_before_it_is_read(http_serving, fake):
    """By its announced length at once; one of unknown length as soon as it is too long."""
    head = "POST /v1/embed HTTP/1.1\nhost: h\ncontent-type: application/json\n"

    async def main():
        async with http_serving(fake, max_message_mib=1) as (server, _):
            reader, writer = await raw_request(server.http.url, head + f"content-length: {1 << 40}")
            assert (await reader.readline()).startswith(b"HTTP/1.1 413")
            writer.close()
            reader, writer = await raw_request(server.http.url, head + "transfer-encoding: chunked")
            chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
            for _ in range(17):
                writer.write(chunk)
            assert (await reader.readline()).startswith(b"HTTP/1.1 413")
            writer.close()

    asyncio.run(main())


def test_a_refusal_reaches_who_still_sends(http_serving, fake, keys):
    """Half a megabyte is thrown away, and the reply is read: no reset takes it away."""

    async def main():
        async with http_serving(fake, keys=keys) as (_, http):
            for _ in range(20):
                reply = await http.post("/v1/embed", files=files(bytes(500_000)))
                assert reply.status_code == 401
                reply = await http.post("/nowhere", files=files(bytes(500_000)))
                assert reply.status_code == 404

    asyncio.run(main())


def test_who_asks_before_sending_is_told_at_once(http_serving, fake, keys):
    """And sends nothing."""
    head = (
        "POST /v1/embed HTTP/1.1\nhost: h\ncontent-type: application/json\n"
        f"content-length: {1 << 20}\nexpect: 100-continue"
    )

    async def main():
        async with http_serving(fake, keys=keys) as (server, _):
            reader, writer = await raw_request(server.http.url, head)
            assert (await reader.readline()).startswith(b"HTTP/1.1 401")
            writer.close()

    asyncio.run(main())


def test_a_refusal_in_the_midst_of_a_body_that_was_asked_for_is_read():
    """Who was told to send, and is refused after the first part, sends the rest first."""
    parts = [{"type": "http.request", "body": b"x", "more_body": more} for more in (1, 1, 0)]
    scope = {"type": "http", "headers": [(b"expect", b"100-continue")]}
    sent = []

    async def refuse(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 429})

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append((message["status"], len(parts)))

    asyncio.run(Linger(refuse)(scope, receive, send))
    assert sent == [(429, 0)]


def test_a_body_that_does_not_come_holds_nothing(http_serving, fake, png, eventually):
    """Heads that announce all the room that there is turn nobody away."""
    head = (
        "POST /v1/embed HTTP/1.1\nhost: h\ncontent-type: application/json\n"
        f"content-length: {64 << 20}"
    )

    async def main():
        async with http_serving(fake) as (server, http):
            idle = [await raw_request(server.http.url, head) for _ in range(4)]
            await eventually(lambda: server.calls.active == 4)
            reply = await http.post("/v1/embed", files=files(png(1)))
            for _, writer in idle:
                writer.close()
            return reply

    assert asyncio.run(main()).status_code == 200


def test_a_body_that_never_has_room_is_too_long(http_serving, fake):
    """Whatever one request may hold; to try again would be of no use."""

    async def main():
        async with http_serving(fake, http=HttpOptions(port=0, max_body_mib=1)) as (_, http):
            return await http.post("/v1/embed", files=files(bytes(2 << 20)))

    reply = asyncio.run(main())
    assert reply.status_code == 413
    assert "body: expected at most 1048576 bytes" in reply.text


def test_bodies_together_are_bounded(http_serving, fake, png):
    """One that announces more than others have left is told when to come back; the rest go on."""
    options = HttpOptions(port=0, max_body_mib=1)
    head = (
        "POST /v1/embed HTTP/1.1\nhost: h\ncontent-type: application/json\n"
        f"content-length: {800 << 10}"
    )

    async def main():
        async with http_serving(fake, http=options) as (server, http):
            _, slow = await raw_request(server.http.url, head, bytes(799 << 10))
            small = await http.post("/v1/embed", files=files(png(1)))
            async with asyncio.timeout(60):  # until the slow one has come, and is forgotten
                body = files(bytes(500 << 10))
                while (large := await http.post("/v1/embed", files=body)).is_success:
                    pass
                slow.close()
                while not (again := await http.post("/v1/embed", files=files(png(1)))).is_success:
                    pass
            return small, large, again

    small, large, again = asyncio.run(main())
    assert small.status_code == again.status_code == 200
    assert large.status_code == 429
    assert large.json()["error"]["code"] == "resource_exhausted"
    assert "request bodies: expected at most 1048576 bytes in memory" in large.text
    assert int(large.headers["retry-after"]) >= 1


def test_a_full_queue_says_when_to_come_back(http_serving, fake, png, eventually):
    """As 429 with retry-after, while what was accepted is answered."""

    async def main():
        async with http_serving(fake, max_queue_images=1) as (_, http):
            fake.gate.clear()
            held = asyncio.create_task(http.post("/v1/embed", files=files(png(1))))
            await eventually(fake.entered.is_set)
            refused = await http.post("/v1/embed", files=files(png(2)))
            fake.gate.set()
            return refused, await held

    refused, held = asyncio.run(main())
    assert (refused.status_code, held.status_code) == (429, 200)
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) > 0


def test_a_deadline_holds_for_all_of_a_request(http_serving, fake, png):
    """For the computing, and for a body that does not come."""
    head = (
        "POST /v1/embed HTTP/1.1\nhost: h\ncontent-type: application/json\n"
        "x-timeout-ms: 50\ncontent-length: 100"
    )

    async def main():
        async with http_serving(fake) as (server, http):
            fake.gate.clear()
            soon = {"x-timeout-ms": "50"}
            late = await http.post("/v1/embed", files=files(png(1)), headers=soon)
            reader, writer = await raw_request(server.http.url, head)
            assert (await reader.readline()).startswith(b"HTTP/1.1 504")
            writer.close()
            return late

    late = asyncio.run(main())
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_a_head_that_does_not_end_is_cut_off(http_serving, fake, png, monkeypatch, eventually):
    """However slowly it goes on; a connection that says nothing at all is, too."""
    monkeypatch.setattr("serve.http.protocol.PatientProtocol.head_s", 0.1)

    async def cut_off(url, *lines):
        """Open a connection, send lines for ever, and wait for its end."""
        address = httpx.URL(url)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        reading = asyncio.ensure_future(reader.read())
        async with asyncio.timeout(60):
            while not reading.done():
                writer.writelines(lines)
                await asyncio.wait([reading], timeout=0.01)
        with contextlib.suppress(ConnectionError):
            assert reading.result() == b""
        writer.close()

    async def main():
        async with http_serving(fake) as (server, http):
            fake.gate.clear()  # what is computed has another deadline
            held = asyncio.create_task(http.post("/v1/embed", files=files(png(1))))
            await eventually(fake.entered.is_set)
            await cut_off(server.http.url, b"GET /readyz HTTP/1.1\r\n")
            await cut_off(server.http.url)
            fake.gate.set()
            assert (await held).status_code == 200

    asyncio.run(main())


def test_no_request_takes_longer_than_the_server_allows(http_serving, fake, png):
    """Whatever its caller would wait for."""
    options = HttpOptions(port=0, timeout_s=0.05)

    async def main():
        async with http_serving(fake, http=options) as (_, http):
            fake.gate.clear()
            patient = {"x-timeout-ms": "999999"}
            return await http.post("/v1/embed", files=files(png(1)), headers=patient)

    assert asyncio.run(main()).status_code == 504


def test_a_caller_that_hangs_up_cancels(http_serving, fake, png, eventually):
    """What has not started is never computed, and nothing stays behind."""

    async def main():
        async with http_serving(fake) as (server, http):
            engine = server.catalog.model("").engine
            fake.gate.clear()
            held = asyncio.create_task(http.post("/v1/embed", files=files(png(1))))
            await eventually(fake.entered.is_set)
            gone = asyncio.create_task(http.post("/v1/embed", files=files(png(2))))
            await eventually(lambda: engine.statistics().held_requests == 2)
            gone.cancel()
            await eventually(lambda: engine.statistics().held_requests == 1)
            fake.gate.set()
            assert (await held).status_code == 200
            assert (await http.post("/v1/embed", files=files(png(3)))).status_code == 200
            await eventually(lambda: server.calls.active == 0)

    asyncio.run(main())
    assert fake.computed == [1, 3]


def test_no_reply_tells_what_broke_inside(http_serving, fake, png, caplog):
    """An encoder that fails, and our own faults, are 500 without a path or a trace."""
    fake.failures.append(RuntimeError("/secret/path"))

    async def main():
        async with http_serving(fake) as (server, http):
            fake.failures.append(RuntimeError("/secret/path"))
            encoder = await http.post("/v1/embed", files=files(png(1)))
            server.services.Embed = None  # a fault of ours
            ours = await http.post("/v1/embed", files=files(png(1)))
            return encoder, ours

    fake.failures.clear()
    encoder, ours = asyncio.run(main())
    assert (encoder.status_code, ours.status_code) == (500, 500)
    assert encoder.json()["error"]["message"] == "the encoder failed on these images"
    message = ours.json()["error"]["message"]
    assert re.fullmatch(r"internal error; the server's log has it as incident [0-9a-f]{8}", message)
    assert "secret" not in encoder.text + ours.text


def test_callers_cannot_fill_the_log_through_uvicorn(http_serving, fake, caplog):
    """It warns of upgrades and of heads that are none, before any key is asked for."""
    caplog.handler.addFilter(limit := RateFilter(clock=lambda: 0.0))

    async def main():
        async with http_serving(fake) as (_, http):
            for _ in range(100):
                reply = await http.get(
                    "/healthz", headers={"connection": "Upgrade", "upgrade": "h2c"}
                )
                assert reply.status_code == 200

    try:
        asyncio.run(main())
    finally:
        caplog.handler.removeFilter(limit)
    assert 0 < caplog.text.count("WARNING") <= LINES_PER_S


@pytest.mark.usefixtures("no_collector")
def test_what_a_failed_request_held_waits_for_no_collector(http_serving, fake, png):
    """Its error keeps no frames, which would keep the images."""

    async def main():
        async with http_serving(fake) as (_, http):
            data = {"model": "no such"}
            for _ in range(3):
                reply = await http.post("/v1/embed", files=files(png(1)), data=data)
                assert reply.status_code == 404
            await asyncio.sleep(0.1)
            frames = [one.f_code for one in gc.get_objects() if type(one) is FrameType]
            assert not [code for code in frames if code.co_name in ("_unless_gone", "_embed")]

    asyncio.run(main())
