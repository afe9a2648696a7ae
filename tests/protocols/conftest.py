"""A small federation on the disk: a CA, a coordinator's certificate, and organisations."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols import identity
from foedus_protocols.certificates import CertificateAuthority, make_request
from foedus_protocols.channel import TlsFiles

FEDERATION = "test-league"


@dataclass
class Federation:
    """Keys and certificate files under one folder; the coordinator is 127.0.0.1."""

    folder: Path
    name: str = FEDERATION
    ca: CertificateAuthority = field(default_factory=lambda: CertificateAuthority.create(FEDERATION))
    operator: Ed25519PrivateKey = field(default_factory=identity.generate_signing_key)
    signing: dict[str, Ed25519PrivateKey] = field(default_factory=dict)

    def coordinator_tls(self, name: str = "coordinator") -> TlsFiles:
        files = self._files(name)
        key = identity.generate_tls_key()
        identity.save_key(files.key, key)
        files.certificate.write_bytes(
            self.ca.issue_server_certificate(key.public_key(), federation=self.name, hosts=["127.0.0.1", "localhost"])
        )
        return files

    def org_tls(
        self, org: str, *, name: str | None = None, ca: CertificateAuthority | None = None, age_days: float = 0
    ) -> TlsFiles:
        """An organisation's files; `ca` signs instead of ours, and `age_days` ago."""
        files = self._files(name or org)
        key = identity.generate_tls_key()
        identity.save_key(files.key, key)
        request = make_request(key, org)
        now = datetime.now(UTC) - timedelta(days=age_days)
        pem = (ca or self.ca).issue_certificate(request, org=org, federation=self.name, days=7, now=now)
        files.certificate.write_bytes(pem)
        self.signing.setdefault(org, identity.generate_signing_key())
        return files

    def _files(self, name: str) -> TlsFiles:
        folder = self.folder / name
        folder.mkdir()
        ca = folder / "ca.pem"
        ca.write_bytes(self.ca.pem)
        return TlsFiles(certificate=folder / "tls.pem", key=folder / "tls.key", ca=ca)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    folder = tmp_path / "federation"
    folder.mkdir()
    return Federation(folder)
