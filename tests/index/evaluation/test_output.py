import io

import pytest

from index.evaluate import run
from index.evaluation import output
from index.evaluation.output import hand_over


def test_a_report_is_utf_8_whatever_the_locale(tmp_path, monkeypatch, capsys):
    """Names of classes may be of any script, where the system's encoding has few."""
    monkeypatch.setattr(io, "text_encoding", lambda encoding, _=2: encoding or "ascii")
    hand_over("naïve", {"label": "naïve"}, as_json=True, out=tmp_path, draw=lambda _: None)
    assert (tmp_path / "report.txt").read_bytes() == "naïve\n".encode()
    assert capsys.readouterr().out == '{\n  "label": "na\\u00efve"\n}\n'


@pytest.mark.parametrize(
    "kind", [["knn", "--no-baselines", "--images"], ["retrieval", "--queries"]]
)
def test_few_classes_are_listed_of_many(kind, built, test_folder, monkeypatch, capsys):
    """The worst, which come first, so that a thousand push no headline off the screen."""
    args = [*kind, str(test_folder), "--collection", str(built)]
    for most, end in ((2, "  ... and 1 class more, in the JSON"), (1, "  ... and 2 classes more,")):
        monkeypatch.setattr(output, "MAX_CLASS_LINES", most)
        assert run(args) == 0
        table = capsys.readouterr().out.partition("\n  class ")[2].splitlines()
        assert table[1 + most].startswith(end)
    monkeypatch.undo()
    assert run(args) == 0
    assert "more, in the JSON" not in capsys.readouterr().out
