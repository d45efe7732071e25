import asyncio
import threading

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
    """Microseconds a request, and what is left after the stages is the output's."""
    tally = ModelTally(ModelHistograms(), threading.Lock())
    for _ in range(10):
        tally.answered(embedded(), 0.010)
    tally.computed(20, 0.004)
    tally.computed(3, 0.004, failed=True)
    tally.fold()
    counts = tally.counts
    assert (counts.requests, counts.images, counts.batches) == (10, 20, 1)
    assert counts.request_us == pytest.approx(100_000)
    assert counts.decode_us == pytest.approx(10_000)
    assert counts.queue_us == pytest.approx(20_000)
    assert counts.inference_us == pytest.approx(40_000)
    assert counts.output_us == pytest.approx(30_000)
    assert tally.histograms.batch.count == 1
    assert tally.histograms.total.sum == pytest.approx(0.1)


def test_stages_that_overlap_leave_no_negative_rest():
    """Counters only grow: a rest below nothing counts as nothing."""
    tally = ModelTally(ModelHistograms(), threading.Lock())
    tally.answered(embedded(decode_s=1, queue_s=1, inference_s=1), 2.0)
    tally.fold()
    assert tally.counts.output_us == 0


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
    tallies.watch("kept", "1")
    for n in range(1000):
        tally = tallies.watch(f"model-{n}", str(n))
        if n % 10 == 0:
            tally.failed(QueueFullError("full"), 1, 0.1)
    assert len(tallies.models) <= MAX_MODELS + 1
    assert ("kept", "1") in tallies.versions
    for n in range(10_000):
        tallies.watch("kept", str(n))
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
    """Nothing that is served loses its series to a newcomer."""
    served = [(f"m{n}", "1") for n in range(MAX_MODELS + 10)]
    tallies = ModelTallies(served=lambda: served)
    watched = [tallies.watch(*pair) for pair in served]
    assert len(set(map(id, watched))) == MAX_MODELS + 1
    assert list(tallies.versions)[-1] == (OTHER, OTHER)


def test_a_retired_version_still_counts_into_its_models_histograms():
    """A request that outlives its version by many reloads is seen in the latencies."""
    tallies = ModelTallies(served=list)
    old = tallies.watch("m", "1")
    for n in range(2, 100):
        tallies.watch("m", str(n))
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
