import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from models.errors import ImageError, ImageFault
from serve.errors import DeadlineError, InternalError, QueueFullError, UnavailableError
from serve.job import Embedded
from serve.operation.observer import Call
from serve.operation.tally import (
    KEPT_VERSIONS,
    MAX_KEYS,
    MAX_MODELS,
    OTHER,
    CallTally,
    ModelHistograms,
    ModelTallies,
    ModelTally,
    triton_reason,
)

BROKEN = ImageError(ImageFault.CORRUPT, "image", expected="an image", found="half of one")


def embedded(count=2, *, errors=(), decode_s=0.001, queue_s=0.002, inference_s=0.004):
    """What became of a request of `count` sound images and some broken ones."""
    return Embedded(
        vectors_ND=np.zeros((count, 4), np.float32),
        errors=[None] * count + list(errors),
        decode_s=decode_s,
        queue_s=queue_s,
        inference_s=inference_s,
    )


def test_times_are_counted_as_triton_counts_them():
    """Times of requests added up, and what is left after the stages is the output's."""
    tally = ModelTally(ModelHistograms(), threading.Lock())
    for _ in range(10):
        tally.answered(embedded(), 0.010)
    tally.computed(20, 0.004)
    tally.computed(3, 0.004, failed=True)
    tally.fold()
    counts = tally.counts
    assert (counts.requests, counts.images, counts.batches) == (10, 20, {20: 1})
    assert counts.request_s == pytest.approx(0.100)
    assert counts.decode_s == pytest.approx(0.010)
    assert counts.queue_s == pytest.approx(0.020)
    assert counts.inference_s == pytest.approx(0.040)
    assert counts.output_s == pytest.approx(0.030)
    assert tally.histograms.batch.count == 1
    assert tally.histograms.total.sum == pytest.approx(0.1)


def test_nothing_is_lost_whatever_threads_tell():
    """And a reader sees whole sums."""
    tally = ModelTally(ModelHistograms(), threading.Lock(), clock=lambda: 12.0)
    request = embedded(1, decode_s=0.25, queue_s=0.5, inference_s=1.0)

    def tell(_: int) -> None:
        tally.answered(request, 2.0)
        tally.failed(QueueFullError("full"), 3, 0.125)
        tally.computed(8, 1.0)
        tally.computed(8, 1.0, failed=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(tell, range(4000)))
    tally.fold()
    counts = tally.counts
    assert (counts.requests, counts.request_s) == (4000, 8000.0)
    assert (counts.failures, counts.failed_s) == ({"REJECTED": 4000}, 500.0)
    assert (counts.decode_s, counts.queue_s) == (1000.0, 2000.0)
    assert (counts.inference_s, counts.output_s) == (4000.0, 1000.0)
    assert (counts.images, counts.batches) == (32000, {8: 4000})
    assert counts.batches_s == {8: 4000.0}
    assert counts.last_s == 12.0


def test_stages_that_overlap_leave_no_negative_rest():
    """Counters only grow: a rest below nothing counts as nothing."""
    tally = ModelTally(ModelHistograms(), threading.Lock())
    tally.answered(embedded(decode_s=1, queue_s=1, inference_s=1), 2.0)
    tally.fold()
    assert tally.counts.output_s == 0


def test_images_that_failed_are_counted_by_why():
    """A request that is answered tells which of its images were not."""
    tally = ModelTally(ModelHistograms(), threading.Lock())
    tally.answered(embedded(errors=[BROKEN, BROKEN]), 0.01)
    tally.fold()
    assert tally.histograms.faults == {"corrupt": 2}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (QueueFullError("full"), "REJECTED"),
        (DeadlineError("late"), "REJECTED"),
        (asyncio.CancelledError(), "CANCELED"),
        (InternalError("broken"), "BACKEND"),
        (UnavailableError("closing"), "OTHER"),
        (ZeroDivisionError(), "OTHER"),
    ],
)
def test_failures_have_tritons_reasons(error, reason):
    """Refused and late are REJECTED, as Triton has it; what the encoder did is BACKEND."""
    assert triton_reason(error) == reason


def test_names_without_end_make_no_series_without_end():
    """text-embeddings-inference#271: models, versions and keys without end stay bounded."""
    tallies = ModelTallies(served=lambda: [("kept", "1")])
    tallies.watch_model("kept", "1")
    for n in range(1000):
        tally = tallies.watch_model(f"model-{n}", str(n))
        if n % 10 == 0:
            tally.failed(QueueFullError("full"), 1, 0.1)
    assert len(tallies.models) <= MAX_MODELS + 1
    assert ("kept", "1") in tallies.versions
    for n in range(10_000):
        tallies.watch_model("kept", str(n))
    assert len([pair for pair in tallies.versions if pair[0] == "kept"]) <= KEPT_VERSIONS + 1
    assert ("kept", "1") in tallies.versions
    assert len(tallies.versions) <= (MAX_MODELS + 1) * KEPT_VERSIONS

    calls = CallTally(keyed=True)
    for n in range(10_000):
        calls.add(Call(method="Embed", arrived_s=0, client=f"key-{n}"), 0.1)
    calls.fold()
    assert len(calls.by_key) == MAX_KEYS + 1
    assert calls.by_key[OTHER, "CANCELLED"] == 10_000 - MAX_KEYS


def test_more_models_than_the_bound_share_one_name_while_all_are_served():
    """Nothing that is served loses its series to a newcomer, and each is known by itself."""
    served = [(f"m{n}", "1") for n in range(MAX_MODELS + 10)]
    tallies = ModelTallies(served=lambda: served)
    for pair in served:
        tally = tallies.watch_model(*pair)
        tally.answered(embedded(), 0.5)
        tally.failed(QueueFullError("full"), 1, 0.25)
        tally.computed(2, 0.125)
    with tallies.reading():
        series = tallies.series()
        assert list(series) == [*served[:MAX_MODELS], (OTHER, OTHER)]
        together = series[OTHER, OTHER]
        assert (together.requests, together.images, together.failures) == (10, 20, {"REJECTED": 10})
        assert (together.request_s, together.failed_s, together.batches_s) == (5, 2.5, {2: 1.25})
        assert tallies.models[OTHER].total.count == 10
        for pair in served:
            counts = tallies.find(*pair)
            assert (counts.requests, counts.images, counts.failures.total()) == (1, 2, 1)


def test_what_others_have_counted_stays_when_they_are_gone():
    """A counter never falls; and what is gone is not kept in memory by its own name."""
    served = [(f"m{n}", "1") for n in range(MAX_MODELS)]
    tallies = ModelTallies(served=lambda: served)
    for pair in served:
        tallies.watch_model(*pair)
    for n in range(100):
        tallies.watch_model(f"late-{n}", "1").computed(3, 0.1)
    with tallies.reading():
        assert tallies.series()[OTHER, OTHER].images == 300
    assert list(tallies.versions) == [*served, ("late-99", "1")]


def test_a_version_that_runs_is_never_forgotten():
    """A server may keep more versions than are remembered of those that are gone."""
    served = [("mine", str(n)) for n in range(2 * KEPT_VERSIONS)]
    tallies = ModelTallies(served=lambda: served)
    watched = [tallies.watch_model(*pair) for pair in served]
    assert [tallies.find(*pair) for pair in served] == [tally.counts for tally in watched]
    assert tallies.watch_model("mine", "0") is watched[0]
    served.clear()
    tallies.watch_model("mine", "new")
    kept = [version for _, version in tallies.versions]
    assert kept == [*map(str, range(KEPT_VERSIONS + 1, 2 * KEPT_VERSIONS)), "new"]
    assert tallies.find("mine", "0") is None


def test_a_retired_version_still_counts_into_its_models_histograms():
    """A request that outlives its version by many reloads is seen in the latencies."""
    tallies = ModelTallies(served=list)
    old = tallies.watch_model("m", "1")
    for n in range(2, 100):
        tallies.watch_model("m", str(n))
    assert ("m", "1") not in tallies.versions
    for _ in range(300):
        old.answered(embedded(), 0.01)
    assert tallies.models["m"].total.count >= 256


def test_callers_that_are_no_keys_are_no_series():
    """An address or a certificate's subject is not counted by name."""
    calls = CallTally(keyed=False)
    calls.add(Call(method="Embed", arrived_s=0, client="10.0.0.1"), 0.1)
    calls.fold()
    assert not calls.by_key
    assert calls.calls == {("Embed", "CANCELLED"): 1}


def test_only_answers_tell_how_long_an_answer_takes():
    """A refusal at once does not make the service look fast."""
    calls = CallTally(keyed=False)
    calls.add(Call(method="Embed", arrived_s=0, code=grpc.StatusCode.OK), 0.5)
    calls.add(Call(method="Embed", arrived_s=0, code=grpc.StatusCode.RESOURCE_EXHAUSTED), 0.001)
    calls.fold()
    assert calls.seconds["Embed"].count == 1
    assert sum(calls.calls.values()) == 2
