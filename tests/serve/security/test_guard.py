from __future__ import annotations

import pytest

from serve.errors import QueueFullError, UnauthenticatedError
from serve.security.buckets import Quota
from serve.security.guard import Guard, authorise
from serve.security.ring import ApiKey, KeyRing, hash_token

RING = KeyRing([ApiKey(name="app", digest=hash_token("right"))])
METHOD = "/horace.v1.Horace/Embed"


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", "Bearer right")],
        [("authorization", "bearer  right")],
        [("x-api-key", "right")],
        [("authorization", "Basic dXNlcg=="), ("x-api-key", "right")],
        [("authorization", "Bearer wrong"), ("x-api-key", "right")],
    ],
)
def test_a_key_may_come_in_either_header(metadata):
    """As gRPC's and HTTP's clients are used to, and past what a proxy puts in."""
    assert authorise(METHOD, metadata, RING).name == "app"


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ([], "none"),
        ([("authorization", "right")], "none"),
        ([("authorization", "Basic right")], "none"),
        ([("x-api-key", b"right")], "none"),
        ([("x-api-key", "")], "none"),
        ([("authorization", "Bearer wrong")], "one that it does not know"),
        ([("x-api-key", "wrong"), ("x-api-key", "right")], "one that it does not know"),
    ],
)
def test_everything_else_is_refused_with_what_would_do(metadata, found):
    """The refusal names the headers, and never what was in them."""
    with pytest.raises(UnauthenticatedError) as refusal:
        authorise(METHOD, metadata, RING)
    assert str(refusal.value) == (
        "API key: expected a key of this server as metadata `authorization: Bearer KEY` or "
        f"`x-api-key: KEY`, found {found}"
    )


@pytest.mark.parametrize(
    ("method", "is_open"),
    [
        ("/grpc.health.v1.Health/Check", True),
        ("/grpc.health.v1.Health/Watch", True),
        ("/grpc.health.v1.HealthX/Check", False),
        ("/horace.v1.Horace/grpc.health.v1.Health/", False),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", False),
        ("/inference.GRPCInferenceService/ServerLive", False),
        ("/v1/embed", False),
        ("/no.such/Method", False),
        ("", False),
    ],
)
def test_only_health_is_open(method, is_open):
    """A probe has no key; nothing else may do without."""
    if is_open:
        assert authorise(method, [], RING) is None
    else:
        with pytest.raises(UnauthenticatedError):
            authorise(method, [], RING)


def test_reflection_may_be_left_open():
    """Where it is asked for, and then nothing but reflection."""
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    assert authorise(method, [], RING, open_reflection=True) is None
    with pytest.raises(UnauthenticatedError):
        authorise(METHOD, [], RING, open_reflection=True)


def test_without_keys_everyone_may_call():
    """No key file: no key."""
    assert authorise(METHOD, [], None) is None


def enter(guard: Guard, metadata=(("x-api-key", "right"),)):
    """Let a call in and name its caller."""
    key = guard.authorise(METHOD, metadata)
    return guard.name(key, peer="ipv4:192.0.2.1:1", auth_context={})


def test_a_caller_goes_by_the_name_of_its_key():
    """And without keys by its address."""
    assert enter(Guard(ring=lambda: RING)).client == "app"
    assert enter(Guard()).client == "192.0.2.1"


def test_a_rate_is_refused_with_the_time_to_wait():
    """And let in again when that time has passed."""
    now_s = 100.0
    guard = Guard(quota=Quota(requests_per_s=4, images_per_s=8, burst_s=1), clock=lambda: now_s)
    entered = enter(guard)
    guard.charge(entered, images=8)
    with pytest.raises(QueueFullError) as refusal:
        guard.charge(entered, images=2)
    assert refusal.value.retry_after_s == 0.25
    assert str(refusal.value) == (
        "rate of this caller: expected at most 8 images a second, found more; come back in 0.25 s"
    )
    now_s += 0.25
    guard.charge(entered, images=2)


def test_calls_of_one_caller_are_bounded():
    """The one too many is refused; one that ended makes room."""
    guard = Guard(quota=Quota(calls=1))
    entered = enter(guard)
    with guard.under_way(entered):
        with (
            pytest.raises(QueueFullError, match="expected at most 1, found one more"),
            guard.under_way(entered),
        ):
            pass
        assert repr(guard) == "<Guard None <Ledger callers=1 calls=1> unauthenticated=0>"
    with guard.under_way(entered):
        pass


def test_refusals_are_logged_now_and_then(caplog):
    """Whoever calls without a key cannot fill the log."""
    now_s = 0.0
    guard = Guard(ring=lambda: RING, clock=lambda: now_s)
    for n in range(1000):
        now_s = n / 100
        guard.count_stranger("/a/B", peer="ipv4:192.0.2.1:1")
    assert "unauthenticated=1000>" in repr(guard)
    assert len(caplog.messages) == 1
    now_s = 10.0
    guard.count_stranger("/a/B", peer="ipv6:%5B2001:db8::1%5D:1")
    assert caplog.messages[-1] == (
        "calls without a key of ours: 1000 refused, the last of '/a/B' from 2001:db8::1"
    )


def test_a_caller_is_recognised_where_nothing_else_is_to_be_done():
    """By its key, else its address; not without a key of ours, and not where it is charged."""
    everyone, keyed = Guard(), Guard(ring=lambda: RING)
    assert everyone.recognise(METHOD, [], peer="ipv4:10.0.0.7:1234") == "10.0.0.7"
    assert keyed.recognise(METHOD, [("x-api-key", "right")], peer="ipv4:10.0.0.7:1234") == "app"
    assert keyed.recognise(METHOD, [("x-api-key", "wrong")], peer="ipv4:10.0.0.7:1234") is None
    assert keyed.recognise(METHOD, [], peer="ipv4:10.0.0.7:1234") is None
    assert "unauthenticated=0>" in repr(keyed), "who lets the call in counts it"
    for quota in (Quota(requests_per_s=5), Quota(images_per_s=5), Quota(calls=5)):
        assert Guard(quota=quota).recognise(METHOD, [], peer="ipv4:10.0.0.7:1234") is None
