import numpy as np

from benchmarks.filters import BARS, SHARES, filters_of, name_of, verdict, write_synthetic
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
