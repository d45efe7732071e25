"""The metric families, laid out from what was counted: names, units, help, labels.

Rules:
    Every name, with what it means, stands in a table here and in docs/operations.md.
    Triton's counters have the type `unknown` for prometheus_client, which would add
    `_total` to the name of a counter; `serve.operation.metrics` mends the type in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from serve.lifecycle.sources import LoadStatistics
from serve.operation.histogram import Histogram
from serve.operation.state import ModelState
from serve.operation.tally import REASONS, CallTally, ModelHistograms, VersionCounts
from serve.reloading import ReloadStatistics
from serve.tickets import BatcherStatistics

MAX_LISTED = 256
"""Models, versions and collections of which the present state is laid out."""

TRITON: tuple[tuple[str, str, Callable[[VersionCounts], float]], ...] = (
    ("request_success", "Requests that got their vectors.", lambda c: c.requests),
    ("count", "Images computed.", lambda c: c.images),
    ("exec_count", "Batches computed.", lambda c: c.batches.total()),
    ("request_duration_us", "From arrival to the vectors.", lambda c: c.request_s * 1e6),
    ("queue_duration_us", "The longest wait of a request's images.", lambda c: c.queue_s * 1e6),
    ("compute_input_duration_us", "Decoding, its queue included.", lambda c: c.decode_s * 1e6),
    (
        "compute_infer_duration_us",
        "The encoder, each request's batches.",
        lambda c: c.inference_s * 1e6,
    ),
    ("compute_output_duration_us", "The rest, until the vectors.", lambda c: c.output_s * 1e6),
)
"""Triton's counters: what follows `nv_inference_`, what it means here, how to read it."""


def triton_counters(versions: Mapping[tuple[str, str], VersionCounts]) -> Iterator[Metric]:
    """Give what Triton counts, by model and version."""
    for name, help_text, read in TRITON:
        family = Metric(f"nv_inference_{name}", help_text, "unknown")
        for (model, version), counts in versions.items():
            labels = {"model": model, "version": version}
            family.add_sample(family.name, labels, float(read(counts)))
        yield family
    family = Metric("nv_inference_request_failure", "Requests that got no vectors.", "unknown")
    for (model, version), counts in versions.items():
        for reason in REASONS:
            labels = {"model": model, "version": version, "reason": reason}
            family.add_sample(family.name, labels, float(counts.failures[reason]))
    yield family


HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelHistograms], Histogram]], ...] = (
    ("embed_seconds", "From a request's arrival at a model to its vectors.", lambda h: h.total),
    ("decode_seconds", "From arrival until the last image was decoded.", lambda h: h.decode),
    ("queue_seconds", "The longest wait of a request's images.", lambda h: h.queue),
    ("inference_seconds", "The encoder, a batch.", lambda h: h.inference),
    ("batch_images", "Images, a batch.", lambda h: h.batch),
)
"""What follows `horace_`, what it means, how to read it."""


def load_families(
    loads: Mapping[str, LoadStatistics], reloads: ReloadStatistics
) -> Iterator[Metric]:
    """Give how often what is served was loaded, and how often in vain."""
    what = ["kind", "name"]
    served = CounterMetricFamily("horace_loads", "Loads that are served.", labels=what)
    refused = CounterMetricFamily("horace_load_refusals", "Loads refused.", labels=what)
    seconds = GaugeMetricFamily("nv_model_load_duration_secs", "The latest load.", labels=["model"])
    for key, statistics in list(loads.items())[:MAX_LISTED]:
        kind, _, name = key.partition(" ")
        served.add_metric([kind, name], statistics.loads)
        refused.add_metric([kind, name], statistics.refusals)
        if kind == "model" and statistics.loads:
            seconds.add_metric([name], statistics.last_load_s)
    yield from (served, refused, seconds)
    yield CounterMetricFamily("horace_reloads", "Times that all was read again.", reloads.runs)
    failures = CounterMetricFamily("horace_reload_failures", "What was refused.", labels=["what"])
    for name, count in reloads.failures.items():
        failures.add_metric([name], count)
    yield failures


def model_histograms(models: Mapping[str, ModelHistograms]) -> Iterator[Metric]:
    """Give the histograms of every model, and its images that failed."""
    for name, help_text, read in HISTOGRAMS:
        family = HistogramMetricFamily(f"horace_{name}", help_text, labels=["model"])
        for model, histograms in models.items():
            _add_histogram(family, [model], read(histograms))
        yield family
    faults = CounterMetricFamily(
        "horace_image_failures", "Images without a vector, by why.", labels=["model", "fault"]
    )
    for model, histograms in models.items():
        for fault, count in histograms.faults.items():
            faults.add_metric([model, fault], count)
    yield faults


def call_families(calls: CallTally) -> Iterator[Metric]:
    """Give what is counted of calls, whatever they ask for."""
    seconds = HistogramMetricFamily(
        "horace_request_seconds", "From a request to its reply, where OK.", labels=["method"]
    )
    for method, histogram in calls.seconds.items():
        _add_histogram(seconds, [method], histogram)
    yield seconds
    search = HistogramMetricFamily(
        "horace_search_seconds", "A collection's time, its queue included.", labels=[]
    )
    _add_histogram(search, [], calls.search)
    yield search
    total = CounterMetricFamily("horace_requests", "Requests.", labels=["method", "code"])
    for (method, code), count in calls.calls.items():
        total.add_metric([method, code], count)
    yield total
    turned_away = CounterMetricFamily(
        "horace_turned_away", "Calls refused before a service saw them.", labels=["code"]
    )
    for code, count in calls.turned_away.items():
        turned_away.add_metric([code], count)
    yield turned_away
    by_key = CounterMetricFamily(
        "horace_requests_by_key", "Requests, by the name of the API key.", labels=["key", "code"]
    )
    for (key, code), count in calls.by_key.items():
        by_key.add_metric([key, code], count)
    yield by_key


def _add_histogram(family: HistogramMetricFamily, labels: list[str], values: Histogram) -> None:
    """Add one histogram to a family."""
    family.add_metric(labels, buckets=values.cumulative(), sum_value=values.sum)


GAUGES: tuple[tuple[str, str, Callable[[BatcherStatistics], float]], ...] = (
    (
        "nv_inference_pending_request_count",
        "Requests that are not over.",
        lambda s: s.held_requests + s.lined_up_requests,
    ),
    ("horace_held_images", "Images admitted and not over.", lambda s: s.held_images),
    ("horace_held_bytes", "Their bytes, with pixels.", lambda s: s.held_bytes),
    ("horace_waiting_images", "Images that wait for the encoder.", lambda s: s.waiting_images),
    ("horace_running_images", "Images in the encoder.", lambda s: s.running_images),
    ("horace_lined_up_requests", "Requests of streams that wait.", lambda s: s.lined_up_requests),
    (
        "horace_image_cost_seconds",
        "What an image adds to a batch.",
        lambda s: s.latency.per_image_s,
    ),
    ("horace_batch_cost_seconds", "What a batch takes besides.", lambda s: s.latency.per_batch_s),
)
"""The state of a queue: name, what it means, how to read it."""

ENDS: tuple[tuple[str, Callable[[BatcherStatistics], float]], ...] = (
    ("refused_full", lambda s: s.refused_requests),
    ("refused_deadline", lambda s: s.unmeetable_requests),
    ("dropped_deadline", lambda s: s.expired_requests),
    ("cancelled", lambda s: s.cancelled_requests),
)
"""How requests end in a queue without a vector: the label's value, how to read it."""


def _queue_counters(models: Sequence[ModelState]) -> Iterator[Metric]:
    """Give what each model's queue has counted since that version was loaded."""
    ended = CounterMetricFamily(
        "horace_queue_ended",
        "Requests that a queue refused or let go, by why.",
        labels=["model", "version", "why"],
    )
    pair = ["model", "version"]
    computed = CounterMetricFamily("horace_computed_images", "Images computed.", labels=pair)
    abandoned = CounterMetricFamily(
        "horace_abandoned_images",
        "Images whose caller went, or whose deadline passed, while they were computed.",
        labels=pair,
    )
    for model in models:
        names, now = [model.name, model.version], model.statistics
        for why, read in ENDS:
            ended.add_metric([*names, why], read(now))
        computed.add_metric(names, now.computed_images)
        abandoned.add_metric(names, now.abandoned_images)
    yield ended
    yield computed
    yield abandoned


def model_gauges(models: Sequence[ModelState]) -> Iterator[Metric]:
    """Give the present state of every model that is served."""
    pair = ["model", "version"]
    for name, help_text, read in GAUGES:
        family = GaugeMetricFamily(name, help_text, labels=pair)
        for model in models:
            family.add_metric([model.name, model.version], read(model.statistics))
        yield family
    yield from _queue_counters(models)
    alive = GaugeMetricFamily("horace_model_alive", "Whether its threads run.", labels=pair)
    info = InfoMetricFamily("horace_model", "Which encoder it is.", labels=pair)
    for model in models:
        alive.add_metric([model.name, model.version], model.alive)
        values = {"fingerprint": model.fingerprint, "dim": str(model.dim)}
        info.add_metric([model.name, model.version], values)
    yield alive
    yield info
