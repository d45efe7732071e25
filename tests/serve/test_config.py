from __future__ import annotations

import asyncio

import pytest

from models.bundle import SHIPPED_BUNDLE
from models.errors import UsageError
from serve.config import ServeOptions
from serve.lifecycle.options import ModelOptions, NamedPath, read_named_path
from serve.operation.options import MetricsOptions
from serve.security.options import CallerLimits


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("dir/b", None, "dir/b"),
        ("a=dir/b", "a", "dir/b"),
        ("a-1.x=horace://host:1/m", "a-1.x", "horace://host:1/m"),
        ("dir/a=b", None, "dir/a=b"),
        ("a=b=c", "a", "b=c"),
    ],
)
def test_a_name_stands_before_the_first_equals_sign(text, name, path):
    """What cannot be a name is part of the path."""
    assert read_named_path(text) == NamedPath(name=name, path=path)


def test_an_empty_path_is_refused():
    """The line shows the form."""
    with pytest.raises(UsageError, match=r"expected \[NAME=\]PATH, found ''"):
        read_named_path("")


def test_without_a_bundle_the_shipped_one_is_served():
    """`python -m serve` alone works."""
    assert ServeOptions().bundles == (ModelOptions(name=None, path=str(SHIPPED_BUNDLE)),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "--port: expected 0 to 65535, found 70000"),
        ({"max_batch_images": 0}, "--max-batch-images: expected at least 1, found 0"),
        ({"cpu_budget": 0}, "--cpu-budget: expected at least 1, found 0"),
        ({"max_delay_ms": -1.0}, "--max-delay-ms: expected 0 to 1000, found -1.0"),
        ({"drain_s": float("nan")}, "--drain-s: expected 0 to 3600, found nan"),
        ({"max_message_mib": 2048}, "--max-message-mib: expected at most 2047, found 2048"),
        ({"cpu_budget": 5000}, "--cpu-budget: expected at most 4096, found 5000"),
        ({"instances": 5000}, "--instances: expected at most 4096, found 5000"),
        ({"workers": 5000}, "--workers: expected at most 4096, found 5000"),
        ({"max_calls": 1 << 31}, "--max-calls: expected at most 1000000000, found 2147483648"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, message):
    """One line names the option, what it takes and what was given."""
    with pytest.raises(UsageError, match=f"^{message}$"):
        ServeOptions(**options)


def test_limits_of_callers_that_make_no_sense_are_refused():
    """Too small, and more than gRPC can keep."""
    for value, expected in ((0, "at least 1"), (1 << 31, "at most 1e9")):
        with pytest.raises(UsageError, match=rf"^--limits.calls-per-connection: .*{expected}"):
            CallerLimits(calls_per_connection=value)


def test_the_most_that_may_be_asked_for_is_taken(serving, fake):
    """By gRPC, whose options are numbers of 32 bits."""

    async def main():
        limits = CallerLimits(calls_per_connection=10**9)
        async with serving(fake, max_calls=10**9, max_message_mib=2047, limits=limits) as server:
            assert server.health.serving

    asyncio.run(main())


def test_callers_load_models_into_one_worker_alone_or_not_at_all():
    """A call reaches one worker; the line says what reaches all."""
    with pytest.raises(UsageError, match=r"--model-control: expected one worker: .*--watch-s"):
        ServeOptions(model_control=True, workers=2)


def test_every_worker_has_a_metrics_port_that_there_is():
    """Of a larger number the system takes the low bits: any port, where nobody looks for it."""
    with pytest.raises(UsageError, match=r"^--metrics.port: expected 0 to 65534: .* found 65535$"):
        ServeOptions(metrics=MetricsOptions(port=65535), workers=2)
    for port, workers in ((65534, 2), (65535, 1), (0, 100), (None, 2)):
        ServeOptions(metrics=MetricsOptions(port=port), workers=workers)


def test_a_repository_stands_in_for_the_shipped_bundle(tmp_path):
    """Where models are looked for in a directory, none is served that is not there."""
    assert ServeOptions(repository=str(tmp_path)).bundles == ()
