import subprocess
import sys
from itertools import pairwise

import pytest

from benchmarks import decoders
from benchmarks.measuring import spread_of, turns
from models.errors import UsageError


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 12])
def test_everybody_has_a_turn_in_every_round_and_each_begins_as_often(count):
    """None is left out, and none comes twice."""
    rounds = [turns(range(count), number) for number in range(count)]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    assert [order[0] for order in rounds] == list(range(count))


def test_nobody_comes_after_the_same_one_in_two_rounds_running():
    """Though only the order is turned, not drawn."""
    for number in range(8):
        this, following = turns("abcdef", number), turns("abcdef", number + 1)
        assert not set(pairwise(this)) & set(pairwise(following))


def test_the_command_is_the_one_that_was_given():
    """Module and arguments, quoted for a shell."""
    code = "from benchmarks.measuring import command_line; print(command_line())"
    argv = [sys.executable, "-c", code, "--serve=--max-calls 8"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == f"python -c '{code}' '--serve=--max-calls 8'\n"


def test_a_spread_is_least_median_and_most():
    """Whole, or rounded."""
    assert spread_of([3.14159, 1.0, 9.0]) == {"min": 1.0, "median": 3.14159, "max": 9.0}
    assert spread_of([3.14159, 1.0, 9.0], 2)["median"] == 3.14


def test_a_library_of_the_peers_that_is_missing_is_named_with_what_installs_it(monkeypatch):
    """In one line, and only where it is needed: --help is there without it."""
    monkeypatch.setattr(decoders, "cv2", None)
    with pytest.raises(UsageError, match=r"OpenCV: .*found none; pip install -e '\.\[bench\]'"):
        decoders.main(decoders.Options())
