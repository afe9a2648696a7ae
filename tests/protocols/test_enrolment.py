"""Enrolment over real TLS on the loopback."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from foedus_protocols import enrolment, identity
from foedus_protocols.certificates import CertificateAuthority, make_request
from foedus_protocols.enrolment import (
    EnrolmentClient,
    EnrolmentRequest,
    EnrolmentServer,
    EnrolmentStatus,
    RateLimit,
    check_collect,
    serve_enrolment,
)
from foedus_protocols.errors import ConfigError, ConnectError, StateError, VerificationError
from foedus_protocols.link import LinkClient

TOKEN = "k3Yt-not-a-real-token-but-long-enough-0123456789"


class Desk:
    """Handlers that approve whoever brings the token, once a person says so."""

    def __init__(self, federation: Any) -> None:
        self.federation = federation
        self.request: EnrolmentRequest | None = None
        self.approved = False
        self.used = False
        self.seen: list[str] = []

    def enrol(self, request: EnrolmentRequest) -> EnrolmentStatus:
        self.seen.append(request.token)
        if request.token != TOKEN or request.org != "clinic":
            raise VerificationError("expected a token for this organisation, got another")
        if self.request is not None and request != self.request:
            raise StateError("expected an unused token, this one was used; ask for a new one")
        self.request = request
        return self._status()

    def collect(self, request_id: str, proof: str) -> EnrolmentStatus:
        if self.request is None:
            raise StateError("expected a known request, there is none")
        check_collect(self.request.signing_key, request_id, proof)
        return self._status()

    def _status(self) -> EnrolmentStatus:
        assert self.request is not None
        pending = EnrolmentStatus(
            state="pending", request_id="r-1", fingerprint=identity.key_fingerprint(self.request.signing_key)
        )
        if not self.approved:
            return pending
        certificate = self.federation.ca.issue_certificate(
            self.request.csr_pem, org=self.request.org, federation=self.federation.name
        )
        return dataclasses.replace(
            pending,
            state="approved",
            certificate_pem=certificate,
            ca_pem=self.federation.ca.pem,
            federation=self.federation.name,
            operator_key=identity.public_hex(self.federation.operator),
            link_address="127.0.0.1:9",
        )


@pytest.fixture
def desk(federation) -> Desk:
    return Desk(federation)


@pytest.fixture
def server(federation, desk) -> Iterator[EnrolmentServer]:
    running = serve_enrolment("127.0.0.1:0", desk, federation.coordinator_tls(), attempts_per_minute=20)
    yield running
    running.stop(0.1)


@pytest.fixture
def client(federation, server) -> Iterator[EnrolmentClient]:
    with EnrolmentClient(f"127.0.0.1:{server.port}", federation.ca.fingerprint) as connected:
        yield connected


@pytest.fixture
def keys() -> tuple[Any, Any]:
    return identity.generate_tls_key(), identity.generate_signing_key()


def request(keys: tuple[Any, Any], **more: str) -> EnrolmentRequest:
    tls, signing = keys
    fields = {"org": "clinic", "token": TOKEN} | more
    return EnrolmentRequest.make(csr_pem=make_request(tls, fields["org"]), signing_key=signing, **fields)


def test_an_organisation_joins(client, desk, keys, federation):
    tls, signing = keys
    status = client.enrol(request(keys))
    assert status.state == "pending"
    assert status.fingerprint == identity.key_fingerprint(identity.public_hex(signing))
    assert client.collect(status.request_id, signing).state == "pending"
    desk.approved = True
    status = client.collect(status.request_id, signing)
    status.check_approved(org="clinic", tls_key=tls, ca_fingerprint=federation.ca.fingerprint)
    assert client.ca_pem == federation.ca.pem


def test_the_same_request_again_is_no_second_use(client, keys):
    first = request(keys)
    assert client.enrol(first) == client.enrol(first)
    with pytest.raises(StateError, match="used"):
        client.enrol(request((identity.generate_tls_key(), identity.generate_signing_key())))


def test_a_wrong_pin_stops_before_the_token_is_sent(server, desk):
    with pytest.raises(VerificationError, match="another channel"):
        EnrolmentClient(f"127.0.0.1:{server.port}", "ab" * 32)
    assert desk.seen == []


def test_the_pin_of_the_servers_own_key_is_no_ca(server, federation):
    """Pinning must end in a CA: the leaf's key in its place would let a leaf sign for others."""
    tls = federation.folder / "coordinator" / "tls.pem"
    leaf = enrolment.parse_certificate(tls.read_bytes())
    with pytest.raises(VerificationError):
        EnrolmentClient(f"127.0.0.1:{server.port}", identity.spki_fingerprint(leaf))


def test_a_copied_ca_behind_a_foreign_leaf_is_refused(federation, desk, keys):
    """An impostor can show our CA's certificate, which is public, but no leaf that it signed."""
    ours = federation.ca
    federation.ca = CertificateAuthority.create(federation.name)
    tls = federation.coordinator_tls("impostor")
    federation.ca = ours
    leaf = enrolment.parse_certificate(tls.certificate.read_bytes())
    tls.certificate.write_bytes(leaf.public_bytes(enrolment.Encoding.PEM) + ours.pem)
    running = serve_enrolment("127.0.0.1:0", desk, tls)
    try:
        client = EnrolmentClient(f"127.0.0.1:{running.port}", ours.fingerprint)
        with client, pytest.raises(ConnectError, match="federation's CA"):
            client.enrol(request(keys))
    finally:
        running.stop(0.1)
    assert desk.seen == []


def test_a_proof_by_another_key_is_refused(client, desk, keys):
    good = request(keys)
    other = identity.public_hex(identity.generate_signing_key())
    for wrong in ({"signing_key": other}, {"org": "bank"}, {"token": TOKEN + "x"}, {"csr_pem": b"other"}):
        with pytest.raises(VerificationError):
            client.enrol(dataclasses.replace(good, **wrong))
    assert desk.seen == []


def test_only_the_applicant_collects(client, desk, keys):
    status = client.enrol(request(keys))
    desk.approved = True
    with pytest.raises(VerificationError):
        client.collect(status.request_id, identity.generate_signing_key())


def test_an_approval_for_someone_else_is_not_kept(client, desk, keys, federation):
    tls, signing = keys
    pending = client.enrol(request(keys))
    expected = {"org": "clinic", "tls_key": tls, "ca_fingerprint": federation.ca.fingerprint}
    with pytest.raises(VerificationError, match="pending"):
        pending.check_approved(**expected)
    desk.approved = True
    status = client.collect(pending.request_id, signing)
    for change, error in (
        ({"org": "bank"}, VerificationError),
        ({"tls_key": identity.generate_tls_key()}, ConnectError),
        ({"ca_fingerprint": "ab" * 32}, VerificationError),
    ):
        with pytest.raises(error):
            status.check_approved(**expected | change)
    with pytest.raises(VerificationError):
        dataclasses.replace(status, federation="other").check_approved(**expected)


def test_attempts_are_limited(client, keys):
    wrong = request(keys, token="wrong")

    def hammer() -> None:
        for _ in range(40):
            with pytest.raises(VerificationError):
                client.enrol(wrong)

    with pytest.raises(ConnectError, match="wait a minute"):
        hammer()


def test_the_bucket_fills_again():
    now = [0.0]
    limit = RateLimit(6, together=9, clock=lambda: now[0])
    for _ in range(6):
        limit.take("a")
    with pytest.raises(ConnectError):
        limit.take("a")
    for _ in range(3):
        limit.take("b")
    with pytest.raises(ConnectError):
        limit.take("c")  # Nine from all of them.
    now[0] = 10.0  # One of six a minute has come back.
    limit.take("a")
    with pytest.raises(ConnectError):
        limit.take("a")


def test_a_flood_of_addresses_does_not_grow_without_end():
    limit = RateLimit(6, together=1e9)
    for address in range(10_000):
        limit.take(str(address))
    assert len(limit._buckets) < 5_000


def test_a_long_request_is_refused(client, desk, keys):
    with pytest.raises(VerificationError, match="at most"):
        client.enrol(request(keys, token="x" * (20 << 10)))
    assert desk.seen == []


def test_a_token_is_in_no_representation(keys):
    assert TOKEN not in repr(request(keys))


def test_nobody_there(federation):
    with pytest.raises(ConnectError, match="enrolment port"):
        EnrolmentClient("127.0.0.1:1", federation.ca.fingerprint)
    with pytest.raises(ConfigError):
        EnrolmentClient("no-port", federation.ca.fingerprint)
    with pytest.raises(ConfigError):
        EnrolmentClient("127.0.0.1:1", "short")


def test_a_link_client_at_the_wrong_port_says_so(server, federation):
    link = LinkClient(f"127.0.0.1:{server.port}", federation.org_tls("clinic"))
    with link, pytest.raises(ConnectError, match="another service"):
        link.hello({})


class ConnectProxy:
    """A proxy that knows CONNECT and wants an account; it notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += caller.recv(1)
        self.asked.append(head)
        host, port = head.split()[1].decode().rsplit(":", 1)
        target = socket.create_connection((host, int(port)))
        caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        threading.Thread(target=self._copy, args=(caller, target), daemon=True).start()
        self._copy(target, caller)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            target.close()

    def close(self) -> None:
        self._listener.close()


def test_everything_goes_through_a_proxy_that_was_named(server, federation, keys):
    proxy = ConnectProxy()
    try:
        address = f"127.0.0.1:{server.port}"
        url = f"http://user:pass@127.0.0.1:{proxy.port}"
        with EnrolmentClient(address, federation.ca.fingerprint, proxy=url) as client:
            assert client.enrol(request(keys)).state == "pending"
    finally:
        proxy.close()
    assert len(proxy.asked) == 2  # The look at the chain, and the channel.
    for head in proxy.asked:
        assert head.startswith(f"CONNECT {address}".encode())
        assert b"basic dxnlcjpwyxnz" in head.lower()
    with pytest.raises(ConfigError, match="proxy"):
        EnrolmentClient(address, federation.ca.fingerprint, proxy=f"https://127.0.0.1:{proxy.port}")
