from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from serve.http.tls import make_context, write_name
from serve.security.caller import CURRENT
from serve.security.options import CallerLimits
from serve.security.ring import write_line
from serve.security.tls import Tls, TlsOptions


def files(*images):
    """Images as parts of a form."""
    return [("images", (f"{n}.png", data)) for n, data in enumerate(images)]


def test_nothing_but_what_the_server_is_can_be_asked_without_a_key(http_serving, fake, keys):
    """Every route but probes and the description; no word of the body is read."""
    wrong = [{"authorization": "Bearer wrong"}, {"authorization": "Basic sesame"}]

    async def main():
        async with http_serving(fake, keys=keys) as (_, http):
            for headers in ({}, *wrong, {"x-api-key": ""}):
                http.headers = headers
                for path in ("/", "/healthz", "/readyz", "/openapi.json"):
                    assert (await http.get(path)).status_code == 200, headers
                for reply in (
                    await http.post("/v1/embed", content=b"not even a form"),
                    await http.post("/v1/search", json={"ids": [1]}),
                    await http.get("/v1/models"),
                    await http.get("/v1/collections"),
                ):
                    assert reply.status_code == 401, headers
                    assert reply.headers["www-authenticate"].startswith("Bearer")
                    error = reply.json()["error"]
                    assert error["code"] == "unauthenticated"
                    assert error["message"].startswith("API key: expected a key of this server")

    asyncio.run(main())


@pytest.mark.parametrize("headers", [{"authorization": "Bearer sesame"}, {"x-api-key": "sesame"}])
def test_a_key_lets_in_and_names_its_caller(http_serving, fake, png, keys, headers, monkeypatch):
    """Whoever answers knows the caller by the name of the key."""
    seen = []

    async def main():
        async with http_serving(fake, keys=keys) as (server, http):
            embed = server.services.Embed

            async def note(request, context):
                seen.append(CURRENT.get())
                return await embed(request, context)

            monkeypatch.setattr(server.services, "Embed", note)
            return await http.post("/v1/embed", files=files(png(1)), headers=headers)

    assert asyncio.run(main()).status_code == 200
    assert seen == ["alice"]


def test_a_caller_above_its_rate_is_told_when_to_come_back(http_serving, fake, png, keys):
    """As 429; images are counted, and nothing is computed."""
    headers = {"x-api-key": "sesame"}
    Path(keys.file).write_text(write_line("alice", "sesame", "images=0.004"))

    async def main():
        async with http_serving(fake, keys=keys) as (_, http):
            http.headers.update(headers)
            first = await http.post("/v1/embed", files=files(*[png(1)] * 4))
            return first, await http.post("/v1/embed", files=files(*[png(2)] * 4))

    first, second = asyncio.run(main())
    assert (first.status_code, second.status_code) == (200, 429)
    assert "rate of this caller: expected at most 0.004 images a second" in second.text
    assert int(second.headers["retry-after-ms"]) == pytest.approx(1e6, rel=0.1)
    assert int(second.headers["retry-after"]) == pytest.approx(1000, rel=0.1)
    assert 2 not in fake.computed


def test_a_caller_has_a_bounded_number_of_requests_open(http_serving, fake, png, eventually):
    """One more is refused, also while it is still being sent."""
    limits = CallerLimits(calls_per_client=1)

    async def main():
        async with http_serving(fake, limits=limits) as (_, http):
            fake.gate.clear()
            held = asyncio.create_task(http.post("/v1/embed", files=files(png(1))))
            await eventually(fake.entered.is_set)
            refused = await http.get("/v1/models")
            fake.gate.set()
            return refused, await held, await http.get("/v1/models")

    refused, held, again = asyncio.run(main())
    assert [refused.status_code, held.status_code, again.status_code] == [429, 200, 200]


# TLS.


@pytest.fixture
def authority():
    """An authority that vouches for servers and callers."""
    return trustme.CA()


def write_certificate(folder, authority, name="localhost"):
    """Have the authority vouch for a server; give the options."""
    certificate = authority.issue_cert(name, "127.0.0.1")
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    (folder / "key.pem").write_bytes(certificate.private_key_pem.bytes())
    (folder / "cert.pem").write_bytes(chain)
    return {"cert": str(folder / "cert.pem"), "key": str(folder / "key.pem")}


def context_for(authority, caller=None):
    """What a client trusts, and what it shows."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if caller is not None:
        caller.configure_cert(context)
    return context


def test_https_has_the_certificate_of_grpc_and_changes_with_it(
    http_serving, fake, tmp_path, authority
):
    """A new one holds for the next handshake; the connection that is open goes on."""
    tls = TlsOptions(**write_certificate(tmp_path, authority))
    other = trustme.CA()

    async def main():
        async with http_serving(fake, tls=tls) as (server, _):
            assert server.http.url.startswith("https://")
            url = server.http.url + "/readyz"
            async with httpx.AsyncClient(verify=context_for(authority)) as http:
                assert (await http.get(url)).status_code == 200
                write_certificate(tmp_path, other)
                server.security.certificates.reload()
                assert (await http.get(url)).status_code == 200
                async with httpx.AsyncClient(verify=context_for(other)) as renewed:
                    assert (await renewed.get(url)).status_code == 200
                async with httpx.AsyncClient(verify=context_for(authority)) as late:
                    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                        await late.get(url)

    asyncio.run(main())


def test_a_change_that_fails_once_is_made_by_the_next_handshake(tmp_path, authority, monkeypatch):
    """OpenSSL's module reads keys from files only, and no descriptor was left for one."""
    files = Tls(TlsOptions(**write_certificate(tmp_path, authority))).files
    context = make_context(files)

    def refuse(name):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def shake():
        return context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True).context

    old = shake()
    assert shake() is old
    write_certificate(tmp_path, trustme.CA())
    files.reload()
    with monkeypatch.context() as patch:
        patch.setattr("os.memfd_create", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            shake()
    assert shake() is not old


def test_without_a_certificate_there_is_no_handshake(
    http_serving, fake, png, tmp_path, authority, monkeypatch
):
    """Where callers need one; the subject of one is the caller's name, as it is over gRPC."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = write_certificate(tmp_path, authority)
    tls = TlsOptions(**certificate, client_ca=str(tmp_path / "ca.pem"))
    caller = authority.issue_cert("caller@example.org", common_name="Caller, Ltd")
    seen = []

    async def main():
        async with http_serving(fake, tls=tls) as (server, _):
            embed = server.services.Embed

            async def note(request, context):
                seen.append(CURRENT.get())
                return await embed(request, context)

            monkeypatch.setattr(server.services, "Embed", note)
            url = server.http.url + "/v1/embed"
            async with httpx.AsyncClient(verify=context_for(authority, caller)) as http:
                assert (await http.post(url, files=files(png(1)))).status_code == 200
            for stranger in (None, trustme.CA().issue_cert("caller@example.org")):
                async with httpx.AsyncClient(verify=context_for(authority, stranger)) as http:
                    with pytest.raises(httpx.TransportError):
                        await http.post(url, files=files(png(1)))

    asyncio.run(main())
    pem = caller.cert_chain_pems[0].bytes()
    assert seen == [x509.load_pem_x509_certificate(pem).subject.rfc4514_string()]
    assert "CN=Caller\\, Ltd" in seen[0]


def issue_with_directory_name(authority, file):
    """Have the authority vouch for a caller whose other name is a subject, and not a text."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "caller")])
    vouching = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(vouching.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(vouching.not_valid_before_utc)
        .not_valid_after(vouching.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName([x509.DirectoryName(name)]), critical=False)
        .sign(load_pem_private_key(authority.private_key_pem.bytes(), None), hashes.SHA256())
    )
    pem, pkcs8 = Encoding.PEM, PrivateFormat.PKCS8
    file.write_bytes(key.private_bytes(pem, pkcs8, NoEncryption()) + certificate.public_bytes(pem))


def test_a_caller_may_have_another_name_that_is_no_text(http_serving, fake, tmp_path, authority):
    """It is let in, and known by its subject."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = TlsOptions(**write_certificate(tmp_path, authority), client_ca=str(tmp_path / "ca.pem"))
    issue_with_directory_name(authority, tmp_path / "caller.pem")
    context = context_for(authority)
    context.load_cert_chain(tmp_path / "caller.pem")

    async def main():
        async with (
            http_serving(fake, tls=tls) as (server, _),
            httpx.AsyncClient(verify=context, timeout=5) as http,
        ):
            return await http.get(server.http.url + "/v1/models")

    assert asyncio.run(main()).status_code == 200


def shake_hands(url, context, session=None):
    """Connect as a caller; give the answer to a request, and the session to resume."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    with (
        socket.create_connection((host, port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost", session=session) as secure,
    ):
        secure.sendall(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: secure.recv(4096), b""))
        return answer, secure.session


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("tickets", [True, False])
def test_a_session_ends_with_the_authority_that_it_began_with(
    http_serving, fake, tmp_path, authority, version, tickets
):
    """A caller whose authority is no longer trusted does not get in by resuming one."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = write_certificate(tmp_path, authority)
    tls = TlsOptions(**certificate, client_ca=str(tmp_path / "ca.pem"))
    context = context_for(authority, authority.issue_cert("caller@example.org"))
    context.minimum_version = context.maximum_version = version
    if not tickets:
        context.options |= ssl.OP_NO_TICKET

    async def main():
        async with http_serving(fake, tls=tls) as (server, _):
            url = server.http.url
            answer, session = await asyncio.to_thread(shake_hands, url, context)
            assert answer.startswith(b"HTTP/1.1 200")
            trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
            server.security.certificates.reload()
            for resumed in (session, None):
                with contextlib.suppress(ssl.SSLError, ConnectionError):  # or an end unsaid
                    answer, _ = await asyncio.to_thread(shake_hands, url, context, resumed)
                    assert not answer

    asyncio.run(main())


def test_a_name_is_written_as_openssl_writes_it():
    """The last part first; what is special is escaped."""
    names = [("countryName", "SE"), ("organizationName", 'A+B "C"'), ("commonName", "#é ")]
    assert write_name(names) == 'CN=\\#\\C3\\A9\\ ,O=A\\+B \\"C\\",C=SE'
