import json

from benchmarks import serve_overload
from benchmarks.serve_overload import Options, main


def test_a_run_says_how_it_was_made_and_those_before_it_stay(tmp_path, monkeypatch):
    """A case that is run again takes the place of what the file has of it."""
    out = tmp_path / "overload.json"
    old = {"runs": {"shared-small-4": {"goodput": 1}, "shared-small-1": {}}}
    out.write_text(json.dumps(old))
    monkeypatch.setattr(serve_overload, "measure", lambda *_: {"goodput": 2})
    main(Options(cases=("shared-small-1",), peak_seconds=7.0, out=out))
    report = json.loads(out.read_text())
    assert list(report) == ["runs"]
    assert report["runs"]["shared-small-4"] == {"goodput": 1}
    run = report["runs"]["shared-small-1"]
    assert run["options"]["peak_seconds"] == 7.0
    assert {"command", "hardware", "versions", "load_average_before"} < set(run)
    assert run["goodput"] == 2
