import pytest

from benchmarks.build_throughput import Timing, compare

ENCODES = {
    "encode_batch_a_thread": [Timing(900, 2.0)] * 2,
    "encode_batch_on_all": [Timing(1000, 2.1)] * 2,
}


@pytest.mark.parametrize(
    ("decode", "build", "holds", "near_the_ceiling"),
    [
        (100_000, 960, True, True),
        (100_000, 940, False, False),
        (1000, 500, False, True),  # half of either is all that there is
        (1000, 460, False, False),
    ],
)
def test_the_bar_and_the_ceiling_can_be_missed(decode, build, holds, near_the_ceiling):
    """Each has its own word; the faster way to encode counts."""
    times = {"decode": [Timing(decode, 1.0)] * 2, **ENCODES}
    built = [{"images_per_s": build, "cpu_ms": 3.0}] * 2
    found = compare(times, built)
    assert (found["holds"], found["holds_against_the_ceiling"]) == (holds, near_the_ceiling)
    ceiling = 1 / (1 / decode + 1 / 1000)
    assert found["of_the_ceiling"]["median"] == pytest.approx(build / ceiling)
    assert found["of_the_slower_alone"]["median"] == pytest.approx(build / min(decode, 1000))
    assert found["cpu_of_both_alone_over_build"]["median"] == pytest.approx(1)
