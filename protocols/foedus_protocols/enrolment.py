"""Enrolment: how an organisation becomes a member.

1. The coordinator's administrator issues a token (256 bits, one use, a day at most, bound to an organisation id) and
   hands it over together with the fingerprint of the CA's key.
2. The organisation dials the enrolment port, checks that the certificate chain it is shown ends in the CA with that
   fingerprint, and only then sends the token, a certificate request, its signing key and a proof that it has that key.
3. A person compares the signing key's fingerprint and approves. 4. The organisation collects its certificate.

The port is one of its own: a gRPC port that does not require client certificates never asks for one. It shows no CA to
trust, so the chain is fetched by an unverified handshake that sends nothing, checked against the pin, and everything
after that goes over a verified channel whose only root is that CA.
"""

from __future__ import annotations

import base64
import http.client
import ssl
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast
from urllib.parse import unquote, urlsplit

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from foedus_protocols.canonical import canonical_bytes, digest
from foedus_protocols.certificates import (
    certificate_name,
    check_own_certificate,
    is_ca,
    parse_certificate,
    parse_certificates,
    parse_der_certificate,
)
from foedus_protocols.channel import (
    TlsFiles,
    answering,
    bind,
    client_options,
    server_credentials,
    server_options,
    split_address,
    translate,
)
from foedus_protocols.errors import ConnectError, VerificationError
from foedus_protocols.identity import PeerName, parse_fingerprint, public_hex, sign, spki_fingerprint, verify
from foedus_protocols.v1 import enrolment_pb2, enrolment_pb2_grpc

ENROL_CONTEXT = "foedus/enrolment/1"
COLLECT_CONTEXT = "foedus/enrolment-collect/1"
MAX_MESSAGE_BYTES = 64 << 10
_MAX_REQUEST_BYTES = 16 << 10
_CALL_SECONDS = 20.0
_THREADS = 16
_ADDRESSES_REMEMBERED = 4096

State = Literal["pending", "approved", "refused"]


@dataclass(frozen=True, kw_only=True)
class EnrolmentRequest:
    """What an organisation presents. `proof` is its signing key's signature over all the rest."""

    org: str
    token: str
    csr_pem: bytes
    signing_key: str
    proof: str

    def __repr__(self) -> str:
        return f"EnrolmentRequest(org={self.org!r})"  # A token never reaches a log.

    @classmethod
    def make(cls, *, org: str, token: str, csr_pem: bytes, signing_key: Ed25519PrivateKey) -> EnrolmentRequest:
        """Fill in and prove a request."""
        public = public_hex(signing_key)
        proof = sign(signing_key, ENROL_CONTEXT, _proved(org, token, csr_pem, public))
        return cls(org=org, token=token, csr_pem=csr_pem, signing_key=public, proof=proof)

    def check_proof(self) -> None:
        """Raise a VerificationError unless who sent this holds the signing key."""
        verify(
            self.signing_key, ENROL_CONTEXT, _proved(self.org, self.token, self.csr_pem, self.signing_key), self.proof
        )


@dataclass(frozen=True, kw_only=True)
class EnrolmentStatus:
    """Where a request stands; the fields after `fingerprint` are filled in once it is approved."""

    state: State
    request_id: str
    fingerprint: str
    certificate_pem: bytes = b""
    ca_pem: bytes = b""
    federation: str = ""
    operator_key: str = ""
    link_address: str = ""

    def check_approved(self, *, org: str, tls_key: EllipticCurvePrivateKey, ca_fingerprint: str) -> None:
        """Check what an approval brought before it is kept.

        Raises:
            VerificationError: Not approved, the pinned CA is not among those that it brings, or the certificate is not
                for `org` in that federation.
            ConnectError: The certificate is not for our key, not one of these CAs', or not valid now.

        Guarantees:
            More than one CA is accepted only from who holds the pinned one's key: the answer came over a channel that
            trusts no other.
        """
        if self.state != "approved":
            raise VerificationError(f"expected an approved request, this one is {self.state}")
        cas, certificate = parse_certificates(self.ca_pem), parse_certificate(self.certificate_pem)
        if parse_fingerprint(ca_fingerprint) not in [spki_fingerprint(ca) for ca in cas]:
            raise VerificationError("expected the CA whose fingerprint was given, the approval brings another")
        check_own_certificate(certificate, key=tls_key, cas=cas)
        if certificate_name(certificate) != PeerName(federation=self.federation, org=org):
            raise VerificationError(f"expected a certificate for {org!r} in {self.federation!r}, got another name")
        if len(self.operator_key) != 64:
            raise VerificationError("expected the operator's signing key, got something else")


class EnrolmentHandlers(Protocol):
    """What the coordinator decides. Both methods may run in several threads at once."""

    def enrol(self, request: EnrolmentRequest) -> EnrolmentStatus:
        """Judge the token and note the request; its proof has been checked. The same request again: the same answer."""

    def collect(self, request_id: str, proof: str) -> EnrolmentStatus:
        """Where a request stands, for who passes `check_collect` with the request's signing key."""


def check_collect(signing_key: str, request_id: str, proof: str) -> None:
    """Raise a VerificationError unless the proof for this request is by this key."""
    verify(signing_key, COLLECT_CONTEXT, request_id.encode(), proof)


def _proved(org: str, token: str, csr_pem: bytes, signing_key: str) -> bytes:
    return canonical_bytes(
        {"org": org, "token": digest(token.encode()), "csr": digest(csr_pem), "signing_key": signing_key}
    )


# The coordinator's side


class RateLimit:
    """A token bucket for each key, and one for all of them together."""

    def __init__(self, per_minute: float, *, together: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates = {"each": per_minute, "all": together}
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> None:
        """Count one attempt.

        Raises:
            ConnectError: Too many from this key, or from all.
        """
        with self._lock:
            if len(self._buckets) > _ADDRESSES_REMEMBERED:
                self._buckets = {"": self._buckets[""]}
            now = self._clock()
            left = {name: self._left(name, self._rates[rate], now) for name, rate in ((key, "each"), ("", "all"))}
            if min(left.values()) < 1:
                raise ConnectError("expected fewer attempts from this address; wait a minute and try again")
            for name, amount in left.items():
                self._buckets[name] = (amount - 1, now)

    def _left(self, name: str, rate: float, now: float) -> float:
        amount, then = self._buckets.get(name, (rate, now))
        return min(rate, amount + (now - then) * rate / 60)


class EnrolmentServer:
    """A running enrolment port."""

    def __init__(self, server: grpc.Server, pool: ThreadPoolExecutor, port: int) -> None:
        self._server = server
        self._pool = pool
        self.port = port

    def stop(self, grace: float = 1.0) -> None:
        """Close the port."""
        self._server.stop(grace).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)


def serve_enrolment(
    address: str, handlers: EnrolmentHandlers, tls: TlsFiles, *, attempts_per_minute: float = 60
) -> EnrolmentServer:
    """Open the enrolment port and serve it.

    Args:
        address: ``HOST:PORT``; port 0 takes a free one, which the result names.
        handlers: Who decides.
        tls: The coordinator's certificate (with the CA's behind it), key and CA.
        attempts_per_minute: Enrolments from one address; ten times as many from all, and ten times as many questions.

    Raises:
        StateError: The port is taken.
    """
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="foedus-enrolment")
    options = server_options(MAX_MESSAGE_BYTES)
    server = grpc.server(pool, options=options, maximum_concurrent_rpcs=2 * _THREADS)
    enrolment_pb2_grpc.add_EnrolmentServicer_to_server(_Service(handlers, attempts_per_minute), server)
    port = bind(server, address, server_credentials(tls, require_client=False))
    server.start()
    return EnrolmentServer(server, pool, port)


class _Service(enrolment_pb2_grpc.EnrolmentServicer):
    def __init__(self, handlers: EnrolmentHandlers, attempts_per_minute: float) -> None:
        self._handlers = handlers
        self._enrolments = RateLimit(attempts_per_minute, together=10 * attempts_per_minute)
        self._questions = RateLimit(10 * attempts_per_minute, together=100 * attempts_per_minute)

    def Enrol(self, request: Any, context: grpc.ServicerContext) -> Any:
        with answering(context):
            self._enrolments.take(_address(context))
            if request.ByteSize() > _MAX_REQUEST_BYTES:
                raise VerificationError(
                    f"expected an enrolment request of at most {_MAX_REQUEST_BYTES} bytes, got more"
                )
            presented = EnrolmentRequest(
                org=request.org,
                token=request.token,
                csr_pem=request.csr_pem,
                signing_key=request.signing_key,
                proof=request.proof,
            )
            presented.check_proof()
            return _encode(self._handlers.enrol(presented))

    def Collect(self, request: Any, context: grpc.ServicerContext) -> Any:
        with answering(context):
            self._questions.take(_address(context))
            if request.ByteSize() > _MAX_REQUEST_BYTES:
                raise VerificationError(f"expected a question of at most {_MAX_REQUEST_BYTES} bytes, got more")
            return _encode(self._handlers.collect(request.request_id, request.proof))


def _address(context: grpc.ServicerContext) -> str:
    """The caller's network address without its port."""
    return str(context.peer()).rpartition(":")[0]


def _encode(status: EnrolmentStatus) -> Any:
    return enrolment_pb2.EnrolReply(**vars(status))


# The organisation's side


class EnrolmentClient:
    """A connection to an enrolment port whose CA is known only by its fingerprint."""

    def __init__(self, address: str, ca_fingerprint: str, *, proxy: str | None = None) -> None:
        """Fetch the CA, check it against the pin, and open a verified channel.

        Args:
            address: ``HOST:PORT`` as named in the coordinator's certificate.
            ca_fingerprint: SHA-256 of the CA's public key, as the administrator gave it.
            proxy: ``http://[user:password@]HOST:PORT``; environment variables are not looked at.

        Raises:
            ConnectError: Nothing answers there.
            VerificationError: What answers shows no CA with that fingerprint. Nothing has been sent to it.
            ConfigError: The address, the fingerprint or the proxy is malformed.

        Guarantees:
            Nothing, the token least of all, is sent before a CA with the pinned key has vouched for the other side.
        """
        options = client_options(MAX_MESSAGE_BYTES, proxy)
        self.address = address
        self.ca_pem = fetch_ca(address, parse_fingerprint(ca_fingerprint), proxy=proxy)
        credentials = grpc.ssl_channel_credentials(self.ca_pem)
        self._channel = grpc.secure_channel(address, credentials, options=options)
        self._stub = enrolment_pb2_grpc.EnrolmentStub(self._channel)

    def enrol(self, request: EnrolmentRequest) -> EnrolmentStatus:
        """Present a token.

        Raises:
            VerificationError: Refused: the token or the proof is wrong.
            StateError: The token was used or has expired.
            ConnectError: No answer, or too many attempts.
        """
        return self._call("Enrol", enrolment_pb2.EnrolRequest(**vars(request)))

    def collect(self, request_id: str, signing_key: Ed25519PrivateKey) -> EnrolmentStatus:
        """Ask where a request stands; raises as `enrol` does."""
        proof = sign(signing_key, COLLECT_CONTEXT, request_id.encode())
        return self._call("Collect", enrolment_pb2.CollectRequest(request_id=request_id, proof=proof))

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def __enter__(self) -> EnrolmentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, request: Any) -> EnrolmentStatus:
        try:
            reply = getattr(self._stub, method)(request, timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            raise translate(error, self.address) from error
        if reply.state not in ("pending", "approved", "refused"):
            raise VerificationError(f"expected an enrolment state from {self.address}, got {reply.state!r}")
        return EnrolmentStatus(
            state=cast(State, reply.state),
            request_id=reply.request_id,
            fingerprint=reply.fingerprint,
            certificate_pem=reply.certificate_pem,
            ca_pem=reply.ca_pem,
            federation=reply.federation,
            operator_key=reply.operator_key,
            link_address=reply.link_address,
        )


def fetch_ca(address: str, fingerprint: str, *, proxy: str | None = None) -> bytes:
    """The CA certificate that a server shows behind its own, if it has the pinned key.

    The handshake proves nothing and sends nothing; whoever uses the result must dial again with it as the only root.

    Returns:
        The CA as PEM.

    Raises:
        ConnectError: No TLS server answers.
        VerificationError: No certificate in the chain is a CA with that key.
    """
    for certificate in _shown_chain(address, proxy):
        if spki_fingerprint(certificate) == fingerprint and is_ca(certificate):
            return certificate.public_bytes(Encoding.PEM)
    raise VerificationError(
        f"expected {address} to show the CA with fingerprint {fingerprint}, it shows another; check the fingerprint "
        "with the administrator over another channel: something may stand between"
    )


def _shown_chain(address: str, proxy: str | None) -> list[x509.Certificate]:
    host, port = split_address(address)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE  # The pin decides; nothing is sent over this connection.
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.set_alpn_protocols(["h2"])
    connection = http.client.HTTPSConnection(host, port, context=tls, timeout=_CALL_SECONDS)
    if proxy is not None:
        connection = _through(proxy, host, port, tls)
    try:
        connection.connect()
        chain = _unverified_chain(cast(ssl.SSLSocket, connection.sock))
    except (OSError, http.client.HTTPException) as error:
        raise ConnectError(f"expected a coordinator's enrolment port at {address}, got: {error}") from error
    finally:
        connection.close()
    return [parse_der_certificate(one) for one in chain]


def _through(proxy: str, host: str, port: int, tls: ssl.SSLContext) -> http.client.HTTPSConnection:
    url = urlsplit(proxy)
    connection = http.client.HTTPSConnection(url.hostname or "", url.port or 80, context=tls, timeout=_CALL_SECONDS)
    headers = {}
    if url.username:
        account = f"{unquote(url.username)}:{unquote(url.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(account.encode()).decode()
    connection.set_tunnel(host, port, headers)
    return connection


def _unverified_chain(connection: ssl.SSLSocket) -> list[bytes]:
    """The certificates that a server showed, as DER: public since Python 3.13, private before it.

    See https://bugs.python.org/issue18233.
    """
    if sys.version_info >= (3, 13):
        return list(connection.get_unverified_chain())
    shown = connection._sslobj.get_unverified_chain() or []  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(one.public_bytes()) for one in shown]


__all__ = [
    "EnrolmentClient",
    "EnrolmentHandlers",
    "EnrolmentRequest",
    "EnrolmentServer",
    "EnrolmentStatus",
    "check_collect",
    "fetch_ca",
    "serve_enrolment",
]
