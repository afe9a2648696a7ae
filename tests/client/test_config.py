"""A client's home: where things lie, and what is missing is said."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from foedus_client.config import HOME_VARIABLE, ClientConfig, Home, find_home
from foedus_protocols.errors import ConfigError, StateError

pytestmark = pytest.mark.unit

CONFIG = ClientConfig(org="ahorn", enrolment="127.0.0.1:1", ca_fingerprint="0" * 64, proxy='http://"odd"\\proxy:1')


def test_the_configuration_is_read_back_as_it_was(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.save(CONFIG)
    assert home.load() == CONFIG
    assert stat.S_IMODE(home.config.stat().st_mode) == 0o600


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(StateError, match="foedus client join"):
        home.load()
    home.save(CONFIG)
    with pytest.raises(StateError, match="approved"):
        home.membership()
    home.config.write_bytes(b'org = "\xfc"')
    with pytest.raises(ConfigError, match="expected a readable"):
        home.load()
    home.config.write_text("org = 3\n")
    with pytest.raises(ConfigError):
        home.load()


def test_the_home_is_closed_to_others(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.make()
    for folder in (home.root, home.keys, home.work, home.files):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_split_key_is_made_once_a_namespace(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.make()
    first = home.split_key("patients of A/B")
    assert len(bytes.fromhex(first)) == 32
    assert home.split_key("patients of A/B") == first
    assert home.split_key("matters") != first
    (path,) = [path for path in home.keys.iterdir() if path.read_text() == first]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("not a key")
    with pytest.raises(ConfigError):
        home.split_key("patients of A/B")


def test_an_option_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "environment"))
    assert find_home(tmp_path / "option").root == tmp_path / "option"
    assert find_home(None).root == tmp_path / "environment"
    monkeypatch.delenv(HOME_VARIABLE)
    monkeypatch.chdir(tmp_path)
    assert find_home(None).root == tmp_path / "foedus-client"
