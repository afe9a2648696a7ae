"""A coordinator's home: one folder with its settings, keys, database and files.

coordinator.toml    the settings below
keys/               operator.pem (Ed25519), ca.pem and tls.pem (P-256), each readable by the owner alone
ca.crt              the federation's certificate authority, which organisations pin by fingerprint (`authorities.py`)
coordinator.crt     the certificate of both ports, with the CA's behind it
coordinator.db      everything that has to survive (`storage.py`), unless `database` names another
files/  vectors/    what organisations pull, and what they pushed (`foedus_protocols.store`)
variants/           the results
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols.certificates import CertificateAuthority, half_life, parse_certificate, parse_certificates
from foedus_protocols.channel import TlsFiles
from foedus_protocols.errors import ConfigError, StateError
from foedus_protocols.files import write_durably
from foedus_protocols.identity import (
    check_federation_name,
    generate_signing_key,
    generate_tls_key,
    load_signing_key,
    load_tls_key,
    save_key,
    spki_fingerprint,
)
from foedus_protocols.store import FileStore

from foedus_coordinator.authorities import Authorities
from foedus_coordinator.mailbox import Mailbox
from foedus_coordinator.members import Members
from foedus_coordinator.storage import Storage, open_storage

HOME_VARIABLE = "FOEDUS_COORDINATOR_HOME"
DEFAULT_HOME = Path("foedus-coordinator")
_PATIENCE_SECONDS = 1.0
_TEMPLATE = """\
# Settings of a Foedus coordinator. `foedus coordinator up` reads them at its start.

# The federation's name; it stands in every certificate and message and cannot change.
federation = "{federation}"

# Where organisations dial: a DNS name or IP address, which is also what the certificate says.
address = "{address}"
link_port = {link_port}
enrolment_port = {enrolment_port}

# The local address that the ports are opened on.
listen = "{listen}"

# Large transfers at a time. Memory grows with slots, not with organisations.
slots = 2

# A SQLAlchemy URL; empty means coordinator.db in this folder.
database = ""
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings in ``coordinator.toml``, which explains them."""

    federation: str
    address: str
    link_port: int
    enrolment_port: int
    listen: str
    slots: int = 2
    database: str = ""

    def __post_init__(self) -> None:
        check_federation_name(self.federation)
        for name in ("link_port", "enrolment_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"expected {name} from 0 to 65535, got {getattr(self, name)}")
        if not self.address or self.slots < 1:
            raise ConfigError(f"expected an address and at least one slot, got {self.address!r} and {self.slots}")

    @classmethod
    def parse(cls, text: str, source: Path) -> Self:
        """Read settings.

        Raises:
            ConfigError: Not TOML, or a setting that is unknown, missing, of another type or out of range.
        """
        try:
            values = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{source}: expected TOML, got: {error}") from error
        types = {item.name: int if item.type == "int" else str for item in fields(cls)}
        wrong = [name for name, value in values.items() if type(value) is not types.get(name)]
        missing = [name for name in types if name not in values and name not in ("slots", "database")]
        if wrong or missing:
            raise ConfigError(
                f"{source}: unknown settings or wrong types: {', '.join(wrong) or 'none'}; "
                f"missing: {', '.join(missing) or 'none'}"
            )
        return cls(**values)


@dataclass(frozen=True)
class Home:
    """One coordinator's folder. Properties open what they name at first use."""

    root: Path

    @classmethod
    def create(cls, root: Path, config: Config) -> Self:
        """Make the folder, the keys, the CA, both certificates and the empty roster.

        Raises:
            StateError: The folder holds something already.
        """
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise StateError(f"expected an empty or absent folder, {root} is not; choose another with --home")
        # Built beside its place and renamed, so that a home is whole or not there.
        part = root.with_name(root.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, mode=0o700)  # The settings may hold a database's password.
        (part / "keys").mkdir(mode=0o700)
        values = {item.name: getattr(config, item.name) for item in fields(config)}
        write_durably(part / "coordinator.toml", _TEMPLATE.format(**values).encode())
        home = cls(part)
        save_key(home.key_path("operator"), generate_signing_key())
        save_key(home.key_path("tls"), generate_tls_key())
        home.authorities.found(config.federation)
        home.members.found(config.federation, home.operator_key)
        home.renew_certificate()
        home.storage.close()
        part.rename(root)
        return cls(root)

    @cached_property
    def config(self) -> Config:
        """The settings.

        Raises:
            ConfigError: There is no coordinator here, or its settings are malformed.
        """
        path = self.root / "coordinator.toml"
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: expected text in UTF-8, got other bytes; save it as UTF-8") from error
        except OSError as error:
            raise ConfigError(
                f"expected a coordinator in {self.root}, got: {error.strerror}; make one with "
                f"`foedus coordinator init`, or name its folder with --home or {HOME_VARIABLE}"
            ) from error
        return Config.parse(text, path)

    @cached_property
    def storage(self) -> Storage:
        """The database, brought up to date."""
        return open_storage(self.config.database or f"sqlite:///{self.root / 'coordinator.db'}")

    @cached_property
    def files(self) -> FileStore:
        """What organisations may pull."""
        return FileStore(self.root / "files")

    @cached_property
    def vectors(self) -> FileStore:
        """What organisations pushed; nobody pulls from it."""
        return FileStore(self.root / "vectors")

    @cached_property
    def mailbox(self) -> Mailbox:
        """Control messages."""
        return Mailbox(self.storage)

    @cached_property
    def members(self) -> Members:
        """Tokens, requests, rosters."""
        return Members(self.storage, self.files)

    @cached_property
    def operator_key(self) -> Ed25519PrivateKey:
        """What signs charters, rosters, messages, receipts and manifests."""
        return load_signing_key(self.key_path("operator"))

    @property
    def authorities(self) -> Authorities:
        """The federation's CAs."""
        return Authorities(self.root)

    @property
    def authority(self) -> CertificateAuthority:
        """The CA that signs members' certificates: the newest."""
        return self.authorities.newest()

    @property
    def shown_ca(self) -> str:
        """The fingerprint of the CA under which the ports show their certificate: what a joining organisation pins.

        It stands behind the ports' own certificate in the same file.
        """
        return spki_fingerprint(parse_certificates(self.tls.certificate.read_bytes())[-1])

    @property
    def tls(self) -> TlsFiles:
        """The files behind both ports."""
        return TlsFiles(certificate=self.root / "coordinator.crt", key=self.key_path("tls"), ca=self.root / "ca.crt")

    def key_path(self, name: str) -> Path:
        """Where a private key lies."""
        return self.root / "keys" / f"{name}.pem"

    def renew_certificate(self, *, now: datetime | None = None) -> bool:
        """Issue the ports' certificate anew once half of its life is over, or once a newer CA is to sign it.

        A newer CA takes over when every member has said that it trusts it: one that does not could no longer connect.
        It is never given back to an older one. Cheap enough to be asked every few seconds.

        Args:
            now: The moment to judge by and to issue at; the present where absent.

        Returns:
            Whether a certificate was issued. The ports show it to the next connection; open ones go on.
        """
        authorities = self.authorities.all()
        signers = [one for one in authorities if not self.who_distrusts(one.fingerprint)]
        signer = signers[-1] if signers else authorities[0]
        if self.tls.certificate.exists():
            shown = self.shown_ca
            position = next((at for at, one in enumerate(authorities) if one.fingerprint == shown), -1)
            if position >= authorities.index(signer):
                due = half_life(parse_certificate(self.tls.certificate.read_bytes()))
                if (now or datetime.now(UTC)) < due:
                    return False
                signer = authorities[position]
        self.show_under(signer, now=now)
        return True

    def show_under(self, signer: CertificateAuthority, *, now: datetime | None = None) -> None:
        """Issue the ports' certificate by one of the CAs."""
        key = load_tls_key(self.key_path("tls"))
        chain = signer.issue_server_certificate(
            key.public_key(), federation=self.config.federation, hosts=[self.config.address], now=now
        )
        write_durably(self.tls.certificate, chain)

    def who_distrusts(self, fingerprint: str) -> list[str]:
        """Members that have not said in hello that they trust the CA with this fingerprint."""
        said = self.members.introductions()
        return sorted(org for org, one in said.items() if one is None or fingerprint not in one.trusts)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the home: one coordinator at a time serves from it.

        Raises:
            StateError: Another process does.
        """
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # Whoever only looks (`is_locked`) is gone in a moment, and must not keep a coordinator from starting.
            patient_until = time.monotonic() + _PATIENCE_SECONDS
            while not _try_lock(descriptor, fcntl.LOCK_EX):
                if time.monotonic() > patient_until:
                    raise StateError(f"expected no coordinator to run in {self.root}, another process does")
                time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        """Whether a coordinator serves from this home."""
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            return not _try_lock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def at(host: str, port: int) -> str:
    """``HOST:PORT`` as it is dialled and bound; an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def default_listen(address: str) -> str:
    """Loopback stays loopback; everything else listens on all interfaces."""
    if address == "localhost":
        return "127.0.0.1"
    try:
        parsed: Any = ip_address(address)
    except ValueError:
        # A DNS name says nothing about local interfaces; the setting is in the file.
        return "0.0.0.0"  # nosec B104
    return address if parsed.is_loopback else "0.0.0.0"  # nosec B104
