from __future__ import annotations

from serve.lifecycle.watching import Changes, Watcher

OLD, HALF, NEW = ((("file", n, n, n),) for n in range(3))


def changed(watcher: Watcher, **seen: object) -> tuple[str, ...]:
    """What a look finds changed."""
    return watcher.look(seen).changed


def test_a_copy_under_way_is_left_alone():
    """It is loaded when two looks see the same, and once."""
    watcher = Watcher()
    watcher.tried("m", OLD)
    assert repr(watcher) == "<Watcher of m>"
    assert [changed(watcher, m=seen) for seen in (OLD, OLD, HALF, NEW)] == [()] * 4
    assert changed(watcher, m=NEW) == ("m",)
    watcher.tried("m", NEW)
    assert changed(watcher, m=NEW) == ()


def test_what_was_refused_is_tried_again_when_it_changes():
    """No line in the log every two seconds for the same damaged file."""
    watcher = Watcher()
    watcher.tried("m", HALF)
    assert [changed(watcher, m=HALF) for _ in range(5)] == [()] * 5
    assert [changed(watcher, m=NEW) for _ in range(2)] == [(), ("m",)]


def test_what_is_new_is_loaded_and_what_is_gone_is_told_once():
    """A directory that is missing for one look is not gone yet."""
    watcher = Watcher()
    assert [changed(watcher, m=NEW) for _ in range(2)] == [(), ("m",)]
    watcher.tried("m", NEW)
    assert watcher.look({"m": ()}).gone == ()
    assert watcher.look({"m": NEW}).gone == ()
    assert [watcher.look({"m": ()}).gone for _ in range(3)] == [(), ("m",), ()]


def test_what_a_look_could_not_see_is_as_it_was():
    """Neither gone nor changed, however often; afterwards looks go on where they were."""
    watcher = Watcher()
    watcher.tried("m", OLD)
    assert changed(watcher, m=OLD) == ()
    for _ in range(3):
        assert watcher.look({}) == Changes(changed=(), gone=())
    assert [changed(watcher, m=NEW) for _ in range(2)] == [(), ("m",)]
    watcher.tried("m", NEW)
    assert [watcher.look(seen).gone for seen in ({"m": ()}, {}, {"m": ()})] == [(), (), ("m",)]
