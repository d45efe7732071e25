from __future__ import annotations

import asyncio
import errno
import gc
import re
import shutil
import weakref

import grpc
import numpy as np
import pytest

from models.bundle import BUNDLE_FILE, Bundle, write_bundle
from models.errors import BundleError, FingerprintMismatchError, UsageError
from models.wire import image_to_wire
from protos import horace_pb2 as pb
from protos import horace_pb2_grpc as pb_grpc
from serve.client import AsyncClient
from serve.config import ServeOptions
from serve.errors import PreconditionError, StartError, UnknownNameError
from serve.operation.logs import LINES_PER_S, RateFilter
from serve.operation.options import MetricsOptions
from serve.operation.tally import KEPT_VERSIONS
from serve.server import Server

IMAGE = np.zeros((28, 28), np.uint8)


@pytest.fixture
def frontend() -> str:
    """What is held here does not depend on the front end."""
    return "grpcio"


def version(server: Server, name: str = "m") -> tuple[str, str]:
    """The version that is served, and its encoder."""
    model = server.catalog.model(name)
    return model.version, model.encoder.fingerprint


def served_versions(server: Server) -> dict[str, str]:
    """The version of every model that is served by default."""
    return {name: model.version for name, model in server.catalog.models.items()}


def put_two_precisions(path, one: Bundle, other: Bundle) -> None:
    """Write a bundle whose int8 is another encoder, in the place of what is there."""
    write_bundle(
        path,
        name="m",
        files={"encoder.onnx": one.encoder_path, "encoder.int8.onnx": other.encoder_path},
        preprocessing=one.preprocessing,
        output=one.output,
        provenance={},
        replace=True,
    )


def test_a_bundle_that_changed_is_swapped_and_the_old_one_freed(serving, put_bundle, tmp_path):
    """A reload counts the version up; engine, threads and session of the old one are gone."""
    one = put_bundle(tmp_path / "m", 1)

    async def main():
        async with serving(bundle=(f"m={one.path}",)) as server:
            assert version(server) == ("1", one.fingerprint)
            old = server.catalog.model("m")
            gone = [weakref.ref(old.encoder), weakref.ref(old.engine)]
            assert await server.reloads.run() == []
            assert version(server) == ("1", one.fingerprint)
            two = put_bundle(tmp_path / "m", 2)
            assert await server.reloads.run() == []
            assert version(server) == ("2", two.fingerprint)
            del old
            await server._disposal_pool.run(gc.collect)
            gc.collect()
            assert [ref() for ref in gone] == [None, None]
            async with AsyncClient(server.address) as client:
                assert (await client.embed([IMAGE])).fingerprint == two.fingerprint

    asyncio.run(main())


def test_a_reload_of_which_a_part_was_refused_says_which(serving, put_bundle, tmp_path, caplog):
    """One of three models is damaged, one is new, and one is as it was: that has no word."""
    for name in "abc":
        put_bundle(tmp_path / name, 1)
    bundles = tuple(f"{name}={tmp_path / name}" for name in "abc")

    async def main():
        async with serving(bundle=bundles) as server:
            new = put_bundle(tmp_path / "a", 2)
            put_bundle(tmp_path / "b", 2, damaged=True)
            assert await server.reloads.run() == ["models and collections"]
            assert version(server, "a") == ("2", new.fingerprint)

    asyncio.run(main())
    last = caplog.messages[-1]
    assert last == (
        "reload of models and collections refused in part: model b as before, for the reasons "
        "above; model a read again"
    )


def test_a_damaged_bundle_is_refused_and_the_old_one_serves(serving, put_bundle, tmp_path, caplog):
    """One line in the log, one in the count; mended, it is taken."""
    one = put_bundle(tmp_path / "m", 1)

    async def main():
        async with serving(bundle=(f"m={one.path}",)) as server:
            put_bundle(tmp_path / "m", 2, damaged=True)
            assert await server.reloads.run() == ["models and collections"]
            assert version(server) == ("1", one.fingerprint)
            statistics = server.lifecycle.statistics()["model m"]
            assert (statistics.loads, statistics.refusals) == (1, 1)
            assert "expected SHA-256" in statistics.last_refusal
            assert caplog.messages[-1] == (
                "reload of models and collections refused, what was there stays: model m, for the "
                "reasons above"
            )
            assert server.health.serving
            two = put_bundle(tmp_path / "m", 2)
            assert await server.reloads.run() == []
            assert version(server) == ("2", two.fingerprint)
            assert server.lifecycle.statistics()["model m"].last_refusal == ""

    asyncio.run(main())
    assert caplog.text.count("model m refused, what was served is served: ") == 1


def test_an_encoder_that_does_not_run_never_gets_a_caller(fake, serving):
    """It opens well and gives nonsense: the warm-up finds it, and what serves goes on."""

    async def main():
        async with serving(fake, model_control=True) as server:
            fake.failures.append(ValueError("no"))
            with pytest.raises(Exception, match="the encoder failed on these images"):
                await server.lifecycle.load("fake")
            assert server.catalog.model("fake").version == "1"
            assert server.health.serving
            await server.lifecycle.load("fake")
            assert server.catalog.model("fake").version == "2"

    asyncio.run(main())


def test_an_encoder_that_gives_no_numbers_does_not_start(fake, serving):
    """The line names the model and what was wrong with its vector."""
    fake.encode = lambda images: np.full((len(images), 4), np.nan, np.float32)

    async def main():
        async with serving(fake):
            raise AssertionError("it should not start")

    with pytest.raises(StartError, match="model fake: expected a vector of finite numbers"):
        asyncio.run(main())


def test_a_model_whose_name_is_taken_is_closed(fake):
    """It was opened to learn its name."""
    other = type(fake)()
    encoders = {"fake://one": fake, "fake://other": other}

    async def main():
        options = ServeOptions(port=0, bundle=tuple(encoders))
        server = Server(options, open_model=lambda uri, **_: encoders[uri])
        with pytest.raises(UsageError, match="--bundle fake: expected a name of its own"):
            await server.start()

    asyncio.run(main())
    assert other.closed


def test_a_crashed_model_is_healed_by_loading_it_again(fake, serving, eventually):
    """Its thread is lost and the server is not ready; a load makes it ready again."""

    async def main():
        async with serving(fake, model_control=True) as server:
            server.catalog.model("fake").engine._crashed = True
            server._tell_health()
            assert not server.health.serving
            await server.lifecycle.load("fake")
            assert server.health.serving

    asyncio.run(main())


def test_the_newest_versions_are_served(serving, put_bundle, tmp_path):
    """Two are kept: both can be leased by number; a third comes and the first goes."""
    bundles = {n: put_bundle(tmp_path / "m" / str(n), n) for n in (9, 10)}

    async def main():
        async with serving(bundle=(f"m={tmp_path / 'm'},keep=2",)) as server:
            assert list(server.catalog.versions["m"]) == ["10", "9"]
            with server.catalog.lease_model("m", "9") as model:
                assert model.encoder.fingerprint == bundles[9].fingerprint
            kept = server.catalog.model("m", "10")
            bundles[11] = put_bundle(tmp_path / "m" / "11", 11)
            assert await server.reloads.run() == []
            assert list(server.catalog.versions["m"]) == ["11", "10"]
            assert server.catalog.model("m", "10") is kept
            shutil.rmtree(tmp_path / "m" / "11")
            assert await server.reloads.run() == []
            assert list(server.catalog.versions["m"]) == ["10", "9"]
            assert server.catalog.model("m").encoder is kept.encoder

    asyncio.run(main())


def test_callers_choose_a_version_by_its_number(serving, put_bundle, tmp_path):
    """The newest where none is named; one that is not served is answered with those that are."""
    bundles = {n: put_bundle(tmp_path / "m" / str(n), n) for n in (1, 2)}

    async def main():
        async with (
            serving(bundle=(f"m={tmp_path / 'm'},keep=2",)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub = pb_grpc.HoraceStub(channel)
            for asked, answered in (("", 2), ("2", 2), ("1", 1)):
                images = [image_to_wire(IMAGE[..., None])]
                reply = await stub.Embed(pb.EmbedRequest(images=images, version=asked))
                assert reply.version == str(answered)
                assert reply.fingerprint == bundles[answered].fingerprint
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Embed(pb.EmbedRequest(images=images, version="3"))
            assert error.value.code() is grpc.StatusCode.NOT_FOUND
            assert "version of model 'm': expected '2' or '1'" in error.value.details()
            (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
            assert (model.version, list(model.versions)) == ("2", ["2", "1"])

    asyncio.run(main())


def test_watching_loads_what_has_come_to_rest(serving, put_bundle, tmp_path):
    """The first look sees a change, the second that it is over; a refusal is not repeated."""
    one = put_bundle(tmp_path / "m", 1)

    async def main():
        async with serving(bundle=(f"m={one.path}",)) as server:
            look = server.lifecycle.look
            await look()
            two = put_bundle(tmp_path / "m", 2)
            await look()
            assert version(server)[0] == "1"
            await look()
            assert version(server) == ("2", two.fingerprint)
            put_bundle(tmp_path / "m", 3, damaged=True)
            for _ in range(4):
                await look()
            assert server.lifecycle.statistics()["model m"].refusals == 1
            shutil.rmtree(tmp_path / "m")
            for _ in range(3):
                await look()
            assert version(server) == ("2", two.fingerprint)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["reload", "look"])
def test_what_was_refused_for_no_fault_of_its_files_is_tried_again(
    serving, put_bundle, tmp_path, how
):
    """By every signal, which says what is refused still; by looks once its modes have changed."""
    one = put_bundle(tmp_path / "m", 1)

    async def main():
        async with serving(bundle=(f"m={one.path}",)) as server:
            two = put_bundle(tmp_path / "m", 2)
            loader, counts = server.lifecycle._loader, server.lifecycle.statistics
            load = loader.load

            async def refuse(*_, **__):
                raise BundleError("m", expected="what can be read", found="Permission denied")

            loader.load = refuse
            for refusals in (1, 2):
                assert await server.reloads.run() == ["models and collections"]
                assert counts()["model m"].refusals == refusals
            loader.load = load
            for _ in range(3):
                await server.lifecycle.look()
            assert version(server) == ("1", one.fingerprint)
            if how == "reload":
                assert await server.reloads.run() == []
            else:
                (two.path / BUNDLE_FILE).chmod(0o600)
                for _ in range(2):
                    await server.lifecycle.look()
            assert version(server) == ("2", two.fingerprint)

    asyncio.run(main())


def test_a_bundle_that_was_moved_away_is_told_once(serving, put_bundle, tmp_path, caplog):
    """It is served on, the refusal is counted; back in its place it is loaded."""
    one = put_bundle(tmp_path / "m", 1)

    async def main():
        async with serving(bundle=(f"m={one.path}",)) as server:
            await server.lifecycle.look()
            one.path.rename(tmp_path / "away")
            for _ in range(4):
                await server.lifecycle.look()
            assert version(server) == ("1", one.fingerprint)
            assert server.lifecycle.statistics()["model m"].refusals == 1
            (tmp_path / "away").rename(one.path)
            for _ in range(3):
                await server.lifecycle.look()
            assert version(server) == ("2", one.fingerprint)

    asyncio.run(main())
    (message,) = [m for m in caplog.messages if "refused" in m]
    assert message.endswith("m: expected a bundle, found nothing")


@pytest.mark.parametrize("how", ["reload", "look"])
def test_one_directory_under_several_names_is_read_again_under_each(
    serving, put_bundle, put_collection, tmp_path, how
):
    """Two precisions of a bundle, and a collection by two names; then both are left alone."""
    one, two = put_bundle(tmp_path / "one", 1), put_bundle(tmp_path / "two", 2)
    path = tmp_path / "m"
    put_two_precisions(path, one, two)
    things = put_collection(tmp_path / "things", one)
    options = {
        "bundle": (f"small={path},precision=int8", f"big={path}"),
        "collection": (f"c={things}", f"d={things}"),
    }

    async def main():
        async with serving(**options) as server:

            async def read_again():
                if how == "reload":
                    assert await server.reloads.run() == []
                for _ in range(2 * (how == "look")):
                    await server.lifecycle.look()

            await read_again()
            put_two_precisions(path, one, two)
            put_collection(things, one)
            await read_again()
            assert served_versions(server) == {"small": "2", "big": "2"}
            assert version(server, "small") == ("2", two.fingerprint)
            loads = {name: count.loads for name, count in server.lifecycle.statistics().items()}
            assert loads == {"model small": 2, "model big": 2, "collection c": 2, "collection d": 2}
            await read_again()
            assert served_versions(server) == {"small": "2", "big": "2"}

    asyncio.run(main())


def test_a_model_of_the_repository_may_have_another_name_beside(serving, put_bundle, tmp_path):
    """By its own name and as a bundle: both follow what is on the disk."""
    path = tmp_path / "r" / "m"
    put_bundle(path, 1)

    async def main():
        async with serving(bundle=(f"x={path}",), repository=str(tmp_path / "r")) as server:
            put_bundle(path, 2)
            for _ in range(2):
                await server.lifecycle.look()
            assert served_versions(server) == {"x": "2", "m": "2"}

    asyncio.run(main())


def test_watching_goes_on_by_itself(serving, put_bundle, tmp_path, eventually):
    """With --watch-s nobody has to ask."""
    one = put_bundle(tmp_path / "m", 1)

    async def main():
        async with serving(bundle=(f"m={one.path}",), watch_s=0.01) as server:
            two = put_bundle(tmp_path / "m", 2)
            await eventually(lambda: version(server)[1] == two.fingerprint)

    asyncio.run(main())


def test_models_of_the_repository_have_their_share_of_the_cpus(serving, put_bundle, tmp_path):
    """A bundle that is loaded before them leaves them theirs; what a bundle displaces has none."""
    path = put_bundle(tmp_path / "m", 1).path
    for n, name in enumerate(("a", "b", "taken")):
        put_bundle(tmp_path / "r" / name, n)
    options = {"bundle": (f"m={path}", f"taken={path}"), "repository": str(tmp_path / "r")}

    async def main():
        async with serving(**options, cpu_budget=8) as server:
            return {n: model.encoder.threads for n, model in server.catalog.models.items()}

    assert asyncio.run(main()) == {"m": 2, "taken": 2, "a": 2, "b": 2}


def test_a_repository_is_followed(serving, put_bundle, tmp_path, caplog):
    """What comes is served, what goes is not; one damaged model keeps no other from serving."""
    put_bundle(tmp_path / "r" / "good", 1)
    put_bundle(tmp_path / "r" / "bad", 2, damaged=True)

    async def main():
        async with serving(repository=str(tmp_path / "r")) as server:
            assert list(server.catalog.models) == ["good"]
            states = {s.name: (s.version, s.state) for s in server.lifecycle.index()}
            assert states == {"bad": ("", "unavailable"), "good": ("1", "ready")}
            assert "expected SHA-256" in server.lifecycle.index()[0].reason
            put_bundle(tmp_path / "r" / "bad", 2)
            put_bundle(tmp_path / "r" / "new" / "7", 3)
            for _ in range(2):
                await server.lifecycle.look()
            assert sorted(server.catalog.models) == ["bad", "good", "new"]
            assert version(server, "new")[0] == "7"
            shutil.rmtree(tmp_path / "r" / "good")
            for _ in range(2):
                await server.lifecycle.look()
            assert sorted(server.catalog.models) == ["bad", "new"]
            shutil.rmtree(tmp_path / "r" / "new")
            assert await server.reloads.run() == []
            assert list(server.catalog.models) == ["bad"]
            assert [s.name for s in server.lifecycle.index()] == ["bad"]

    asyncio.run(main())


def test_the_first_name_of_a_repository_is_the_default_loaded_or_not(serving, put_bundle, tmp_path):
    """Whatever loads first: no request without a name lands elsewhere, before or after a start."""
    repository = tmp_path / "r"
    repository.mkdir()

    async def main():
        async with serving(repository=str(repository)) as server:
            put_bundle(repository / "b", 1, damaged=True)
            put_bundle(repository / "c", 2)
            await server.reloads.run()
            assert list(server.catalog.models) == ["c"]
            with pytest.raises(UnknownNameError, match="found 'b'"):
                server.catalog.model()
            put_bundle(repository / "a", 3)
            put_bundle(repository / "b", 1)
            assert await server.reloads.run() == []
            assert server.catalog.model().name == "b"  # and stays it until the next start
        async with serving(repository=str(repository)) as server:
            assert server.catalog.model().name == "a"
            shutil.rmtree(repository / "a")
            assert await server.reloads.run() == []
            with pytest.raises(UnknownNameError, match="found 'a'"):
                server.catalog.model()

    asyncio.run(main())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
def test_a_repository_that_cannot_be_read_keeps_its_models(
    serving, put_bundle, tmp_path, caplog, no_reading, number
):
    """Looks and a signal load and drop nothing of it; one line and one count for all looks."""
    put_bundle(tmp_path / "r" / "m", 1)

    async def main():
        async with serving(repository=str(tmp_path / "r"), model_control=True) as server:
            look, counts = server.lifecycle.look, server.lifecycle.statistics
            await look()
            with no_reading(tmp_path / "r", number):
                for _ in range(3):
                    await look()
                assert counts()[f"repository {tmp_path / 'r'}"].refusals == 1
                assert caplog.text.count("expected a directory of models, found") == 1
                assert await server.reloads.run() == ["models and collections"]
            with no_reading(tmp_path / "r" / "m", number):
                for _ in range(3):
                    await look()
                assert counts()["model m"].refusals == 1
                assert await server.reloads.run() == ["models and collections"]
            for _ in range(2):
                await look()
            assert served_versions(server) == {"m": "1"}
            with (
                no_reading(tmp_path / "r", number),
                pytest.raises(PreconditionError, match="model n: expected a repository that can"),
            ):
                await server.lifecycle.load("n")
            shutil.rmtree(tmp_path / "r" / "m")
            for _ in range(2):
                await look()
            assert not server.catalog.models

    asyncio.run(main())


@pytest.mark.parametrize("how", ["reload", "look"])
def test_a_repository_that_is_away_keeps_nothing_else_from_being_read(
    serving, put_bundle, tmp_path, caplog, how
):
    """A bundle beside it is loaded; its own models are served, and followed once it is back."""
    one = put_bundle(tmp_path / "one", 1)
    put_bundle(tmp_path / "r" / "m", 1)

    async def main():
        async with serving(bundle=(f"x={one.path}",), repository=str(tmp_path / "r")) as server:

            async def read_again():
                if how == "reload":
                    await server.reloads.run()
                for _ in range(3 * (how == "look")):
                    await server.lifecycle.look()

            (tmp_path / "r").rename(tmp_path / "away")
            put_bundle(one.path, 2)
            await read_again()
            assert served_versions(server) == {"x": "2", "m": "1"}
            (tmp_path / "away").rename(tmp_path / "r")
            put_bundle(tmp_path / "r" / "m", 2)
            await read_again()
            assert served_versions(server) == {"x": "2", "m": "2"}

    asyncio.run(main())
    assert caplog.text.count("expected a directory of models, found none") == 1
    assert "Traceback" not in caplog.text


def test_a_directory_that_may_not_be_read_keeps_no_other_model_from_serving(
    serving, put_bundle, tmp_path, caplog, no_reading
):
    """The start refuses it in one line, looks say no more of it, and the others are followed."""
    one = put_bundle(tmp_path / "one", 1)
    for name in ("m", "private"):
        put_bundle(tmp_path / "r" / name, 1)
    options = {"bundle": (f"x={one.path}",), "repository": str(tmp_path / "r")}

    async def main():
        with no_reading(tmp_path / "r" / "private", errno.EACCES):
            async with serving(**options) as server:
                for path in (one.path, tmp_path / "r" / "m"):
                    put_bundle(path, 2)
                for _ in range(3):
                    await server.lifecycle.look()
                assert served_versions(server) == {"x": "2", "m": "2"}
                assert server.lifecycle.statistics()["model private"].refusals == 1

    asyncio.run(main())
    assert caplog.text.count("model private refused, what was served is served: ") == 1
    assert "Traceback" not in caplog.text


def test_a_name_that_is_taken_is_told_once(serving, put_bundle, tmp_path, caplog):
    """However often the repository is looked at; and again where it went and came back."""
    path = put_bundle(tmp_path / "one", 1).path
    put_bundle(tmp_path / "r" / "x", 2)
    told = "model x of the repository is not served: the name is taken"

    async def main():
        async with serving(bundle=(f"x={path}",), repository=str(tmp_path / "r")) as server:
            for _ in range(3):
                await server.lifecycle.look()
            assert caplog.text.count(told) == 1
            (tmp_path / "r" / "x").rename(tmp_path / "away")
            await server.lifecycle.look()
            (tmp_path / "away").rename(tmp_path / "r" / "x")
            await server.lifecycle.look()
            assert caplog.text.count(told) == 2

    asyncio.run(main())


def test_a_model_that_was_moved_away_and_back_is_served_again(serving, put_bundle, tmp_path):
    """By signals alone, though its files look as they did before."""
    here, away = tmp_path / "r" / "m", tmp_path / "away"
    put_bundle(here, 1)

    async def main():
        async with serving(repository=str(tmp_path / "r")) as server:
            for source, target, served in ((here, away, []), (away, here, ["m"])):
                source.rename(target)
                assert await server.reloads.run() == []
                assert list(server.catalog.models) == served

    asyncio.run(main())


def test_every_model_that_is_refused_has_its_line(serving, tmp_path, caplog):
    """Also where they are more than one place may log in a second."""
    names = [f"bad-{n:02}" for n in range(LINES_PER_S + 5)]
    for name in names:
        (tmp_path / "r" / name).mkdir(parents=True)
        (tmp_path / "r" / name / BUNDLE_FILE).write_text("{}")
    caplog.handler.addFilter(limit := RateFilter(clock=lambda: 0.0))

    async def main():
        async with serving(repository=str(tmp_path / "r")):
            pass

    try:
        asyncio.run(main())
    finally:
        caplog.handler.removeFilter(limit)
    assert re.findall("model (.*) refused, what was", caplog.text) == names


def test_callers_load_and_unload_where_they_may(serving, put_bundle, tmp_path):
    """Unloaded it stays so, whatever the disk and the signal say, until it is loaded."""
    put_bundle(tmp_path / "r" / "m", 1)

    async def main():
        async with serving(repository=str(tmp_path / "r"), model_control=True) as server:
            lifecycle = server.lifecycle
            await lifecycle.unload("m")
            assert [(s.state, s.reason) for s in lifecycle.index()] == [("unavailable", "unloaded")]
            put_bundle(tmp_path / "r" / "m", 2)
            await server.reloads.run()
            for _ in range(3):
                await lifecycle.look()
            assert not server.catalog.models
            await lifecycle.load("m")
            assert version(server)[0] == "2"
            await lifecycle.load("m")
            assert version(server)[0] == "3"
            put_bundle(tmp_path / "r" / "n", 3)
            await lifecycle.load("n")
            assert version(server, "n")[0] == "1"
            with pytest.raises(
                UnknownNameError, match="model to load: expected 'm' or 'n', found 'x'"
            ):
                await lifecycle.load("x")
            with pytest.raises(UnknownNameError, match=r"found 'x{80}'$"):
                await lifecycle.load("x" * 100_000)
            put_bundle(tmp_path / "r" / "m", 4, damaged=True)
            with pytest.raises(BundleError, match="expected SHA-256"):
                await lifecycle.load("m")
            assert version(server)[0] == "3"
            assert lifecycle.statistics()["model m"].refusals == 1

    asyncio.run(main())


@pytest.mark.parametrize("how", ["reload", "look"])
def test_a_load_whose_caller_goes_was_not_tried(serving, put_bundle, tmp_path, how):
    """What was cut off is read by the next signal, or the next looks."""
    one = put_bundle(tmp_path / "m", 1)

    async def main():
        async with serving(bundle=(f"m={one.path}",), model_control=True) as server:
            two = put_bundle(tmp_path / "m", 2)
            loader, begun = server.lifecycle._loader, asyncio.Event()
            load = loader.load

            async def hang(*args, **kwargs):
                begun.set()
                await asyncio.Event().wait()

            loader.load = hang
            loading = asyncio.create_task(server.lifecycle.load("m"))
            await begun.wait()
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            loader.load = load
            if how == "reload":
                assert await server.reloads.run() == []
            for _ in range(2 * (how == "look")):
                await server.lifecycle.look()
            assert version(server) == ("2", two.fingerprint)

    asyncio.run(main())


def test_callers_may_not_unless_the_operator_says_so(fake, serving):
    """The line names the option."""

    async def main():
        async with serving(fake) as server:
            for change in (server.lifecycle.load, server.lifecycle.unload):
                with pytest.raises(PreconditionError, match="start it with --model-control"):
                    await change("fake")

    asyncio.run(main())


def test_a_collection_stays_with_the_model_that_made_it(
    serving, put_bundle, put_collection, tmp_path
):
    """The model changes, the collection does not: its queries go to the old version."""
    one = put_bundle(tmp_path / "m", 1)
    things = put_collection(tmp_path / "things", one)

    async def main():
        async with (
            serving(bundle=(f"m={one.path}",), collection=(f"c={things}",)) as server,
            AsyncClient(server.address) as client,
        ):
            two = put_bundle(tmp_path / "m", 2)
            await server.reloads.run()
            assert (await client.embed([IMAGE])).fingerprint == two.fingerprint
            old = server.catalog.collection("c").model
            result = await client.search([IMAGE], k=3)
            assert (result.fingerprint, len(result.hits[0])) == (one.fingerprint, 3)
            assert old.engine.alive
            put_collection(things, two)
            await server.reloads.run()
            result = await client.search([IMAGE], k=3)
            assert (result.fingerprint, len(result.hits[0])) == (two.fingerprint, 3)
            await server._disposal_pool.run(lambda: None)
            assert not old.engine.alive

    asyncio.run(main())


def test_a_version_that_only_a_collection_uses_is_looked_after(
    serving, put_bundle, put_collection, tmp_path, monkeypatch
):
    """The server is ready by it, asks it for no image, and shows it beside the newest."""
    one = put_bundle(tmp_path / "m", 1)
    things = put_collection(tmp_path / "things", one)
    probed = []

    async def warm_up(engine, _):
        probed.append(engine)

    monkeypatch.setattr("serve.server.warm_up", warm_up)

    async def main():
        async with serving(bundle=(f"m={one.path}",), collection=(f"c={things}",)) as server:
            put_bundle(tmp_path / "m", 2)
            await server.reloads.run()
            await server._probe()
            assert probed == [server.catalog.model("m").engine]
            server.catalog.collection("c").model.engine._crashed = True
            server._tell_health()
            assert not server.health.serving
            states = server.operation._state.models()
            assert [(state.version, state.alive) for state in states] == [("2", True), ("1", False)]

    asyncio.run(main())


def test_versions_of_one_number_are_one_in_the_metrics(
    serving, put_bundle, put_collection, tmp_path
):
    """Replaced under its number, while a collection keeps the one before: the new one is shown.

    Where the old one is dead the server is not ready, and the series says of which model.
    """
    one = put_bundle(tmp_path / "m" / "7", 1)
    things = put_collection(tmp_path / "things", one)

    async def main():
        async with serving(bundle=(f"m={tmp_path / 'm'}",), collection=(f"c={things}",)) as server:
            two = put_bundle(tmp_path / "m" / "7", 2)
            await server.reloads.run()
            assert [m.encoder.fingerprint for m in server.catalog.running] == [
                two.fingerprint,
                one.fingerprint,
            ]
            (state,) = server.operation._state.models()
            assert (state.version, state.fingerprint, state.alive) == ("7", two.fingerprint, True)
            server.catalog.collection("c").model.engine._crashed = True
            server._tell_health()
            assert not server.health.serving
            (state,) = server.operation._state.models()
            assert (state.fingerprint, state.alive) == (two.fingerprint, False)

    asyncio.run(main())


def test_every_version_that_is_kept_is_counted(serving, put_bundle, tmp_path):
    """All are opened before the first is offered: more than are remembered of the retired."""
    versions = [str(n) for n in range(1, KEPT_VERSIONS + 3)]
    for n in versions:
        put_bundle(tmp_path / "m" / n, 1)
    options = {
        "bundle": (f"m={tmp_path / 'm'},keep={len(versions)}",),
        "metrics": MetricsOptions(port=0),
    }

    async def main():
        async with serving(**options) as server, AsyncClient(server.address) as client:
            for n in versions:
                await client.embed([IMAGE], version=n)
            text = (await server.operation.metrics()).decode()
            for n in versions:  # and each was warmed up
                assert f'nv_inference_request_success{{model="m",version="{n}"}} 2.0' in text
                with server.operation.models.reading():
                    assert server.operation.models.find("m", n).requests == 2

    asyncio.run(main())


def test_what_is_replaced_while_a_probe_runs_is_not_probed(
    serving, put_bundle, tmp_path, monkeypatch
):
    """The first of two models is probed, the second is swapped meanwhile and closed."""
    paths = [put_bundle(tmp_path / name, n).path for n, name in enumerate("ab")]
    probed = []

    async def main():
        async with serving(bundle=tuple(f"{path.name}={path}" for path in paths)) as server:

            async def warm_up(_, name):
                if not probed:
                    put_bundle(paths[1], 5)
                    await server.reloads.run()
                probed.append(name)

            monkeypatch.setattr("serve.server.warm_up", warm_up)
            await server._probe()
            assert probed == ["a"]

    asyncio.run(main())


def test_a_collection_that_came_first_waits_for_its_model(
    serving, put_bundle, put_collection, tmp_path
):
    """Refused while no model fits, it is taken as soon as one does."""
    one, two = put_bundle(tmp_path / "m", 1), put_bundle(tmp_path / "next", 2)
    things = put_collection(tmp_path / "things", one)

    async def main():
        async with serving(bundle=(f"m={one.path}",), collection=(f"c={things}",)) as server:
            put_collection(things, two)
            assert await server.reloads.run() == ["models and collections"]
            assert server.catalog.collection("c").collection.fingerprint == one.fingerprint
            put_bundle(tmp_path / "m", 2)
            assert await server.reloads.run() == []
            assert server.catalog.collection("c").collection.fingerprint == two.fingerprint
            assert server.catalog.collection("c").model.version == "2"
            counts = server.lifecycle.statistics()["collection c"]
            assert (counts.loads, counts.refusals) == (2, 1)

    asyncio.run(main())


def test_a_collection_that_fits_nothing_does_not_start(put_bundle, put_collection, tmp_path):
    """At the start a mismatch is an error, as ever."""
    one, two = put_bundle(tmp_path / "m", 1), put_bundle(tmp_path / "next", 2)
    things = put_collection(tmp_path / "things", one)

    async def main():
        server = Server(ServeOptions(port=0, bundle=(str(two.path),), collection=(f"c={things}",)))
        await server.start()

    with pytest.raises(FingerprintMismatchError, match="--collection c"):
        asyncio.run(main())


def test_what_changes_while_it_is_read_is_read_again(serving, put_bundle, tmp_path):
    """The first read meets half of a copy; the copy is finished before it gives up."""
    one = put_bundle(tmp_path / "m", 1)

    async def main():
        async with serving(bundle=(f"m={one.path}",)) as server:
            put_bundle(tmp_path / "m", 2, damaged=True)
            loader = server.lifecycle._loader
            load, tries = loader.load, []

            async def load_and_finish_the_copy(*args, **kwargs):
                tries.append(1)
                try:
                    return await load(*args, **kwargs)
                finally:
                    if len(tries) == 1:
                        put_bundle(tmp_path / "m", 2)

            loader.load = load_and_finish_the_copy
            assert await server.reloads.run() == []
            assert (len(tries), version(server)[0]) == (2, "2")

    asyncio.run(main())


def test_a_fault_of_ours_is_counted_and_changes_nothing(serving, put_bundle, tmp_path, caplog):
    """An exception that nobody foresaw ends as a refusal with a stack trace in the log."""
    one = put_bundle(tmp_path / "m", 1)

    async def main():
        async with serving(bundle=(f"m={one.path}",)) as server:
            put_bundle(tmp_path / "m", 2)

            async def load(*args, **kwargs):
                raise KeyError("a bug")

            server.lifecycle._loader.load = load
            assert await server.reloads.run() == ["models and collections"]
            assert version(server)[0] == "1"
            assert server.lifecycle.statistics()["model m"].last_refusal == "KeyError"

    asyncio.run(main())
    assert "loading model m failed in our own code" in caplog.text
