"""The home folder: made whole, locked by one process, settings checked, certificate renewed."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from foedus_coordinator import config as config_module
from foedus_coordinator.config import Config, Home, at, default_listen
from foedus_protocols.errors import ConfigError, StateError

SETTINGS = Config(federation="test", address="127.0.0.1", link_port=1, enrolment_port=2, listen="127.0.0.1")


def test_keys_are_for_their_owner_alone(federation: Any) -> None:
    for name in ("operator", "ca", "tls"):
        assert stat.S_IMODE(federation.home.key_path(name).stat().st_mode) == 0o600
    assert stat.S_IMODE((federation.root / "keys").stat().st_mode) == 0o700


def test_the_home_is_closed_to_others(tmp_path: Path) -> None:
    """The settings may hold a database's password, the database what organisations said."""
    assert stat.S_IMODE(Home.create(tmp_path / "home", SETTINGS).root.stat().st_mode) == 0o700


def test_settings_in_another_encoding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_bytes(b'federation = "\xfc"')
    with pytest.raises(ConfigError, match="UTF-8"):
        _ = Home(tmp_path).config


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert (at("::1", 7443), at("127.0.0.1", 7443)) == ("[::1]:7443", "127.0.0.1:7443")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("mine")
    with pytest.raises(StateError, match="empty or absent"):
        Home.create(tmp_path, SETTINGS)
    assert os.listdir(tmp_path) == ["letter"]


def test_a_creation_that_broke_off_leaves_nothing_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Home, "renew_certificate", full)
    with pytest.raises(OSError, match="disk full"):
        Home.create(tmp_path / "home", SETTINGS)
    assert not (tmp_path / "home").exists()
    monkeypatch.undo()
    assert Home.create(tmp_path / "home", SETTINGS).config == SETTINGS


def test_no_coordinator_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="foedus coordinator init"):
        _ = Home(tmp_path).config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('federation = "test"\nfederation = 2', "expected TOML"),
        ('link_port = "1"', "wrong types: link_port"),
        ("colour = 3", "unknown settings or wrong types: colour"),
        ("link_port = true", "wrong types: link_port"),
        ("link_port = 70000", "link_port from 0 to 65535"),
        ("slots = 0", "at least one slot"),
        ('federation = "With Space"', "federation name"),
    ],
)
def test_settings_are_checked(change: str, said: str) -> None:
    lines = {
        "federation": 'federation = "test"',
        "address": 'address = "a"',
        "link_port": "link_port = 1",
        "enrolment_port": "enrolment_port = 2",
        "listen": 'listen = "a"',
    }
    lines[change.split(" ")[0]] = change
    with pytest.raises(ConfigError, match=said):
        Config.parse("\n".join(lines.values()), Path("coordinator.toml"))


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="missing: address"):
        Config.parse('federation="a"\nlink_port=1\nenrolment_port=2\nlisten="a"', Path("c.toml"))


def test_one_process_at_a_time(federation: Any) -> None:
    assert not federation.home.is_locked()
    with federation.home.locked():
        assert federation.home.is_locked()
        with pytest.raises(StateError, match="another process does"), federation.home.locked():
            pass
    assert not federation.home.is_locked()


def test_the_certificate_is_renewed_at_half_life(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = federation.root / "coordinator.crt"
    before = path.read_bytes()
    assert federation.home.renew_certificate() is False
    assert path.read_bytes() == before

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(UTC) + timedelta(days=16)

    monkeypatch.setattr(config_module, "datetime", Later)
    assert federation.home.renew_certificate() is True
    assert path.read_bytes() != before


def test_loopback_stays_loopback() -> None:
    assert default_listen("127.0.0.1") == "127.0.0.1"
    assert default_listen("localhost") == "127.0.0.1"
    assert default_listen("coordinator.example") == "0.0.0.0"
    assert default_listen("192.0.2.1") == "0.0.0.0"
