from __future__ import annotations

import asyncio
import hashlib
import hmac

import pytest

from serve.errors import StartError
from serve.security.buckets import Quota
from serve.security.options import KeyOptions
from serve.security.ring import new_token, read_ring, write_line


def test_a_key_is_found_by_its_token_alone(tmp_path):
    """The right one opens; another, a part of it, and its hash do not."""
    file, token = tmp_path / "keys", new_token()
    file.write_text(f"# for tests\n\n{write_line('app', token)}\n")
    ring = read_ring(file)
    assert ring.find(token).name == "app"
    for other in (
        "",
        token[:-1],
        token + "x",
        hashlib.sha256(token.encode()).hexdigest(),
        "é\udc80",
    ):
        assert ring.find(other) is None


def test_keys_are_256_random_bits_that_scanners_know():
    """Long enough that one SHA-256 keeps them, and with a beginning of their own."""
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(token.startswith("horace_") and len(token) == 7 + 43 for token in tokens)


def test_every_key_is_compared_whichever_is_the_right_one(monkeypatch, tmp_path):
    """The time says nothing about which key it was, or whether it was one."""
    tokens = [new_token() for _ in range(5)]
    file = tmp_path / "keys"
    file.write_text("\n".join(write_line(f"k{n}", token) for n, token in enumerate(tokens)))
    ring, compared = read_ring(file), []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    for token in (*tokens, "another"):
        compared.clear()
        ring.find(token)
        assert len(compared) == 5


def test_a_name_may_have_two_keys_while_one_is_changed(tmp_path):
    """Rotation without a gap: both lines hold."""
    old, new = new_token(), new_token()
    file = tmp_path / "keys"
    file.write_text(f"{write_line('app', old)}\n{write_line('app', new)}\n")
    ring = read_ring(file)
    assert ring.find(old).name == ring.find(new).name == "app"
    assert ring.names == ["app"]


def test_limits_of_a_line_stand_in_for_those_of_everyone(tmp_path):
    """What a line does not say is as for all."""
    token = new_token()
    file = tmp_path / "keys"
    file.write_text(write_line("bulk", token, "images=500,calls=4"))
    key = read_ring(file).find(token)
    everyone = Quota(requests_per_s=10, images_per_s=20, burst_s=3)
    assert key.quota(everyone) == Quota(requests_per_s=10, images_per_s=500, calls=4, burst_s=3)


DIGEST = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        "app",
        "app:",
        f"app:{DIGEST[:-1]}",
        f"app:{DIGEST.replace('0', 'G')}",
        f":{DIGEST}",
        f"a b:{DIGEST}",
        f"../x:{DIGEST}",
        f"app:{DIGEST}:images=",
        f"app:{DIGEST}:pictures=1",
        f"app:{DIGEST}:images=-1",
        f"app:{DIGEST}:images=1e3",
        f"app:{DIGEST}:images=0",
    ],
)
def test_a_line_that_is_wrong_refuses_the_file_by_number(tmp_path, text):
    """The line is named and never shown: it might be a key that was pasted."""
    file = tmp_path / "keys"
    file.write_text(f"# first\n{text}\n")
    with pytest.raises(StartError) as refusal:
        read_ring(file)
    assert f"key file {file}, line 2: expected" in str(refusal.value)
    if len(text) > 10:
        assert text not in str(refusal.value)


def test_a_file_that_is_none_or_has_two_kinds_of_limits_is_refused(tmp_path):
    """It would be a matter of luck how much is allowed."""
    file = tmp_path / "keys"
    file.write_text(f"app:{DIGEST}\napp:{DIGEST}:calls=1\n")
    with pytest.raises(StartError, match="expected one set of limits for app"):
        read_ring(file)
    with pytest.raises(StartError, match="found No such file or directory; make one with"):
        read_ring(tmp_path / "absent")
    file.write_bytes(b"\xff\xfe" * 100)
    with pytest.raises(StartError, match="line 1: expected NAME:SHA256-HEX"):
        read_ring(file)
    file.write_text("#" * (2 << 20))
    with pytest.raises(StartError, match="expected at most 1048576 bytes"):
        read_ring(file)


def test_lines_end_where_those_who_edit_the_file_see_them_end(tmp_path):
    """`list` says which to delete; a page break is none, nor what Unicode has of separators."""
    file = tmp_path / "keys"
    file.write_text(f"# one\f\n# two\u2028and more\x85\r\napp:{DIGEST}\r\n\f\nother:{DIGEST}\n")
    assert [(key.name, key.line) for key in read_ring(file).keys] == [("app", 3), ("other", 5)]


def test_a_ring_shows_names_and_nothing_else(tmp_path):
    """What gets into a log is whose keys there are."""
    file = tmp_path / "keys"
    file.write_text(write_line("app", new_token()))
    assert repr(read_ring(file)) == "<KeyRing of 1: app>"


def test_a_blank_key_file_takes_no_key_away_and_a_comment_does(serving, fake, tmp_path):
    """An empty file is one that is being written, or a full disk; a comment line is meant."""
    file, token = tmp_path / "keys", new_token()
    file.write_text(write_line("app", token))

    async def main():
        async with serving(fake, keys=KeyOptions(file=str(file))) as server:
            for blank in ("", " \n\n"):
                file.write_text(blank)
                assert await server.reloads.run() == ["API keys"]
                assert server.security._keys().find(token).name == "app"
            file.write_text("# nobody\n")
            assert await server.reloads.run() == []
            assert server.security._keys().names == []

    asyncio.run(main())
