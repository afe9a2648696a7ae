from __future__ import annotations

import stat
from pathlib import Path

import pytest
from foedus_protocols import identity
from foedus_protocols.errors import ConfigError, StateError, VerificationError
from foedus_protocols.identity import PeerName

CONTEXT = "foedus/charter/1"


def test_a_signature_verifies():
    key = identity.generate_signing_key()
    identity.verify(identity.public_hex(key), CONTEXT, b"terms", identity.sign(key, CONTEXT, b"terms"))


def test_a_signature_binds_context_data_and_key():
    key, other = identity.generate_signing_key(), identity.generate_signing_key()
    public, signature = identity.public_hex(key), identity.sign(key, CONTEXT, b"terms")
    for wrong in (
        (public, "foedus/receipt/1", b"terms", signature),
        (public, CONTEXT, b"term", signature),
        (identity.public_hex(other), CONTEXT, b"terms", signature),
        (public, CONTEXT, b"terms", "00" * 64),
        (public, CONTEXT, b"terms", signature[:-2]),
        (public, CONTEXT, b"terms", "not hexadecimal"),
        (public[:-2], CONTEXT, b"terms", signature),
    ):
        with pytest.raises(VerificationError):
            identity.verify(*wrong)


def test_the_border_between_context_and_data_cannot_be_moved():
    """Without the context's closed alphabet ("a", "\\0b") and ("a\\0", "b") would be the same signed bytes."""
    key = identity.generate_signing_key()
    with pytest.raises(ConfigError):
        identity.sign(key, CONTEXT + "\0x", b"terms")


def test_key_files_are_private_and_come_back(tmp_path: Path):
    key, tls = identity.generate_signing_key(), identity.generate_tls_key()
    identity.save_key(tmp_path / "sign.key", key)
    identity.save_key(tmp_path / "tls.key", tls, password=b"correct horse")
    assert stat.S_IMODE((tmp_path / "sign.key").stat().st_mode) == 0o600
    loaded = identity.load_signing_key(tmp_path / "sign.key")
    assert identity.public_hex(loaded) == identity.public_hex(key)
    assert identity.load_tls_key(tmp_path / "tls.key", password=b"correct horse").public_key() == tls.public_key()
    with pytest.raises(ConfigError):
        identity.load_tls_key(tmp_path / "tls.key", password=b"wrong")
    with pytest.raises(ConfigError):
        identity.load_tls_key(tmp_path / "tls.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int):
    path = tmp_path / "sign.key"
    identity.save_key(path, identity.generate_signing_key())
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        identity.load_signing_key(path)


def test_a_key_is_never_overwritten(tmp_path: Path):
    path = tmp_path / "sign.key"
    identity.save_key(path, identity.generate_signing_key())
    before = path.read_bytes()
    with pytest.raises(StateError):
        identity.save_key(path, identity.generate_signing_key())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_of_the_wrong_kind_is_refused(tmp_path: Path):
    identity.save_key(tmp_path / "sign.key", identity.generate_signing_key())
    identity.save_key(tmp_path / "tls.key", identity.generate_tls_key())
    with pytest.raises(ConfigError, match="P-256"):
        identity.load_tls_key(tmp_path / "sign.key")
    with pytest.raises(ConfigError, match="Ed25519"):
        identity.load_signing_key(tmp_path / "tls.key")
    with pytest.raises(ConfigError):
        identity.load_signing_key(tmp_path / "absent.key")


def test_fingerprints_are_read_as_people_write_them():
    plain = identity.key_fingerprint(identity.public_hex(identity.generate_signing_key()))
    human = identity.human_fingerprint(plain)
    assert len(human.split()) == 16
    for text in (plain, human, plain.upper(), f"SHA256:{plain}", ":".join(plain[i : i + 2] for i in range(0, 64, 2))):
        assert identity.parse_fingerprint(text) == plain
    for text in ("", plain[:-1], plain + "0", "g" * 64):
        with pytest.raises(ConfigError):
            identity.parse_fingerprint(text)


def test_names_are_read_back():
    for name in (PeerName(federation="a.b", org="clinic-1"), PeerName(federation="a.b", org=identity.COORDINATOR)):
        assert PeerName.parse(name.uri) == name


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://league/org/coordinator",  # The coordinator's name is nobody else's.
        "spiffe://league/org/",
        "spiffe://league/org/a/b",
        "spiffe://league/org/A",
        "spiffe://league",
        "spiffe:///org/a",
        "https://league/org/a",
        "",
    ],
)
def test_other_uris_are_no_names(uri: str):
    with pytest.raises(VerificationError):
        PeerName.parse(uri)


def test_reserved_and_malformed_ids_are_refused():
    identity.check_org_id("clinic-1")
    for org in ("coordinator", "", "-a", "Clinic", "a" * 64, "a\n", "a/b"):
        with pytest.raises(ConfigError):
            identity.check_org_id(org)
    for federation in ("", "a/b", "A", "a b", "a\n"):
        with pytest.raises(ConfigError):
            identity.check_federation_name(federation)
