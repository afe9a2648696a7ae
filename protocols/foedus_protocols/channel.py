"""What both gRPC ports share: options, TLS, identities, errors, and the watch over transfers.

The options are measured, not folklore; each constant says what went wrong without it. Two properties of gRPC shape the
rest. It checks a certificate's dates only at the handshake, so the peer's dates and membership are checked again at
each call and, by `Watch`, twice a second of a stream. And a peer whose certificate it refuses sees "Socket closed", as
if the network were down, so that each side checks its own certificate before it dials.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509

from foedus_protocols.certificates import (
    certificate_name,
    check_own_certificate,
    parse_certificate,
    parse_certificates,
)
from foedus_protocols.errors import ConfigError, ConnectError, FoedusError, StateError, VerificationError
from foedus_protocols.files import DiskTrouble
from foedus_protocols.identity import COORDINATOR, PeerName, key_pem, load_tls_key
from foedus_protocols.store import CHUNK_BYTES

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = CHUNK_BYTES + (64 << 10)
_TROUBLE_SECONDS = 60.0
_WATCH_SECONDS = 0.5  # A revoked member's streams end within a second, whatever they wait for.
_ERROR_TEXT_CHARACTERS = 1000  # gRPC's metadata holds 8 KiB.

# A frozen peer is noticed in 15 s. Without http2.ping_timeout_ms it took 63 s, whatever keepalive_timeout_ms said.
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]
# Fixed windows: BDP probing cost 8 to 27 MiB a stream at the receiver; 4 MiB keeps 80 MiB/s at 40 ms round trip.
_FLOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4 << 20)]

Options = list[tuple[str, int | str]]


# Options


def server_options(max_message_bytes: int) -> Options:
    """gRPC options of a port of ours."""
    return [
        *_KEEPALIVE,
        *_FLOW,
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),  # On by default: a second coordinator would share the port without an error.
        # Below the client's keepalive time, or the server answers its pings with GOAWAY "too_many_pings".
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ]


def client_options(max_message_bytes: int, proxy: str | None) -> Options:
    """gRPC options of a channel of ours.

    Args:
        max_message_bytes: The largest message that is accepted.
        proxy: ``http://[user:password@]host:port``, or nothing. Variables such as ``https_proxy`` are never looked at.

    Raises:
        ConfigError: Another kind of proxy, which gRPC would pass by in silence.
    """
    options: Options = [
        *_KEEPALIVE,
        *_FLOW,
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if proxy is None:
        return [*options, ("grpc.enable_http_proxy", 0)]
    if not proxy.startswith("http://"):
        raise ConfigError("expected a proxy as http://HOST:PORT, got another scheme; gRPC would dial directly instead")
    return [*options, ("grpc.http_proxy", proxy)]


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT`` as its two parts; an IPv6 host stands in brackets.

    Raises:
        ConfigError: Not of this form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"expected an address HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)


# TLS


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """Where a party's TLS identity lies: certificate (a coordinator's with the CA's behind it), key, and the CAs.

    `ca` holds one CA, or several while one takes the other's place; all of them are trusted.
    """

    certificate: Path
    key: Path
    ca: Path
    password: bytes | None = field(default=None, repr=False)

    def read(self) -> TlsIdentity:
        """Read and check all three.

        Raises:
            ConfigError: A file is missing, or the key's mode is not 0600.
            ConnectError: The certificate is expired, not yet valid, for another key or of another CA.
            VerificationError: A file holds no certificate.
        """
        try:
            chain, ca = self.certificate.read_bytes(), self.ca.read_bytes()
        except OSError as error:
            raise ConfigError(f"expected a readable file at {error.filename}, got: {error.strerror}") from error
        key = load_tls_key(self.key, password=self.password)
        certificate = parse_certificate(chain)
        check_own_certificate(certificate, key=key, cas=parse_certificates(ca))
        return TlsIdentity(certificate=certificate, chain_pem=chain, key_pem=key_pem(key), ca_pem=ca)


@dataclass(frozen=True, kw_only=True)
class TlsIdentity:
    """A checked TLS identity, in memory."""

    certificate: x509.Certificate
    chain_pem: bytes
    key_pem: bytes = field(repr=False)
    ca_pem: bytes

    @property
    def name(self) -> PeerName:
        """Whom the certificate speaks for."""
        return certificate_name(self.certificate)


def client_credentials(identity: TlsIdentity) -> grpc.ChannelCredentials:
    """Credentials of an organisation that dials the link."""
    return grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.chain_pem)


def server_credentials(tls: TlsFiles, *, require_client: bool) -> grpc.ServerCredentials:
    """Credentials of a port, read again for each new connection once the certificate file has changed.

    gRPC keeps the old configuration where a new one is bad, so a failure to read is logged and changes nothing.
    """

    def configuration() -> grpc.ServerCertificateConfiguration:
        identity = tls.read()
        return grpc.ssl_server_certificate_configuration(
            [(identity.key_pem, identity.chain_pem)], identity.ca_pem if require_client else None
        )

    def stamp() -> int:
        return max(tls.certificate.stat().st_mtime_ns, tls.ca.stat().st_mtime_ns)

    loaded = [stamp()]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        try:
            if (current := stamp()) == loaded[0]:
                return None
            fresh = configuration()
        except (FoedusError, OSError) as error:
            log.error("the new server certificate cannot be used, the old one stays: %s", error)
            return None
        loaded[0] = current
        return fresh

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client)


# Who is calling


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The organisation at the other end of a call, by its certificate."""

    org: str
    serial: str
    expires: datetime

    def check_dates(self) -> None:
        """Raise a VerificationError once the certificate has run out: gRPC looks only at the handshake."""
        if datetime.now(UTC) > self.expires:
            raise VerificationError(
                f"expected a valid certificate, that of {self.org!r} expired; renew it and reconnect"
            )


def peer_of(context: grpc.ServicerContext, federation: str) -> Peer:
    """Read the caller's identity from its verified certificate.

    Only the SPIFFE URI counts: ``context.peer_identities()`` falls back to the common name and is never used.

    Raises:
        VerificationError: No certificate, not TLS 1.3, another federation, or not an organisation.
    """
    values = context.auth_context()
    uris, leaves = values.get("peer_spiffe_id", []), values.get("x509_pem_cert", [])
    if len(uris) != 1 or len(leaves) != 1:
        raise VerificationError(f"expected one SPIFFE identity in the caller's certificate, got {len(uris)}")
    if values.get("ssl_tls_version") != [b"TLSv1.3"]:
        raise VerificationError("expected TLS 1.3, got an older version; a proxy that opens TLS may stand between")
    leaf = parse_certificate(bytes(leaves[0]))
    name = certificate_name(leaf)
    if name.uri.encode() != uris[0] or name.federation != federation or name.org == COORDINATOR:
        raise VerificationError(f"expected an organisation of federation {federation!r}, got {name.uri}")
    peer = Peer(org=name.org, serial=f"{leaf.serial_number:x}", expires=leaf.not_valid_after_utc)
    peer.check_dates()
    return peer


# Errors, in both directions


@contextmanager
def answering(context: grpc.ServicerContext) -> Iterator[None]:
    """Turn errors of a handler into status codes.

    The text of an error of ours travels: it holds no record, key or token. Of anything else only "internal error"
    travels, since gRPC would otherwise send the exception's text.
    """
    try:
        yield
    except VerificationError as error:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error)[:_ERROR_TEXT_CHARACTERS])
    except Busy as error:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)[:_ERROR_TEXT_CHARACTERS])
    except DiskTrouble as error:
        _say_trouble(error)
        context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator's disk has trouble; its log says more")
    except ConnectError as error:
        context.abort(grpc.StatusCode.UNAVAILABLE, str(error)[:_ERROR_TEXT_CHARACTERS])
    except FoedusError as error:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error)[:_ERROR_TEXT_CHARACTERS])
    except grpc.RpcError:
        raise  # The peer went away in the middle of its stream; there is nobody to tell.
    except Exception:  # The border of the process: logged here in full, told outside in two words.
        log.exception("a link handler failed")
        context.abort(grpc.StatusCode.INTERNAL, "internal error; the coordinator's log says more")


_trouble_said = {"at": float("-inf")}


def _say_trouble(error: DiskTrouble) -> None:
    """Log trouble of our own disk, once a minute: whoever pushes tries again all the time."""
    if time.monotonic() - _trouble_said["at"] > _TROUBLE_SECONDS:
        _trouble_said["at"] = time.monotonic()
        log.error("%s", error)


class Busy(ConnectError):
    """The peer asks for more at once than one member may have; the same call may come again."""


class TransientError(ConnectError):
    """The connection failed in a way that a later attempt may not: the callers of `link.py` see a ConnectError."""


def translate(error: grpc.RpcError, address: str) -> FoedusError:
    """The error of ours that stands for a failed call."""
    code, text = error.code(), error.details() or ""
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return VerificationError(f"{address} refused: {text}")
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        return StateError(f"{address} refused: {text}")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return ConnectError(f"expected a Foedus port of the same version at {address}, got another service")
    if code == grpc.StatusCode.INTERNAL:
        return ConnectError(f"{address} failed: {text}")
    if "CERTIFICATE_VERIFY_FAILED" in text or "Hostname Verification" in text:
        return ConnectError(
            f"expected {address} to show a certificate of the federation's CA for that name, got another; a proxy that "
            f"opens TLS looks like this too ({text})"
        )
    hint = ""
    if "Socket closed" in text:
        hint = "; if the network is up, the other side may have refused our certificate (its log says why)"
    name = code.name if code is not None else "unknown"
    return TransientError(f"expected an answer from {address}, got {name}: {text}{hint}")


# Serving


def bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    """Open the port and return its number.

    Raises:
        StateError: Another process has it.
    """
    split_address(address)
    try:
        port: int = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise StateError(f"expected {address} to be free, another process listens there; is one running?") from error
    return port


class Watch:
    """One thread that looks at every open transfer twice a second and cancels what stalls or lost its right.

    A handler that waits for a peer's bytes cannot look for itself: gRPC calls block, and a frozen peer raises nothing.
    """

    def __init__(self, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds
        self._lock = threading.Lock()
        self._watched: set[Watched] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, cancel: Callable[[], object], check: Callable[[], None] | None = None) -> Iterator[Watched]:
        """Watch a transfer.

        Args:
            cancel: Ends the call, from any thread.
            check: Raises an error of ours once the peer may no longer go on.
        """
        watched = Watched(cancel, check)
        with self._lock:
            self._watched.add(watched)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="foedus-watch", daemon=True)
                self._thread.start()
        try:
            yield watched
        finally:
            with self._lock:
                self._watched.discard(watched)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(min(_WATCH_SECONDS, self.stall_seconds / 4)):
            with self._lock:
                watched = list(self._watched)
            for one in watched:
                one.look(self.stall_seconds)


class Watched:
    """One transfer under watch; whoever moves bytes calls `progress`."""

    def __init__(self, cancel: Callable[[], object], check: Callable[[], None] | None) -> None:
        self._cancel = cancel
        self._check = check
        self._last = time.monotonic()

    def progress(self) -> None:
        """Some bytes moved."""
        self._last = time.monotonic()

    def look(self, stall_seconds: float) -> None:
        """Cancel where nothing moved for too long, or where the peer's right ended."""
        try:
            if self._check is not None:
                self._check()
        except FoedusError as error:
            log.warning("a transfer is cut off: %s", error)
            self._cancel()
            return
        except Exception:  # The one thread that watches everybody must live; who cannot be judged may not go on.
            log.exception("a transfer is cut off: whether its peer may go on could not be found out")
            self._cancel()
            return
        if time.monotonic() - self._last > stall_seconds:
            log.warning("a transfer is cut off: no byte for %.0f s", stall_seconds)
            self._cancel()
