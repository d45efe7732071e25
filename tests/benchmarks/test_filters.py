import numpy as np

from benchmarks.filters import (
    BARS,
    SHARES,
    filters_of,
    holds,
    name_of,
    take_turns,
    verdict,
    write_synthetic,
)
from index.collection import Collection


def test_a_share_lies_scattered_over_the_file(tmp_path):
    """It is as large as it says, and not one block of rows."""
    with Collection.open(write_synthetic(tmp_path / "c", 2000)) as collection:
        filters = filters_of(collection)
        for share in SHARES:
            _, text = filters[name_of(share)]
            rows = np.flatnonzero(collection.select(text).mask_N)
            assert len(rows) == round(share * 2000)
            assert rows[-1] - rows[0] > len(rows)


def test_the_bar_is_about_some_shares_and_the_label_speaks_for_itself():
    """Whichever filter falls short, the one word that it belongs to says so."""
    names = [*map(name_of, SHARES), "label"]

    def without(name):
        return verdict([{"name": one, "holds": one != name} for one in names])

    assert set(without(None).values()) == {True}
    assert without("label") == {"bar_holds": True, "every_share_holds": True, "label_holds": False}
    for share in SHARES:
        assert without(name_of(share)) == {
            "bar_holds": share not in BARS, "every_share_holds": False, "label_holds": True,
        }  # fmt: skip


def test_a_way_is_judged_by_its_median_and_says_how_far_its_rounds_are_apart():
    """One slow round is told, and does not decide."""
    ways = {"search": lambda queries_QD: queries_QD, "exact": lambda queries_QD: queries_QD}
    times = take_turns(ways, [np.zeros((2, 4), np.float32)], 3)
    assert all(0 < row["min"] <= row["median"] <= row["max"] for row in times.values())
    plain = {"min": 1.0, "median": 1.0, "max": 1.0}
    mode = {"unfiltered_search": plain, "unfiltered_exact": plain}
    row = {"recall": {"search": 1.0, "single_search": 1.0}, "batch_ms": mode | {"search": plain}}
    assert holds(row | {"single_ms": mode | {"search": {"min": 1.0, "median": 2.9, "max": 9.0}}})
    assert not holds(row | {"single_ms": mode | {"search": {"min": 1, "median": 3.1, "max": 9}}})
