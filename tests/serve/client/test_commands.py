from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from serve.client import Client, ClientTls
from serve.client.__main__ import run
from serve.client.commands.bench import PAUSE_S, BenchCommand, measure
from serve.client.commands.connecting import KEY_VARIABLE, ServerOptions
from serve.security.options import KeyOptions
from serve.security.ring import hash_token


@pytest.fixture
def drawn(monkeypatch):
    """The rows of tiles that would have been drawn, instead of a picture."""
    rows_drawn = []
    monkeypatch.setattr(
        "index.evaluation.plots.draw_grid", lambda _, rows, title: rows_drawn.extend(rows)
    )
    return rows_drawn


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command while a server runs in this process; give status, stdout and stderr."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)

    @asynccontextmanager
    async def running(serving_):
        async with serving_ as server:

            async def call(name, *arguments):
                argv = [name, *map(str, arguments), "--server", server.address]
                status = await asyncio.to_thread(run, argv)
                out, err = capsys.readouterr()
                return status, out, err.splitlines()[-1] if err else ""

            yield server, call

    return running


def of(stored):
    """Options of a server of that collection."""
    return {"bundle": (str(stored.bundle),), "collection": (str(stored.collection),)}


def test_embed_writes_a_line_an_image(command, serving, stored):
    """In order, with its vector to the bit; a file that fails stops nothing and is status 1."""
    bad = stored.folder / "class-0" / "bad.png"
    bad.write_bytes(b"no image")
    empty = stored.folder / "class-0" / "empty.png"
    empty.touch()

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            return await call("embed", stored.folder, stored.files[0], "--images-per-request", 3)

    status, out, error = asyncio.run(main())
    lines = [json.loads(line) for line in out.splitlines()]
    names = [Path(line["file"]).relative_to(stored.folder).as_posix() for line in lines]
    assert names == [*sorted(names[:-1]), "class-0/00.png"]
    statuses = {name: line["status"] for name, line in zip(names, lines, strict=True)}
    assert statuses["class-0/bad.png"] == "unsupported_format"
    assert statuses["class-0/empty.png"] == "empty"
    assert list(statuses.values()).count("ok") == 12
    assert lines[0]["vector"] == lines[-1]["vector"]
    assert np.linalg.norm(lines[0]["vector"]) == pytest.approx(1, abs=1e-6)
    assert status == 1
    found = error.partition("2 of 15 images: expected a vector for each, found ")[2]
    one, other = sorted(found.split(", and "))
    assert one.startswith(f"1 empty, as {empty}: ")
    assert other.startswith(f"1 unsupported_format, as {bad}: ")


def test_embed_writes_an_array(command, serving, stored, tmp_path):
    """With a row for each sound image; the lines beside it say which is which."""
    out = tmp_path / "vectors.npy"

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            return await call("embed", stored.folder, "--out", out, "--dims", 4)

    status, printed, _ = asyncio.run(main())
    assert (status, printed) == (0, "")
    array = np.load(out)
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert (array.shape, array.dtype) == ((12, 4), np.float32)
    assert [line["row"] for line in lines] == list(range(12))
    assert "vector" not in lines[0]


def test_an_array_is_of_one_encoder(command, serving, fake, stored, tmp_path):
    """A server that changes its model meanwhile is an error, and nothing is written."""
    out, encode = tmp_path / "vectors.npy", fake.encode

    def change(images_NHWC):
        if fake.batches:
            fake.fingerprint = "e" * 64
        return encode(images_NHWC)

    async def main():
        async with command(serving(fake)) as (_, call):
            fake.encode = change
            one_by_one = ("--images-per-request", 1, "--in-flight", 1)
            return await call("embed", stored.folder, "--out", out, *one_by_one)

    status, _, error = asyncio.run(main())
    assert status == 1
    assert re.search(
        rf"expected one encoder for all images, f{{64}}, found another from {stored.files[1]} on, "
        r"e{64}; the server has changed its model: embed again$",
        error,
    )
    assert not out.exists()
    assert not out.with_suffix(".jsonl").exists()


def test_what_cannot_be_read_loses_nothing_else(command, serving, fake, stored, tmp_path):
    """A file that is not there, a name that is none, a folder without images: each has a line."""
    nowhere, nameless = tmp_path / "nowhere.png", tmp_path / ("n" * 300)
    empty, odd = tmp_path / "empty\udcff", tmp_path / "odd\udcff.png"
    empty.mkdir()
    (empty / "a.tar").touch()
    odd.write_bytes(stored.files[0].read_bytes())
    out = tmp_path / "vectors.npy"
    files = (nowhere, stored.files[0], nameless, empty, odd)

    async def main():
        async with command(serving(fake)) as (_, call):
            return await call("embed", *files, "--out", out)

    status, _, error = asyncio.run(main())
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert status == 1
    assert "3 of 5 images: expected a vector for each, found 3 unreadable, as " in error
    assert [line["status"] for line in lines] == [
        "unreadable", "ok", "unreadable", "unreadable", "ok",
    ]  # fmt: skip
    assert [line.get("row") for line in lines] == [None, 0, None, None, 1]
    assert lines[4]["file"] == f"{tmp_path}/odd\\xff.png"
    messages = [line["message"] for line in lines if line["status"] != "ok"]
    what = "expected a readable file, found "
    mend = "; check the path and its permissions"
    assert messages[:2] == [
        f"{what}No such file or directory{mend}", f"{what}File name too long{mend}",
    ]  # fmt: skip
    assert lines[3]["file"] == f"{tmp_path}/empty\\xff"
    assert messages[2].startswith("expected images (")
    assert messages[2].endswith(f", found 1 other file: 1 .tar{mend}")


@pytest.mark.parametrize(
    ("command_", "option", "name"),
    [("embed", "--out", "v.npy"), ("embed", "--out", "v.jsonl"), ("search", "--grid", "g.png")],
)
def test_no_directory_is_made_for_what_is_written(
    command, serving, fake, stored, tmp_path, command_, option, name
):
    """A slip in its path is told before anything is sent."""
    out = tmp_path / "nowhere" / name
    pictures = ("--pictures", f"folder:{stored.folder}") if option == "--grid" else ()

    async def main():
        async with command(serving(fake)) as (server, call):
            answer = await call(command_, stored.files[0], option, out, *pictures)
            return answer, server.catalog

    (status, printed, error), _ = asyncio.run(main())
    assert (status, printed) == (1, "")
    assert error == (
        f"python -m serve.client {command_}: {option} {out}: expected a file that can be written, "
        f"found no directory {out.parent}; make it or choose another"
    )
    assert not out.parent.exists()


def test_search_takes_keys_of_stored_images(command, serving, stored, monkeypatch):
    """As an answer shows them, to be like or unlike; one that is not there is its own failure.

    However many: their ids are asked for by a few.
    """
    monkeypatch.setattr("serve.client.commands.search.KEYS_AT_ONCE", 1)
    key, other = "class-0/00.png", "class-1/01.png"

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            _, out, _ = await call("search", stored.files[0], "--json", "--k", 12)
            ids = {hit["key"]: hit["id"] for hit in json.loads(out)["queries"][0]["hits"]}
            by_id = await call("search", "--id", ids[key], "--json")
            by_key = await call("search", "--key", key, "it's", "--json")
            unlike = await call("search", "--key", key, "--not-key", other, "--json")
            unlike_id = await call("search", "--id", ids[key], "--not-id", ids[other], "--json")
            missing = await call("search", "--key", key, "--not-key", "none")
            return by_id, by_key, unlike, unlike_id, missing

    by_id, by_key, unlike, unlike_id, missing = asyncio.run(main())
    (expected,) = json.loads(by_id[1])["queries"]
    known, unknown = json.loads(by_key[1])["queries"]
    assert known == expected | {"query": key}
    mend = "take keys from a search of it"
    message = f"""key "it's": expected a key of the collection, found none such; {mend}"""
    assert (unknown["query"], unknown["error"], unknown["hits"]) == ("it's", message, [])
    assert by_key[0] == 1
    assert by_key[2] == f"python -m serve.client search: it's: {message}"
    (combined,), (combined_by_id,) = (
        json.loads(out)["queries"] for _, out, _ in (unlike, unlike_id)
    )
    assert combined == combined_by_id | {"query": f"{key}, not {other}"}
    assert missing[0] == 1
    assert missing[2].endswith(
        f"search: key 'none': expected a key of the collection, found none such; {mend}"
    )


def test_keys_are_looked_up_by_as_many_as_the_server_allows(command, serving, stored):
    """Which may be no more than the search itself asks for."""
    keys = [path.relative_to(stored.folder).as_posix() for path in stored.files]

    async def main():
        async with command(serving(max_neighbours=2, **of(stored))) as (_, call):
            return await call("search", "--key", *keys, "--k", 2, "--json")

    status, out, _ = asyncio.run(main())
    assert status == 0
    assert [len(query["hits"]) for query in json.loads(out)["queries"]] == [2] * 12


@pytest.mark.parametrize("collection", [[], ["--collection", "other"]])
def test_keys_of_a_collection_that_is_not_there(command, serving, fake, collection):
    """The server says which there are."""

    async def main():
        async with command(serving(fake)) as (_, call):
            return await call("search", "--key", "a", *collection), await call(
                "search", "--id", "1", *collection
            )

    by_key, by_id = asyncio.run(main())
    assert by_key == by_id
    assert by_key[0] == 1


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--filter", "label = 'circels'"], "no image passes the filter"),
        (["--filter", "label = 'circels'", "--min-score", ".9"],
         "no image that passes the filter is as near as --min-score 0.9"),
        (["--not", "a.png", "--min-score", ".9999"], "no image is as near as --min-score 0.9999"),
    ],
)  # fmt: skip
def test_where_nothing_is_found_the_text_says_why(
    command, serving, stored, tmp_path, monkeypatch, args, why
):
    """In the place of a table, with status 0; other queries of stored images have no others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(stored.files[1].read_bytes())
    alone = ("--key", "class-0/00.png", "--filter", "key = 'class-0/00.png'")

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            found = await call("search", stored.files[0], *args)
            document = await call("search", stored.files[0], *args, "--json")
            return found, document, await call("search", *alone)

    (status, out, _), document, stored_alone = asyncio.run(main())
    assert (status, out.splitlines()[1:]) == (0, [f"  {why}"])
    assert json.loads(document[1])["queries"][0]["hits"] == []
    assert stored_alone[:2] == (0, "class-0/00.png\n  no other image passes the filter\n")


def test_search_finds_by_files_ids_and_vectors(command, serving, stored, tmp_path):
    """As a table or as JSON; a file finds itself first, an id does not; a picture on request."""
    first = stored.files[0]
    array, grid = tmp_path / "v.npy", tmp_path / "grid.png"
    key = first.relative_to(stored.folder).as_posix()

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            status, out, _ = await call("search", first, "--k", 2)
            assert status == 0
            assert out.splitlines()[0] == str(first)
            assert re.fullmatch(rf"   1\.0000  class-0  \d+ +{key}", out.splitlines()[2])
            pictures = f"folder:{stored.folder}"
            drawn = ("--grid", grid, "--pictures", pictures)
            status, out, _ = await call("search", first, "--k", 2, "--json", *drawn)
            (query,) = json.loads(out)["queries"]
            assert (query["query"], query["error"]) == (str(first), None)
            hit = query["hits"][0]
            assert (hit["key"], hit["label"], "vector" in hit) == (key, "class-0", False)
            assert isinstance(hit["id"], str)  # which a reader in JavaScript rounds otherwise
            _, out, _ = await call("search", "--id", hit["id"], "--json")
            assert hit["id"] not in [h["id"] for h in json.loads(out)["queries"][0]["hits"]]
            await call("embed", first, "--out", array)
            by_vector = ("--vectors", array, "--fingerprint", stored.fingerprint)
            _, out, _ = await call("search", *by_vector, "--json")
            assert json.loads(out)["queries"][0]["hits"][0]["key"] == key
            _, out, _ = await call("search", first, "--filter", "label = 'class-1'", "--json")
            labels = {h["label"] for h in json.loads(out)["queries"][0]["hits"]}
            assert labels == {"class-1"}
            status, _, error = await call("search", first, "--effort", 10_001)
            assert status == 1
            assert "effort: expected 0 to 10000, found 10001" in error

    asyncio.run(main())
    assert grid.read_bytes().startswith(b"\x89PNG")


def test_names_reach_no_terminal_as_more_than_names(
    command, serving, stored, make_bundle, tmp_path
):
    """Keys and labels of a collection are whoever's who named the files."""
    from index.build import BuildOptions, build

    folder, out = tmp_path / "others" / "cl\nass", tmp_path / "odd"
    folder.mkdir(parents=True)
    (folder / "\x1b[2J.png").write_bytes(stored.files[0].read_bytes())
    build(BuildOptions(images=str(folder.parent), encoder=str(stored.bundle), out=out))

    async def main():
        options = {"bundle": (str(stored.bundle),), "collection": (str(out),)}
        async with command(serving(**options)) as (_, call):
            by_file = await call("search", stored.files[0])
            return by_file, await call("search", "--key", "cl\nass/\x1b[2J.png")

    (_, out, _), by_key = asyncio.run(main())
    assert re.fullmatch(r"   1\.0000  cl\\nass  \d+ +cl\\nass/\\x1b\[2J\.png", out.splitlines()[2])
    assert by_key[1] == "cl\\nass/\\x1b[2J.png\n  no other image is there\n"


def test_a_picture_has_the_first_neighbours_and_says_what_it_shows(
    command, serving, stored, drawn, tmp_path, monkeypatch
):
    """However many are asked for; a query of several examples is called as its picture is."""
    monkeypatch.setattr("index.evaluation.plots.MAX_GRID_COLUMNS", 2)
    like, unlike = stored.files[0], stored.files[-1]
    picture = ("--grid", tmp_path / "grid.png", "--pictures", f"folder:{stored.folder}")

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            return await call("search", like, "--not", unlike, "--k", 5, *picture)

    assert asyncio.run(main())[0] == 0
    ((query, tiles),) = drawn
    assert (query.image, query.caption) == (like.read_bytes(), like.name)
    assert len(tiles) == 2


def test_search_takes_several_examples_as_one_query(command, serving, stored, tmp_path):
    """Like some, unlike others; examples of the collection are not found."""
    bad = tmp_path / "bad.png"
    bad.touch()
    like, unlike = stored.files[0], stored.files[-1]

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            _, out, _ = await call("search", like, "--not", unlike, "--json")
            ids = [hit["id"] for hit in json.loads(out)["queries"][0]["hits"]]
            _, text, _ = await call(
                "search", "--id", ids[0], ids[1], "--together", "--not-id", ids[-1]
            )
            broken = await call("search", bad, "--together")
            unweighed = ("--not", unlike, "--not-weight", 0)
            _, light, _ = await call("search", like, *unweighed, "--json")
            return out, ids, text, broken, light

    out, ids, text, broken, light = asyncio.run(main())
    (query,) = json.loads(out)["queries"]
    assert json.loads(light)["queries"][0]["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert query["hits"][0]["score"] < 0.9999
    assert query["query"] == f"{like}, not {unlike}"
    assert query["hits"][0]["key"] == "class-0/00.png"
    assert text.startswith(f"{ids[0]} and {ids[1]}, not {ids[-1]}\n")
    assert len(text.splitlines()) == 2 + 12 - 3
    assert (broken[0], broken[2]) == (
        1,
        f"python -m serve.client search: {bad}: expected an image, found no bytes",
    )


def test_search_answers_the_good_queries(command, serving, stored, tmp_path):
    """Each bad one has a line, and the status is 1."""
    bad, nowhere = tmp_path / "bad.png", tmp_path / "nowhere.png"
    bad.write_bytes(b"no image")

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            return await call("search", bad, stored.files[0], nowhere)

    status, out, error = asyncio.run(main())
    assert status == 1
    assert "class-0/00.png" in out
    assert f"search: 2 bad queries of 3, the first {bad}: image: expected JPEG, " in error


def test_a_search_without_an_answer_draws_nothing(command, serving, stored, tmp_path):
    """What was drawn before stays, as with index.search."""
    bad, grid = tmp_path / "bad.png", tmp_path / "grid.png"
    bad.touch()
    grid.write_bytes(b"of before")

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            picture = ("--grid", grid, "--pictures", f"folder:{stored.folder}")
            return await call("search", bad, *picture)

    status, _, error = asyncio.run(main())
    assert (status, grid.read_bytes()) == (1, b"of before")
    assert error.endswith(f"{bad}: expected an image, found no bytes")


def test_a_picture_has_the_first_queries_that_were_answered(
    command, serving, stored, drawn, tmp_path, monkeypatch
):
    """As many bad ones as it has rows, before them, left it without any."""
    monkeypatch.setattr("index.evaluation.plots.MAX_GRID_ROWS", 1)
    (bad := tmp_path / "bad.png").touch()
    good, other = stored.files[:2]

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            picture = ("--grid", tmp_path / "grid.png", "--pictures", f"folder:{stored.folder}")
            return await call("search", bad, good, other, *picture)

    assert asyncio.run(main())[0] == 1
    assert [query.caption for query, _ in drawn] == [good.name]


def test_one_failure_is_told_as_itself(command, serving, stored, tmp_path):
    """And not counted."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            return [await call(name, bad, stored.files[0]) for name in ("embed", "search")]

    for name, (status, _, error) in zip(("embed", "search"), asyncio.run(main()), strict=True):
        assert status == 1
        assert error.startswith(f"python -m serve.client {name}: {bad}: image: expected JPEG, ")


def test_models_and_health_say_what_is_served(command, serving, stored):
    """For people and for machines."""

    async def main():
        async with command(serving(**of(stored))) as (_, call):
            _, table, _ = await call("models")
            _, document, _ = await call("models", "--json")
            return table, json.loads(document), await call("health")

    table, document, health = asyncio.run(main())
    assert table.splitlines()[1].split()[:4] == ["tiny", "(default)", "16", "28x28x1"]
    assert table.splitlines()[4].split()[:2] == ["things", "12"]
    assert document["models"][0]["fingerprint"] == stored.fingerprint
    assert document["collections"][0]["count"] == 12
    assert health == (0, "serving\n", "")


def test_a_server_that_does_not_serve_is_status_1(command, serving, fake):
    """In one line."""

    async def main():
        async with command(serving(fake)) as (server, call):
            server.health.set_serving(False)
            return await call("health")

    status, out, error = asyncio.run(main())
    assert (status, out) == (1, "")
    assert error.endswith(
        ": expected one that serves, found one that does not now; "
        "wait until it is ready; its log says why it is not"
    )


@pytest.mark.parametrize("frontend", ["grpcio"])  # what is measured, and not how
@pytest.mark.parametrize("mode", [["--concurrency", "3"], ["--rate", "100"]])
def test_bench_counts_what_was_answered(command, serving, fake, stored, mode):
    """Requests, images, latencies; images without a vector apart."""
    bad = stored.folder / "bad.png"
    bad.write_bytes(b"no image")
    timing = ("--seconds", 0.5, "--warm-up-s", 0.1)

    async def main():
        async with command(serving(fake)) as (_, call):
            _, out, _ = await call("bench", *mode, *timing, "--json", "--images-per-request", 2)
            files = (stored.files[0], bad)
            status, text, error = await call("bench", *files, *mode, *timing)
            return json.loads(out), status, text, error

    report, status, text, error = asyncio.run(main())
    assert status == 1
    assert re.search(
        r"expected a vector for .*, found \d+ requests answered, \d+ images unsu", error
    )
    assert report["model"] == "fake"
    assert report["requests"] > 0
    assert report["images_per_s"] == pytest.approx(2 * report["requests_per_s"], rel=0.05)
    assert report["p50_ms"] <= report["p90_ms"] <= report["p99_ms"] <= report["max_ms"]
    assert report["errors"] == {}
    assert re.search(r"images without a vector: \d+ unsupported_format\n", text)
    assert "latency p50 " in text


@pytest.mark.parametrize("frontend", ["grpcio"])
def test_bench_counts_errors_by_code_and_hides_none(command, serving, fake):
    """Without a retry, but with a pause after each; the status is 1."""

    def fail(images_NHWC):
        raise RuntimeError

    async def main():
        async with command(serving(fake, max_queue_images=1)) as (_, call):
            fake.encode = fail
            timing = ("--seconds", 0.5, "--warm-up-s", 0)
            return await call("bench", "--json", "--concurrency", 4, *timing)

    status, out, error = asyncio.run(main())
    report = json.loads(out)
    errors = report["errors"]
    assert status == 1
    assert set(errors) <= {"INTERNAL", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert 0 < sum(errors.values()) <= 4 * (1 + report["seconds"] / PAUSE_S)
    assert "expected a vector for every image, found 0 requests answered, " in error


@pytest.mark.parametrize("frontend", ["grpcio"])
def test_bench_fails_where_one_request_did(command, serving, fake):
    """Whatever was answered besides."""
    timing = ("--seconds", 0.3, "--warm-up-s", 0)

    async def main():
        async with command(serving(fake)) as (_, call):
            fake.failures.append(RuntimeError("once"))
            return await call("bench", "--concurrency", 1, *timing)

    status, out, error = asyncio.run(main())
    assert status == 1
    assert "  INTERNAL: 1 requests\n" in out
    assert re.search(r"found \d+ requests answered, 1 requests INTERNAL$", error)


@pytest.mark.parametrize("frontend", ["grpcio"])
def test_bench_waits_for_no_request_that_is_due_after_the_end(command, serving, fake):
    """However few there are a second."""
    timing = ("--seconds", 0.1, "--warm-up-s", 0)

    async def main():
        async with command(serving(fake)) as (_, call):
            return await asyncio.wait_for(call("bench", "--rate", 0.02, *timing), 30)

    _, out, _ = asyncio.run(main())
    assert "open loop, 0.02 requests a second" in out


@pytest.mark.parametrize("frontend", ["grpcio"])
def test_bench_counts_what_a_server_that_stalls_answers_late(serving, fake, eventually):
    """By when it was due; to throughput it adds nothing."""

    async def main():
        async with serving(fake) as server:
            fake.gate.clear()
            options = BenchCommand(server=server.address, rate=50, seconds=0.2, warm_up_s=0)
            task = asyncio.create_task(measure(options))
            await eventually(fake.entered.is_set)
            await asyncio.wait([task], timeout=0.5)  # and the time that is measured is over
            fake.gate.set()
            return await task

    report = asyncio.run(main())
    assert report.requests > 0
    assert report.p50_ms > 200
    assert report.requests_per_s == report.images_per_s == 0


def test_bench_that_is_interrupted_waits_for_no_reply(serving, fake, eventually):
    """A server that hangs keeps nobody at the terminal."""

    async def main():
        async with serving(fake) as server:
            fake.gate.clear()
            task = asyncio.create_task(measure(BenchCommand(server=server.address)))
            await eventually(fake.entered.is_set)
            task.cancel()  # as Ctrl-C does
            done, _ = await asyncio.wait([task], timeout=30)
            return [one.cancelled() for one in done]

    assert asyncio.run(main()) == [True]


def test_bench_without_a_model_says_so(command, serving, make_bundle):
    """There may be none, and there may be others."""
    options = {"bundle": (str(make_bundle().path),), "model_control": True}

    async def main():
        async with command(serving(**options)) as (server, call):
            _, _, other = await call("bench", "--model", "cat")
            await server.lifecycle.unload("tiny")
            return other, (await call("bench"))[2]

    other, none = asyncio.run(main())
    assert other.endswith(": --model: expected 'tiny', found 'cat'; choose one that is served")
    assert none.endswith("expected a server that has one, found none; have the server load one")


def test_the_key_comes_from_a_file_or_the_environment(
    command, serving, fake, tmp_path, monkeypatch
):
    """And from no option that other users of the machine would see."""
    ring, key = tmp_path / "ring", tmp_path / "key"
    ring.write_text(f"alice:{hash_token('sesame').hex()}\n")
    key.write_text("sesame\n")

    async def main():
        async with command(serving(fake, keys=KeyOptions(file=str(ring)))) as (_, call):
            status, _, error = await call("models")
            assert status == 1
            assert "API key" in error
            assert (await call("models", "--api-key-file", key))[0] == 0
            monkeypatch.setenv(KEY_VARIABLE, "sesame")
            assert (await call("models"))[0] == 0

    asyncio.run(main())


def test_options_of_tls_make_a_client_of_tls(monkeypatch):
    """Any of them implies it."""
    seen = []
    monkeypatch.setattr(ClientTls, "credentials", lambda self: seen.append(self))
    monkeypatch.setattr("serve.client.connection.grpc.secure_channel", lambda *_, **__: None)
    monkeypatch.setattr("serve.client.blocking.methods_of", lambda channel: {})
    ServerOptions(server="a:1", tls_name="horace").connect()
    ServerOptions(server="a:1", tls=True).connect()
    assert [tls.server_name for tls in seen] == ["horace", None]
    assert isinstance(ServerOptions(server="a:1").connect(), Client)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "command: expected embed, search, bench, models or health, found none"),
        (["fly"], "command: expected embed, search, bench, models or health, found 'fly'"),
        (["embed", "x", "--dtype", "bf16"], "dtype: expected fp32 or fp16 or int8, found 'bf16'"),
        (["embed", "x", "--out", "v.txt"], "--out: expected a name that ends in .npy or .jsonl"),
        (["embed", "x", "--timeout-s", "0"], "timeout_s: expected a positive number of seconds"),
        (
            ["embed", "x", "--server", ""],
            "expected HOST:PORT, such as localhost:50051, found nothing",
        ),
        (["health", "--server", "localhost"], "--server: expected HOST:PORT"),
        (["health", "--service", "\udcff"], "service: expected text that UTF-8 can write"),
        (["embed", "x", "--api-key-file", "no"], "--api-key-file no: expected a file with a key"),
        (["embed", "x", "--tls-ca", "no.pem"], "ca no.pem: expected a PEM file"),
        (["search"], "queries: expected image files, --key, --id or --vectors, found none of them"),
        (["search", "x", "--k", "0"], "k: expected an integer, 1 to"),
        (["search", "x", "--effort", "0"], "effort: expected an integer, 1 to"),
        (["search", "x", "--effort", "9", "--exact"], "--effort: expected an index to search"),
        (["search", "x", "--not-weight", "11"], "--not-weight: expected a number, 0 to 10"),
        (["search", "--vectors", "v.npy"], "--vectors: expected --fingerprint"),
        (["search", "--vectors", "no.npy", "--fingerprint", "f"], "--vectors no.npy: expected a"),
        (["search", "--not", "x", "--id", "1", "--vectors", "v.npy"], "--vectors: expected"),
        (["search", "--vectors", "v", "--not-id", "1"], "--vectors: expected --fingerprint"),
        (["search", "x", "--grid", "g.jpg"], "--grid: expected a name that ends in .png"),
        (["search", "x", "--grid", "g.png"], "--grid: expected --pictures SOURCE beside it"),
        (["bench", "--concurrency", "0"], "--concurrency: expected at least 1, found 0"),
        (["bench", "--rate", "0"], "--rate: expected above 0, found 0"),
        (["bench", "--rate", "1e9"], "--rate: expected below 1e+09, found 1000000000.0"),
        (["bench", "--warm-up-s", "inf"], "--warm-up-s: expected below 1e+09, found inf"),
        (["bench", "--warm-up-s", "-1"], "--warm-up-s: expected 0 or more, found -1"),
        (["bench", "--priority", "9"], "priority: expected an integer, 0 to 3, found 9"),
    ],
)
def test_bad_use_is_one_line_and_status_2(argv, message, capsys, monkeypatch, tmp_path):
    """Before a server is asked."""
    monkeypatch.chdir(tmp_path)
    assert run(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "content", [b"", b"no array", b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00\x02\x00(("]
)
def test_what_is_no_array_is_bad_use(content, capsys, tmp_path):
    """Whatever NumPy makes of its bytes."""
    path = tmp_path / "v.npy"
    path.write_bytes(content)
    assert run(["search", "--vectors", str(path), "--fingerprint", "f"]) == 2
    expected = f"--vectors {path}: expected a .npy file of (N, D) numbers, found another\n"
    assert capsys.readouterr().err == f"python -m serve.client search: {expected}"


def test_no_server_is_one_line_and_status_1():
    """In a process of its own, as people run it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        argv = [sys.executable, "-m", "serve.client", "health", "--server", target]
        done = subprocess.run([*argv, "--timeout-s", "20"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert f"server {target}: expected a Horace server that answers" in done.stderr


def test_a_handshake_that_fails_is_one_line(start_server, make_bundle):
    """Of gRPC's own none."""
    server = start_server("--bundle", str(make_bundle().path), "--frontend", "grpcio")
    argv = [sys.executable, "-m", "serve.client", "health", "--server", server.address, "--tls"]
    done = subprocess.run([*argv, "--timeout-s", "20"], capture_output=True, text=True)
    assert len(done.stderr.splitlines()) == 1
    assert "the server may speak no TLS" in done.stderr


def test_help_is_on_stdout(capsys):
    """With every command in a line."""
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("embed", "search", "bench", "models", "health"):
        assert re.search(rf"^  {name} ", out, re.MULTILINE)
