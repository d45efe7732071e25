from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from index.building.sync_plan import Seen, Stored, plan_sync
from index.embed import Reject


def seen_of(digests):
    """Make records of {key: digest}; a digest that begins with ! cannot be read."""
    return [
        Seen(key, None, None, Reject(key=key, fault=digest[1:], message=key))
        if digest.startswith("!")
        else Seen(key, None, digest)
        for key, digest in digests.items()
    ]


def plan_of(now, before, **kwargs):
    """Plan a sync from {key: digest} to {key: digest}."""
    stored = {key: Stored(row, digest) for row, (key, digest) in enumerate(before.items())}
    by_digest = {digest: row for row, digest in enumerate(before.values())}
    return plan_sync(seen_of(now), stored, by_digest=by_digest, **kwargs)


states = st.dictionaries(
    st.sampled_from([f"{folder}/{n}" for folder in "ab" for n in range(4)]),
    st.sampled_from(["one", "two", "three", "four", "five"]),
)


@given(now=states, before=states)
def test_what_is_planned_leads_from_one_state_to_the_other(now, before):
    """Whatever they are; every image is counted once, and only unknown content is embedded.

    Metadata goes with the bytes; with the key only where no other key has those bytes now.
    """
    plan = plan_of(now, before)
    before_rows = list(before.items())
    after = dict(before_rows)
    stayed = {row for _, row in plan.unchanged}
    metadata = [one.metadata_row for one in plan.reuse] + list(plan.embed.values())
    taken = [row for row in metadata if row is not None]
    assert len(set(taken)) == len(taken)
    assert not stayed & set(taken)
    for row in plan.drop:
        del after[before_rows[row][0]]
    for one in plan.reuse:
        key, digest = before_rows[one.vector_row]
        after[one.seen.key] = digest
        same = {n for n, (_, bytes_) in enumerate(before_rows) if bytes_ == digest}
        if one.metadata_row not in same:
            assert same <= stayed | set(taken)
            assert one.metadata_row is None or before_rows[one.metadata_row][0] == one.seen.key
    for key, row in plan.embed.items():
        assert now[key] not in before.values()
        assert row is None or before_rows[row][0] == key
        after[key] = now[key]
    assert after == now
    assert len(plan.unchanged) == sum(before.get(key) == digest for key, digest in now.items())
    assert plan.new + plan.changed + plan.moved + len(plan.unchanged) == len(now)
    assert plan.gone + plan.changed + plan.moved + len(plan.unchanged) == len(before)
    assert not plan.rejects


@given(now=st.permutations("abcd"), before=st.permutations("abcd"))
def test_a_row_is_taken_before_its_key_is_written_over(now, before):
    """A sync that was killed finds the metadata of what it did not write, but in a circle."""
    before = dict(zip("1234", before, strict=True))
    plan = plan_of(dict(zip("2345", now, strict=True)), before)
    takers = {"1234"[one.metadata_row]: one.seen.key for one in plan.reuse}
    written = []
    for one in plan.reuse:
        circle = [one.seen.key]
        while (key := takers.get(circle[-1])) and key not in circle:
            circle.append(key)
        donor = "1234"[one.metadata_row]
        assert donor not in written or donor in circle
        written.append(one.seen.key)


def test_a_move_is_one_and_takes_its_metadata_along():
    """Of two new keys of the content of one gone key, one has moved and the other is a copy."""
    plan = plan_of({"b": "x", "c": "x", "kept": "y", "copy": "y"}, {"a": "x", "kept": "y"})
    assert (plan.new, plan.moved, plan.gone) == (2, 1, 0)
    assert [(one.seen.key, one.vector_row, one.metadata_row) for one in plan.reuse] == [
        ("b", 0, 0),
        ("c", 0, None),
        ("copy", 1, None),
    ]
    assert plan.drop == [0]


def test_files_that_were_numbered_anew_keep_their_metadata():
    """Also over other images, and in a circle; under a key that is left, what comes is new."""

    def metadata_rows(plan):
        return {one.seen.key: (one.vector_row, one.metadata_row) for one in plan.reuse}

    plan = plan_of({"1": "b", "2": "c"}, {"1": "a", "2": "b", "3": "c"})
    assert metadata_rows(plan) == {"1": (1, 1), "2": (2, 2)}
    assert (plan.moved, plan.changed, plan.gone, plan.drop) == (2, 0, 1, [2])
    plan = plan_of({"1": "b", "2": "a"}, {"1": "a", "2": "b"})
    assert metadata_rows(plan) == {"1": (1, 1), "2": (0, 0)}
    assert (plan.moved, plan.gone) == (2, 0)
    plan = plan_of({"1": "new", "2": "a", "3": "b"}, {"1": "a", "2": "b"})
    assert [one.seen.key for one in plan.reuse] == ["3", "2"]
    assert metadata_rows(plan) == {"2": (0, 0), "3": (1, 1)}
    assert (plan.embed, plan.vacated, plan.new, plan.gone) == ({"1": None}, [0], 1, 0)
    assert "1" not in plan.replaced


def test_of_equal_images_the_one_that_is_gone_has_moved():
    """The other is still under its key, and has changed; it keeps its metadata."""
    plan = plan_of({"1": "new", "3": "x"}, {"1": "x", "2": "x"})
    assert [(one.seen.key, one.metadata_row) for one in plan.reuse] == [("3", 1)]
    assert (plan.embed, plan.moved, plan.changed, plan.new) == ({"1": 0}, 1, 1, 0)


def test_what_nobody_has_read_is_like_no_other():
    """Neither what is stored without a digest, nor what was rejected without one."""
    plan = plan_sync(
        [Seen("a", None, None), Seen("b", None, None)],
        {"a": Stored(0, None), "gone": Stored(1, None)},
        by_digest={},
        rejected={"b": Reject(key="b", fault="corrupt", message="")},
    )
    assert (plan.embed, plan.unchanged, plan.reuse) == ({"a": 0, "b": None}, [], [])
    assert (plan.changed, plan.new, plan.gone, plan.rejects) == (1, 1, 1, [])


def test_what_cannot_be_read_stays_and_what_is_no_image_goes():
    """Also all below a folder that cannot be read, or a link that led to one, whatever its name."""
    before = {
        "away": "1",
        "empty": "2",
        "locked/a": "3",
        "locked/b": "4",
        "lock": "5",
        "l.png/a": "6",
    }
    now = {"away": "!unreadable", "empty": "!empty", "locked/": "!unreadable"}
    plan = plan_of({**now, "l.png": "!unreadable"}, before)
    assert sorted(plan.retained) == [0, 2, 3, 5]
    assert sorted(plan.drop) == [1, 4]
    assert [one.key for one in plan.rejects] == ["away", "empty", "locked/", "l.png"]
    assert plan.gone == 1


def test_what_is_being_written_stays_though_it_is_no_image():
    """Whether it is empty, or as bad as it was the last time; it is looked at again."""
    rejected = {"half": Reject(key="half", fault="corrupt", message="", digest="h")}
    plan = plan_sync(
        [replace(one, is_settled=False) for one in seen_of({"empty": "!empty", "half": "h"})],
        {"empty": Stored(0, "1"), "half": Stored(1, "2")},
        by_digest={"1": 0, "2": 1},
        rejected=rejected,
    )
    assert (plan.retained, plan.drop, plan.gone) == ([0, 1], [], 0)
    assert [one.key for one in plan.rejects] == ["empty", "half"]


def test_a_reject_is_tried_again_when_it_has_changed():
    """Not before; an image that has become one is dropped."""
    rejected = {
        "a": Reject(key="a", fault="corrupt", message="", digest="1"),
        "b": Reject(key="b", fault="corrupt", message="", digest="1"),
        "c": Reject(key="c", fault="corrupt", message="", digest="2"),
    }
    plan = plan_of({"a": "1", "b": "mended", "c": "2"}, {"c": "old"}, rejected=rejected)
    assert list(plan.embed) == ["b"]
    assert [one.key for one in plan.rejects] == ["a", "c"]
    assert plan.drop == [0]


def test_a_key_has_one_owner():
    """One that another source has, and one that comes twice, are refused and said."""
    now = [*seen_of({"a": "1", "b": "2"}), *seen_of({"a": "3"})]
    plan = plan_sync(now, {}, by_digest={}, taken={"b"})
    assert list(plan.embed) == ["a"]
    assert [(one.fault, one.message) for one in plan.rejects] == [
        (
            "duplicate_key",
            "expected a key of its own, found an image of another source with this key or its "
            "id; sources with equal names belong under one folder, and --moved-from says where "
            "this one was before",
        ),
        ("duplicate_key", "expected a key of its own, found an earlier image of this key"),
    ]
