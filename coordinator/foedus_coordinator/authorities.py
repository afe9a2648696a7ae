"""The federation's CAs on the coordinator's disk: one, or two while the newer takes the other's place.

    ca.crt              the certificates of all trusted CAs, oldest first: what both ports and every organisation trust
    keys/ca.pem         the first CA's key
    keys/ca-XXXX.pem    a later CA's key, named by its fingerprint

`rotate` adds a CA. From then on it signs every new certificate of a member, and each hello tells members of it. The
ports' own certificate follows once every member trusts the new CA (`Home.renew_certificate`): before that, a member
that has not heard of it could no longer connect. `retire` drops the older ones. Every step is one atomic replacement of
a file, and a kill between two of them leaves a home that works.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509
from foedus_protocols.authorities import MAX_AUTHORITIES, bundle_pem
from foedus_protocols.certificates import CertificateAuthority, parse_certificates
from foedus_protocols.errors import StateError
from foedus_protocols.files import write_durably
from foedus_protocols.identity import load_tls_key, save_key, spki_fingerprint

_SHORT = 16


class Authorities:
    """The CAs of one home. Everything is read from the disk each time: the command line changes it beside a service."""

    def __init__(self, root: Path) -> None:
        self.bundle = root / "ca.crt"
        self._keys = root / "keys"

    def trusted(self) -> list[x509.Certificate]:
        """The CAs' certificates, oldest first."""
        return parse_certificates(self.bundle.read_bytes())

    def all(self) -> list[CertificateAuthority]:
        """The CAs with their keys, oldest first.

        Raises:
            ConfigError: A key is missing, or not readable by its owner alone.
        """
        return [self._with_key(certificate) for certificate in self.trusted()]

    def newest(self) -> CertificateAuthority:
        """The one that signs members' certificates; raises as `all` does."""
        return self._with_key(self.trusted()[-1])

    def found(self, federation: str) -> CertificateAuthority:
        """Make the first CA of a new home."""
        made = CertificateAuthority.create(federation)
        made.save(self.bundle, self._keys / "ca.pem")
        return made

    def rotate(self, federation: str, *, now: datetime | None = None) -> CertificateAuthority:
        """Make another CA, trusted beside those that there are.

        Raises:
            StateError: An older one was not retired yet, or the clock stands before the present CA was made: members
                tell by their dates which CA is the later one.
        """
        trusted = self.trusted()
        if len(trusted) > 1:
            raise StateError(
                f"expected one CA, there are {len(trusted)}: a rotation is going on; end it with "
                "`foedus coordinator authority retire`"
            )
        made = CertificateAuthority.create(federation, now=now)
        if made.certificate.not_valid_before_utc < trusted[-1].not_valid_before_utc:
            raise StateError("expected a CA that is later than the one it follows, this clock is behind: set it first")
        save_key(self._later_key_path(made.certificate), made.key)
        self._write([*trusted, made.certificate])
        return made

    def retire(self) -> list[str]:
        """Trust the newest CA alone, and erase the others' keys: what nobody trusts is only there to be stolen.

        Returns:
            The fingerprints of those that were dropped.

        Raises:
            StateError: There is one CA only.
        """
        *older, newest = self.trusted()
        if not older:
            raise StateError("expected a rotation that is going on, there is one CA only; see `authority rotate`")
        keys = [self._key_path(certificate) for certificate in older]
        self._write([newest])
        for path in keys:
            path.unlink(missing_ok=True)
        return [spki_fingerprint(certificate) for certificate in older]

    def _with_key(self, certificate: x509.Certificate) -> CertificateAuthority:
        return CertificateAuthority(certificate=certificate, key=load_tls_key(self._key_path(certificate)))

    def _write(self, trusted: Sequence[x509.Certificate]) -> None:
        if len(trusted) > MAX_AUTHORITIES:
            raise StateError(f"expected at most {MAX_AUTHORITIES} CAs, got {len(trusted)}")
        write_durably(self.bundle, bundle_pem(trusted))

    def _key_path(self, certificate: x509.Certificate) -> Path:
        later = self._later_key_path(certificate)
        return later if later.exists() else self._keys / "ca.pem"

    def _later_key_path(self, certificate: x509.Certificate) -> Path:
        return self._keys / f"ca-{spki_fingerprint(certificate)[:_SHORT]}.pem"
