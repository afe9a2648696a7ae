"""``foedus client`` as a program calls it, against real enrolment and link ports on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from foedus_client import policy
from foedus_client.cli import app
from foedus_client.config import Home
from foedus_client.lock import HomeLock
from foedus_client.state import ClientState
from foedus_protocols.certificates import CertificateAuthority
from foedus_protocols.channel import TlsFiles
from foedus_protocols.enrolment import EnrolmentRequest, EnrolmentStatus, check_collect, serve_enrolment
from foedus_protocols.errors import CheckpointError, ConfigError, DataError, StateError, UsageError, VerificationError
from foedus_protocols.identity import (
    generate_signing_key,
    generate_tls_key,
    key_fingerprint,
    load_signing_key,
    public_hex,
    save_key,
)
from foedus_protocols.link import serve_link
from foedus_protocols.roster import Roster, SignedRoster
from foedus_protocols.store import FileStore, Part
from typer.testing import CliRunner

pytestmark = pytest.mark.unit

FEDERATION, TOKEN = "north", "one-time-token"


class Office:
    """Both ports of a coordinator that approves when the test says so."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.operator = generate_signing_key()
        self.ca = CertificateAuthority.create(FEDERATION)
        self.files = FileStore(folder / "files")
        self.roster = Roster.genesis(FEDERATION)
        self.files.put_bytes(self.roster.canonical())
        self.requests: dict[str, EnrolmentRequest] = {}
        self.approved = False
        key = generate_tls_key()
        tls = TlsFiles(certificate=folder / "tls.pem", key=folder / "tls.key", ca=folder / "ca.pem")
        save_key(tls.key, key)
        tls.ca.write_bytes(self.ca.pem)
        tls.certificate.write_bytes(
            self.ca.issue_server_certificate(key.public_key(), federation=FEDERATION, hosts=["127.0.0.1"])
        )
        self.enrolment = serve_enrolment("127.0.0.1:0", self, tls)
        self.link = serve_link("127.0.0.1:0", self, tls)

    def add(self, org: str, public: str) -> None:
        """A new member."""
        self.roster = self.roster.add(org, public, since=1)
        self.files.put_bytes(self.roster.canonical())

    # Enrolment

    def enrol(self, request: EnrolmentRequest) -> EnrolmentStatus:
        if request.token != TOKEN:
            raise VerificationError("expected a fresh token, got another")
        self.requests["r1"] = request
        return self._status()

    def collect(self, request_id: str, proof: str) -> EnrolmentStatus:
        check_collect(self.requests[request_id].signing_key, request_id, proof)
        return self._status()

    def _status(self) -> EnrolmentStatus:
        request = self.requests["r1"]
        fingerprint = key_fingerprint(request.signing_key)
        if not self.approved:
            return EnrolmentStatus(state="pending", request_id="r1", fingerprint=fingerprint)
        return EnrolmentStatus(
            state="approved",
            request_id="r1",
            fingerprint=fingerprint,
            certificate_pem=self.ca.issue_certificate(request.csr_pem, org=request.org, federation=FEDERATION),
            ca_pem=self.ca.pem,
            federation=FEDERATION,
            operator_key=public_hex(self.operator),
            link_address=f"127.0.0.1:{self.link.port}",
        )

    # Link

    def check_member(self, org: str, leaf_serial: str) -> None:
        self.roster.member(org)

    def hello(self, org: str, body: dict[str, Any], leaf_serial: str) -> dict[str, Any]:
        signed = SignedRoster.make(self.operator, self.roster)
        return {
            "protocol": 1,
            "federation": FEDERATION,
            "org": org,
            "operator_key": public_hex(self.operator),
            "roster_digest": self.roster.digest,
            "roster_version": self.roster.version,
            "roster_signature": signed.signature,
            "server_time": 1.0,
        }

    def path_of(self, org: str, digest: str) -> Path:
        return self.files.path(digest)

    def poll(self, org: str, wait_seconds: float) -> bytes | None:
        raise VerificationError("nobody polls here")

    def deliver(self, org: str, envelope: bytes) -> None:
        raise VerificationError("nobody delivers here")

    def granted(self, org: str, digest: str, size: int, context: dict[str, Any]) -> Part:
        raise VerificationError("nobody pushes here")

    def received(self, org: str, digest: str, size: int, context: dict[str, Any]) -> bytes:
        raise VerificationError("nobody pushes here")


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    ports = Office(tmp_path / "office")
    yield ports
    ports.enrolment.stop()
    ports.link.stop(0.0)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def call(home: Home, *arguments: str | Path, stdin: str = "") -> dict[str, Any]:
    """Run a command in this process and read the object in its last line."""
    line = [*map(str, arguments), "--home", str(home.root), "--format", "json"]
    result = CliRunner().invoke(app, line, input=stdin)
    if result.exception is not None:
        raise result.exception
    value: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return value


def join(office: Office, home: Home, *more: str, token: str = TOKEN) -> dict[str, Any]:
    address = f"127.0.0.1:{office.enrolment.port}"
    line = ("join", "--coordinator", address, "--org", "ahorn", "--ca-fingerprint", office.ca.fingerprint)
    return call(home, *line, "--token-stdin", "--no-wait", *more, stdin=token + "\n")


@pytest.fixture
def joined(office: Office, home: Home) -> Home:
    """A home after approval, in a federation of two."""
    join(office, home)
    office.approved = True
    call(home, "join")
    office.add("ahorn", public_hex(load_signing_key(home.signing_key)))
    office.add("birke", public_hex(generate_signing_key()))
    return home


def test_join_waits_for_approval_and_goes_on_without_a_token(office: Office, home: Home) -> None:
    first = join(office, home)
    assert (first["state"], first["federation"]) == ("pending", None)
    assert first["fingerprint"] == key_fingerprint(public_hex(load_signing_key(home.signing_key)))
    assert call(home, "join", "--no-wait")["state"] == "pending"
    office.approved = True
    last = call(home, "join")
    assert (last["state"], last["fingerprint"], last["federation"]) == ("joined", first["fingerprint"], FEDERATION)
    assert policy.load(home.policy).coordinators == [public_hex(office.operator)]
    assert call(home, "join")["state"] == "joined"


def test_the_token_is_nowhere_in_the_home(office: Office, home: Home) -> None:
    join(office, home)
    for path in home.root.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_an_interrupted_join_presents_the_same_keys_and_request(office: Office, home: Home) -> None:
    with pytest.raises(VerificationError, match="token"):
        join(office, home, token="another")
    before = {path.name: path.read_bytes() for path in home.keys.iterdir()}
    join(office, home)
    assert {path.name: path.read_bytes() for path in home.keys.iterdir()} == before
    assert office.requests["r1"].csr_pem == before["request.pem"]


def test_a_wrong_pin_sends_nothing(office: Office, home: Home) -> None:
    other = CertificateAuthority.create(FEDERATION).fingerprint
    address = f"127.0.0.1:{office.enrolment.port}"
    line = ("join", "--coordinator", address, "--org", "ahorn", "--ca-fingerprint", other, "--token-stdin")
    with pytest.raises(VerificationError, match="fingerprint"):
        call(home, *line, stdin=TOKEN + "\n")
    assert office.requests == {}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param(["join"], UsageError, id="nothing said"),
        pytest.param(["data", "add", "x.jsonl"], StateError, id="not joined"),
        pytest.param(["peers"], StateError, id="peers before joining"),
        pytest.param(["status"], StateError, id="status of nothing"),
        pytest.param(["up"], StateError, id="up of nothing"),
        pytest.param(["charter", "list"], StateError, id="charters of nothing"),
    ],
)
def test_what_comes_first_is_said(home: Home, arguments: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        call(home, *arguments)


def test_a_home_belongs_to_one_organisation(office: Office, joined: Home) -> None:
    with pytest.raises(StateError, match="another --home"):
        call(joined, "join", "--org", "birke")


def test_without_a_terminal_a_missing_token_is_an_error(office: Office, home: Home) -> None:
    address = f"127.0.0.1:{office.enrolment.port}"
    line = ("join", "--coordinator", address, "--org", "ahorn", "--ca-fingerprint", office.ca.fingerprint)
    with pytest.raises(UsageError, match="token-stdin"):
        call(home, *line)
    with pytest.raises(UsageError, match="empty"):
        call(home, *line, "--token-stdin", stdin="\n")


def test_peers_are_shown_and_confirmed(office: Office, joined: Home) -> None:
    shown = {one["org"]: one for one in call(joined, "peers")["members"]}
    assert (shown["ahorn"]["state"], shown["birke"]["state"]) == ("ourselves", "unconfirmed")
    fingerprint = shown["birke"]["fingerprint"]
    with pytest.raises(VerificationError, match="do not sign"):
        call(joined, "peers", "--confirm", f"birke={'0' * 64}")
    with pytest.raises(UsageError, match="FINGERPRINT"):
        call(joined, "peers", "--confirm", "birke")
    with pytest.raises(VerificationError, match="none"):
        call(joined, "peers", "--confirm", f"celtis={fingerprint}")
    assert policy.load(joined.policy).peers == {}
    call(joined, "peers", "--confirm", f"birke={fingerprint}")
    assert policy.load(joined.policy).peers == {"birke": fingerprint}


def test_confirm_all_leaves_ourselves_out(office: Office, joined: Home) -> None:
    call(joined, "peers", "--confirm-all")
    assert list(policy.load(joined.policy).peers) == ["birke"]


def _data(folder: Path, units: int = 40) -> Path:
    path = folder / "letters.jsonl"
    rows = [{"question": f"What is {unit}?", "answer": "A number.", "patient": f"p{unit}"} for unit in range(units)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _add(home: Home, file: Path, *more: str, units_at_most: int = 64) -> dict[str, Any]:
    return call(
        home, "data", "add", file, "--name", "letters", "--purpose", "care", "--namespace", "patients",
        "--unit", "patient", "--units-at-most", str(units_at_most), "--epsilon-cap", "8", *more,
    )  # fmt: skip


def test_data_add_declares_and_prints_the_operators_lines(joined: Home, tmp_path: Path) -> None:
    result = _add(joined, _data(tmp_path))
    assert (result["units"], result["rejected"]) == (40, 0)
    assert 0 < result["heldout_units"] < 40
    lines = '[[participants]]\nid = "ahorn"\nunit = "patient"\nunits_at_most = 64\n'
    assert result["participants"] == lines
    rules = policy.load(joined.policy)
    assert rules.dataset_for("care").files == [str(tmp_path / "letters.jsonl")]
    assert rules.namespaces["patients"].epsilon_cap == 8.0
    assert len(rules.bases) == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        pytest.param({"units_at_most": 32}, ConfigError, id="more units than declared"),
        pytest.param({"units_at_most": 63}, ConfigError, id="not a power of two"),
        pytest.param({"units_at_most": 1 << 20}, ConfigError, id="delta too large"),
        pytest.param({"base": "/nowhere"}, CheckpointError, id="no base"),
        pytest.param({"file": "/nowhere.jsonl"}, DataError, id="no file"),
    ],
)
def test_a_refused_registration_leaves_the_policy_as_it_was(
    joined: Home, tmp_path: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    before = joined.policy.read_bytes()
    file = Path(change.get("file") or _data(tmp_path))
    more = ["--base", change["base"]] if "base" in change else []
    with pytest.raises(error):
        _add(joined, file, *more, units_at_most=change.get("units_at_most", 64))
    assert joined.policy.read_bytes() == before


@pytest.mark.parametrize(
    "missing", ["--name", "--purpose", "--namespace", "--unit", "--units-at-most", "--epsilon-cap"]
)
def test_without_a_terminal_a_missing_declaration_is_an_error(joined: Home, tmp_path: Path, missing: str) -> None:
    answers = {
        "--name": "letters",
        "--purpose": "care",
        "--namespace": "patients",
        "--unit": "patient",
        "--units-at-most": "64",
        "--epsilon-cap": "8",
    }
    line = [part for option, value in answers.items() if option != missing for part in (option, value)]
    with pytest.raises(UsageError, match=missing):
        call(joined, "data", "add", _data(tmp_path), *line)


def test_status_and_decisions(joined: Home, tmp_path: Path) -> None:
    _add(joined, _data(tmp_path))
    state = ClientState(joined.state)
    state.note_offer(digest="ab" * 32, run="r-1", name="trial", purpose="care", operator_signature="0" * 128)
    assert [one["state"] for one in call(joined, "charter", "list")["charters"]] == ["offered"]
    assert call(joined, "charter", "refuse", "abab")["state"] == "declined"
    with pytest.raises(StateError):
        call(joined, "charter", "approve", "abab")
    found = call(joined, "status")
    assert (found["daemon"], found["joined"], found["charters"][0]["state"]) == ("stopped", True, "declined")
    with HomeLock(joined.lock):
        assert call(joined, "status")["daemon"] == "running"
        with pytest.raises(StateError, match="no other daemon"):
            call(joined, "up")


def test_a_charters_words_are_no_markup(joined: Home, capsys: pytest.CaptureFixture[str]) -> None:
    """Its purpose is the operator's free text: it must not break the list, nor dress up as something else."""
    state = ClientState(joined.state)
    state.note_offer(
        digest="ab" * 32, run="r-1", name="trial", purpose="[/x] care\x1b[8m", operator_signature="0" * 128
    )
    result = CliRunner().invoke(app, ["charter", "list", "--home", str(joined.root)])
    assert result.exception is None
    assert "[/x] care" in result.output
    assert "\x1b[8m" not in result.output


def test_base_add_allows_a_base(joined: Home) -> None:
    from foedus_client.datasets.cli import shipped_base

    digest = call(joined, "base", "add", shipped_base())["digest"]
    assert policy.load(joined.policy).base_path(digest) == shipped_base()
    with pytest.raises(CheckpointError):
        call(joined, "base", "add", joined.root)


def test_the_daemons_process_loads_neither_torch_nor_flower() -> None:
    code = (
        "import sys, foedus_client.daemon, foedus_client.cli, foedus_client.join, foedus_client.peers\n"
        "heavy = {'torch', 'flwr', 'transformers', 'opacus'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
