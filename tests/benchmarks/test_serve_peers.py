from benchmarks.serve_peers import CASES, Measurements, bars


def test_a_bar_shows_how_far_its_rounds_are_apart(tmp_path):
    """Ratios are of the same round; a peer that was never measured has none."""
    (case,) = (case for case in CASES if case.name == "light-tensor-1")
    kept = Measurements(tmp_path / "measurements.jsonl", fresh=True)
    figures = {"p99_ms": 1.0, "server_cpu_ms_a_request": 1.0}
    for number, (ours, theirs) in enumerate([(100, 100), (300, 200), (100, 200)]):
        kept.add(case.name, "horace-kserve", "c64", number, {"requests_per_s": ours, **figures})
        kept.add(case.name, "triton", "c64", number, {"requests_per_s": theirs, **figures})
    held = bars(case, kept)["horace-kserve"]
    assert held["times triton's rate at c64"] == {"min": 0.5, "median": 1.0, "max": 1.5}
    assert not [name for name in held if "mosec" in name]
