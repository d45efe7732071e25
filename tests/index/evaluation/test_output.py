import io

from index.evaluation.output import hand_over


def test_a_report_is_utf_8_whatever_the_locale(tmp_path, monkeypatch, capsys):
    """Names of classes may be of any script, where the system's encoding has few."""
    monkeypatch.setattr(io, "text_encoding", lambda encoding, _=2: encoding or "ascii")
    hand_over("naïve", {"label": "naïve"}, as_json=True, out=tmp_path, draw=lambda _: None)
    assert (tmp_path / "report.txt").read_bytes() == "naïve\n".encode()
    assert capsys.readouterr().out == '{\n  "label": "na\\u00efve"\n}\n'
