"""The commands, and the ports behind `up` over real TLS."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_coordinator.cli import app
from foedus_coordinator.config import Home
from foedus_coordinator.executor import serve
from foedus_protocols.certificates import make_request
from foedus_protocols.channel import TlsFiles
from foedus_protocols.charter import Charter
from foedus_protocols.charter_draft import read_draft
from foedus_protocols.enrolment import EnrolmentClient, EnrolmentRequest
from foedus_protocols.envelope import open_envelope
from foedus_protocols.errors import CheckpointError, ConfigError, StateError, UsageError, VerificationError
from foedus_protocols.identity import generate_signing_key, generate_tls_key, key_fingerprint, public_hex, save_key
from foedus_protocols.link import LinkClient
from foedus_protocols.manifest import write_manifest
from foedus_protocols.messages import CharterOffer
from foedus_protocols.store import FileStore
from safetensors.numpy import save_file
from typer.testing import CliRunner

CHARTER = """
name = "first-run"
purpose = "tests"
domain = "none"
seed = 1
[[participants]]
id = "alpha"
unit = "record"
units_at_most = 64
[[participants]]
id = "beta"
unit = "record"
units_at_most = 64
[adapter]
rank = 2
[privacy]
mode = "none"
rounds = 1
[schedule]
round_seconds = 5.0
"""


def call(*arguments: str | Path, home: Path) -> dict[str, Any]:
    """Run a command in this process and read its last line."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--home", str(home), "--format", "json"])
    if result.exception is not None:
        raise result.exception
    value: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return value


@pytest.fixture
def home(tmp_path: Path) -> Path:
    call("init", "--federation", "test", "--address", "127.0.0.1", "--link-port", "0", "--enrolment-port", "0",
         home=tmp_path / "home")  # fmt: skip
    return tmp_path / "home"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base as far as a coordinator looks: configuration, weights and manifest."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"num_hidden_layers": 1, "hidden_size": 32, "head_dim": 16, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    save_file({"weight": np.zeros(4, dtype=np.float32)}, folder / "model.safetensors")
    write_manifest(folder, provenance={})
    return folder


@contextmanager
def serving(home: Path) -> Iterator[tuple[str, str]]:
    """`up` in a thread; gives the addresses of link and enrolment."""
    stop, lines = threading.Event(), []
    thread = threading.Thread(target=serve, args=(Home(home),), kwargs={"stop": stop, "say": lines.append})
    thread.start()
    deadline = time.monotonic() + 30
    while not lines:
        assert time.monotonic() < deadline
        assert thread.is_alive()
        time.sleep(0.01)
    words = lines[0].replace(",", "").split()
    try:
        yield words[words.index("link") + 1], words[words.index("enrolment") + 1]
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


class Joiner:
    """An organisation that enrols over the wire and dials the link."""

    def __init__(self, org: str, folder: Path) -> None:
        self.org, self.folder = org, folder
        folder.mkdir()
        self.tls_key, self.signing_key = generate_tls_key(), generate_signing_key()
        save_key(folder / "tls.pem", self.tls_key)

    @property
    def fingerprint(self) -> str:
        return key_fingerprint(public_hex(self.signing_key))

    def enrol(self, address: str, ca_fingerprint: str, token: str) -> str:
        with EnrolmentClient(address, ca_fingerprint) as client:
            request = EnrolmentRequest.make(
                org=self.org, token=token, csr_pem=make_request(self.tls_key, self.org), signing_key=self.signing_key
            )
            status = client.enrol(request)
            assert status.state == "pending"
            assert status.fingerprint == self.fingerprint
            return status.request_id

    def collect(self, address: str, ca_fingerprint: str, request_id: str) -> LinkClient:
        with EnrolmentClient(address, ca_fingerprint) as client:
            status = client.collect(request_id, self.signing_key)
        status.check_approved(org=self.org, tls_key=self.tls_key, ca_fingerprint=ca_fingerprint)
        (self.folder / "tls.crt").write_bytes(status.certificate_pem)
        (self.folder / "ca.crt").write_bytes(status.ca_pem)
        tls = TlsFiles(certificate=self.folder / "tls.crt", key=self.folder / "tls.pem", ca=self.folder / "ca.crt")
        return LinkClient(status.link_address, tls)


def test_from_init_to_an_offered_charter(home: Path, base: Path, tmp_path: Path) -> None:
    """Invite, join, approve and start a run while `up` serves; the offer arrives at both organisations."""
    joiners = [Joiner(org, tmp_path / org) for org in ("alpha", "beta")]
    clients = []
    with serving(home) as (link, enrolment):
        for joiner in joiners:
            invited = call("invite", joiner.org, home=home)
            request = joiner.enrol(enrolment, invited["ca_fingerprint"], invited["token"])
            waiting = call("status", home=home)["requests"]
            assert [(one["org"], one["fingerprint"]) for one in waiting] == [(joiner.org, joiner.fingerprint)]
            call("approve", joiner.org, "--fingerprint", joiner.fingerprint, "--yes", home=home)
            clients.append(joiner.collect(enrolment, invited["ca_fingerprint"], request))
        assert clients[0].address == link
        (tmp_path / "charter.toml").write_text(CHARTER)
        started = call("run", "start", tmp_path / "charter.toml", "--base", base, home=home)
        for joiner, client in zip(joiners, clients, strict=True):
            said = client.hello({"protocol": 1, "org": joiner.org})
            assert (said["org"], said["roster_version"]) == (joiner.org, 2)
            data = client.poll(20.0)
            assert data is not None
            opened = open_envelope(
                data, public_key=said["operator_key"], sender="coordinator", receiver=joiner.org, federation="test"
            )
            assert opened.header.run == started["run"]
            offer = CharterOffer.decode(opened.body)
            assert offer.charter_digest == started["charter"]
            store = FileStore(joiner.folder / "files")
            assert Charter.parse(client.pull(offer.charter_digest, store).read_bytes()).digest == started["charter"]
        assert call("status", home=home)["running"] is True
        with pytest.raises(StateError, match="another process does"):
            serve(Home(home), stop=threading.Event(), say=lambda line: None)
        for client in clients:
            client.close()
    detail = call("run", "show", started["run"], home=home)
    assert detail["state"] == "agreeing"
    assert detail["answers"] == {"alpha": "waiting", "beta": "waiting"}
    assert [one["run"] for one in call("run", "list", home=home)["runs"]] == [started["run"]]


def test_a_second_init_is_refused(home: Path) -> None:
    with pytest.raises(StateError, match="empty or absent"):
        call("init", "--federation", "test", "--address", "127.0.0.1", home=home)


def test_a_token_can_go_to_a_file_of_its_owner(home: Path, tmp_path: Path) -> None:
    said = call("invite", "alpha", "--token-file", tmp_path / "token", home=home)
    assert "token" not in said
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StateError, match="move it away"):
        call("invite", "alpha", "--token-file", tmp_path / "token", home=home)


def pending(home: Path, org: str) -> str:
    key = public_hex(generate_signing_key())
    opened = Home(home)
    opened.members.request(
        org, opened.members.invite(org), csr_pem=make_request(generate_tls_key(), org), signing_key=key
    )
    opened.storage.close()
    return key_fingerprint(key)


def test_approving_needs_the_right_fingerprint_and_an_answer(home: Path) -> None:
    with pytest.raises(StateError, match="there is none"):
        call("approve", "alpha", "--yes", home=home)
    pending(home, "alpha")
    with pytest.raises(VerificationError, match="somebody else may have used the token"):
        call("approve", "alpha", "--fingerprint", "0" * 64, "--yes", home=home)
    with pytest.raises(UsageError, match="--yes"):
        call("approve", "alpha", home=home)
    assert call("status", home=home)["members"] == []


def test_a_run_needs_members_a_base_and_a_new_charter(home: Path, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "charter.toml"
    path.write_text(CHARTER)
    with pytest.raises(ConfigError, match="alpha"):
        call("run", "start", path, "--base", base, home=home)
    for org in ("alpha", "beta"):
        pending(home, org)
        call("approve", org, "--yes", home=home)
    path.write_text(CHARTER + "colour = 3")
    with pytest.raises(ConfigError, match="colour"):
        call("run", "start", path, "--base", base, home=home)
    path.write_text(CHARTER)
    (base / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated"):
        call("run", "start", path, "--base", base, home=home)
    assert call("run", "list", home=home)["runs"] == []
    with pytest.raises(StateError, match="none named 'other'"):
        call("run", "show", "other", home=home)


def test_text_output_is_for_people(home: Path) -> None:
    result = CliRunner().invoke(app, ["status", "--home", str(home)])
    assert result.exit_code == 0
    assert "not running" in result.stdout
    assert "The coordinator sees each organisation's noised vector" in result.stdout


def test_the_template_is_a_charter_that_can_be_read(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["run", "template"])
    assert said.exit_code == 0
    path = tmp_path / "charter.toml"
    path.write_text(said.stdout, encoding="utf-8")
    assert [one["id"] for one in read_draft(path)["participants"]] == ["hospital-a", "hospital-b"]
    assert json.loads(CliRunner().invoke(app, ["run", "template", "--format", "json"]).stdout)["toml"] == said.stdout
