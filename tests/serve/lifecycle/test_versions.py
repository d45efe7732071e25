from __future__ import annotations

import pytest

from serve.lifecycle.versions import plan_versions


@pytest.mark.parametrize(
    ("served", "last", "keep", "opened", "kept"),
    [
        ([], 0, 1, {"1": "dir"}, {"1"}),
        (["1"], 1, 1, {"2": "dir"}, {"2"}),
        (["9"], 9, 2, {"10": "dir"}, {"9", "10"}),
        ([], 4, 1, {"5": "dir"}, {"5"}),
    ],
)
def test_a_bundle_alone_is_counted_up(served, last, keep, opened, kept):
    """Every load is a version of its own, also after an unload."""
    plan = plan_versions({"": "dir"}, served=served, changed=[""], last=last, keep=keep)
    assert (plan.opened, plan.served) == (opened, kept)


@pytest.mark.parametrize(
    ("found", "served", "changed", "keep", "opened", "kept"),
    [
        ("1 2 10", "", "1 2 10", 1, "10", "10"),
        ("1 2 10", "", "1 2 10", 2, "2 10", "2 10"),
        ("1 2", "1", "2", 1, "2", "2"),
        ("1 2", "1 2", "", 2, "", "1 2"),
        ("1 2", "1 2", "1", 2, "1", "1 2"),
        ("1", "1 2", "", 1, "", "1"),
    ],
    ids=["newest", "two newest", "a new one", "nothing new", "one replaced", "one gone"],
)
def test_numbered_versions_are_those_on_the_disk(found, served, changed, keep, opened, kept):
    """The newest are served; what is served and has not changed is not opened again."""
    paths = {version: f"dir/{version}" for version in found.split()}
    plan = plan_versions(paths, served=served.split(), changed=changed.split(), last=10, keep=keep)
    assert list(plan.opened.items()) == [(v, f"dir/{v}") for v in opened.split()]
    assert plan.served == set(kept.split())
