import pytest

from benchmarks.changes.callers import Seen
from benchmarks.changes.scenarios import Outcome
from benchmarks.serve_changes import left_undone


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
