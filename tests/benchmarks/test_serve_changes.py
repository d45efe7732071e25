import socket

import pytest

from benchmarks.changes.callers import Seen
from benchmarks.changes.scenarios import Outcome
from benchmarks.serve_changes import left_undone
from serve.client import Client, RetryPolicy
from serve.errors import UnavailableError


@pytest.mark.parametrize(
    ("scenario", "changes", "notes", "undone"),
    [
        ("bundle", 3, {"swaps": 3, "refused_reloads": 0}, []),
        ("bundle", 3, {"swaps": 0, "refused_reloads": 0}, ["bundle: 0 swaps for 3 changes"]),
        ("collection", 3, {"swaps": 2}, ["collection: 2 swaps for 3 changes"]),
        ("certificate", 3, {"swaps": 0, "latest_certificate_is_served": True}, []),
        (
            "certificate",
            3,
            {"swaps": 0, "refused_reloads": 1, "latest_certificate_is_served": False},
            ["certificate: 1 reloads refused", "certificate: an old certificate"],
        ),
        ("sigkill", 2, {"exit_status": -9}, ["sigkill: exit status -9"]),
        ("sigterm", 0, {}, ["sigterm: nothing was changed"]),
    ],
)
def test_a_server_that_does_not_change_has_shown_nothing(scenario, changes, notes, undone):
    """However well it answers meanwhile."""
    outcome = Outcome(changes=changes, accepted=9, seen=Seen(answered=9), notes=notes)
    assert left_undone(scenario, outcome) == undone


def test_a_call_without_a_connection_was_heard_by_nobody():
    """A connection that ends under a call may have been."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        once = RetryPolicy(attempts=1)
        with Client(target, retry=once) as client, pytest.raises(UnavailableError) as error:
            client.list_models()
    seen = Seen()
    seen.count_error(error.value)
    assert (seen.unheard, seen.failed) == (1, {})
    seen.count_error(
        UnavailableError(f"server {target}", expected="a server", found="Socket closed")
    )
    assert (seen.unheard, seen.failed.total()) == (1, 1)
