"""Where an organisation's daemon keeps what it has, and how it reaches its coordinator.

HOME/client.toml    who we are, where the coordinator is (written by `foedus client join`)
HOME/policy.toml    what we allow; a person's file
HOME/keys/          TLS key and certificate, signing key, split keys: 0600, never sent
HOME/ledger.db      the privacy ledger: back it up, never restore an older one
HOME/client.db      rounds, messages, decisions
HOME/files/         charters, sums and coded words, named by digest
HOME/work/          shared with the worker; may be deleted while no daemon runs
"""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from foedus_protocols.channel import TlsFiles, split_address
from foedus_protocols.errors import ConfigError, StateError
from foedus_protocols.files import disk_errors, write_durably
from foedus_protocols.messages import OrgId
from foedus_protocols.proxy import choose
from pydantic import BaseModel, ConfigDict, Field

HOME_VARIABLE = "FOEDUS_CLIENT_HOME"
DEFAULT_HOME = "foedus-client"
_SPLIT_KEY_BYTES = 32


class ClientConfig(BaseModel):
    """``client.toml``.

    Attributes:
        enrolment: ``HOST:PORT`` of the coordinator's enrolment port.
        ca_fingerprint: SHA-256 of the federation CA's public key, as a person gave it.
        request_id: Our enrolment request.
        federation: Known once the request is approved, as are the two below.
        operator_key: The operator's public signing key. A home that joins again knows it before.
        link: ``HOST:PORT`` of the coordinator's link port.
        proxy: ``http://[USER:PASSWORD@]HOST:PORT`` to dial through; the environment is asked where there is none
            (`foedus_protocols.proxy`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    org: OrgId
    enrolment: str
    ca_fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    request_id: str | None = None
    federation: str | None = None
    operator_key: str | None = None
    link: str | None = None
    proxy: str | None = None

    def encode(self) -> str:
        """As TOML. (A JSON string is a TOML string.)"""
        values = self.model_dump(exclude_none=True)
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A joined organisation's coordinates: the part of the configuration that is known after approval.

    Attributes:
        proxy: The URL of the proxy to dial the link through, as it was chosen; it may hold a password.
    """

    org: str
    federation: str
    operator_key: str
    link: str
    proxy: str | None = field(repr=False)


@dataclass(frozen=True)
class Home:
    """Paths under one client's home."""

    root: Path

    @property
    def config(self) -> Path:
        """``client.toml``."""
        return self.root / "client.toml"

    @property
    def policy(self) -> Path:
        """``policy.toml``."""
        return self.root / "policy.toml"

    @property
    def keys(self) -> Path:
        """Folder of the key files."""
        return self.root / "keys"

    @property
    def signing_key(self) -> Path:
        """The Ed25519 key that binds the organisation."""
        return self.keys / "signing.key"

    @property
    def tls(self) -> TlsFiles:
        """The TLS identity."""
        return TlsFiles(certificate=self.keys / "tls.pem", key=self.keys / "tls.key", ca=self.keys / "ca.pem")

    @property
    def request(self) -> Path:
        """The certificate request, kept so that the same enrolment can be sent again."""
        return self.keys / "request.pem"

    @property
    def ledger(self) -> Path:
        """The privacy ledger."""
        return self.root / "ledger.db"

    @property
    def state(self) -> Path:
        """The daemon's memory."""
        return self.root / "client.db"

    @property
    def files(self) -> Path:
        """Content-addressed files."""
        return self.root / "files"

    @property
    def work(self) -> Path:
        """Shared with the worker."""
        return self.root / "work"

    @property
    def lock(self) -> Path:
        """Held by the running daemon."""
        return self.root / "daemon.lock"

    @property
    def worker_log(self) -> Path:
        """What the worker's process prints."""
        return self.root / "worker.log"

    def make(self) -> None:
        """Make the folders, readable by their owner alone."""
        with disk_errors(self.root):
            for folder in (self.root, self.keys, self.files, self.work):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def load(self) -> ClientConfig:
        """Read ``client.toml``.

        Raises:
            StateError: There is none: nobody has joined from here.
            ConfigError: It is malformed.
            DiskTrouble: It cannot be read.
        """
        try:
            with disk_errors(self.config):
                text = self.config.read_text(encoding="utf-8")
            return ClientConfig.model_validate(tomllib.loads(text))
        except FileNotFoundError as error:
            raise StateError(
                f"expected an organisation's home in {self.root}, found no client.toml; "
                "run `foedus client join` first, or name the home with --home"
            ) from error
        except (ValueError, RecursionError, OSError) as error:  # Not UTF-8, not TOML, or another shape.
            raise ConfigError(f"expected a readable client.toml in {self.root}, got: {type(error).__name__}") from error

    def save(self, config: ClientConfig) -> None:
        """Write ``client.toml`` atomically."""
        write_durably(self.config, config.encode().encode(), mode=0o600)

    def membership(self) -> Membership:
        """The coordinates of a joined organisation.

        Raises:
            StateError: Not joined, or not approved yet.
            ConfigError: The link's address or the proxy is malformed.
        """
        config = self.load()
        if config.federation is None or config.operator_key is None or config.link is None:
            raise StateError(
                f"expected {config.org} to be approved, its request still waits; "
                "run `foedus client join` again after the coordinator's administrator approved it"
            )
        proxy = choose(config.proxy, split_address(config.link)[0])
        return Membership(
            org=config.org,
            federation=config.federation,
            operator_key=config.operator_key,
            link=config.link,
            proxy=None if proxy is None else proxy.url,
        )

    def split_key(self, namespace: str) -> str:
        """The namespace's key that decides which units are held out: made once, kept here, in hexadecimal.

        Raises:
            ConfigError: The file holds something else.
        """
        path = self.keys / f"split-{namespace.encode().hex()}.key"
        if not path.exists():
            write_durably(path, secrets.token_hex(_SPLIT_KEY_BYTES).encode(), mode=0o600, overwrite=False)
        text = path.read_text().strip()
        try:
            key = bytes.fromhex(text)
        except ValueError:
            key = b""
        if len(key) < _SPLIT_KEY_BYTES:
            raise ConfigError(f"expected {_SPLIT_KEY_BYTES} bytes in hexadecimal in {path}, got something else")
        return text


def find_home(option: Path | None) -> Home:
    """The home that an option, the environment or the default names."""
    return Home((option or Path(os.environ.get(HOME_VARIABLE, DEFAULT_HOME))).expanduser().absolute())
