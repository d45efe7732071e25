from typing import get_args

import pytest

from benchmarks.index_readers import ReadersOptions, Way, measure


@pytest.mark.slow
@pytest.mark.parametrize("way", get_args(Way))
def test_every_answer_is_of_a_current_snapshot(tmp_path, way):
    """Some seconds of three readers beside a writer; the benchmark takes a minute of eight."""
    found = measure(way, tmp_path / "c", ReadersOptions(seconds=2, readers=3))
    assert (found["wrong"], found["first_wrong"]) == (0, "")
    assert int(str(found["answers"])) > 10
    assert int(str(found["states"])) > 3
