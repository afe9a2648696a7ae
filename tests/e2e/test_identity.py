"""An identity's life over real TLS: joining, renewing, a rotated CA, a revoked member, lost keys, other versions.

The coordinator serves in a thread of this process and organisations are homes on the disk; the commands are the real
ones, and work beside it on the same files as they do from another process.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from foedus_client import membership, renewal
from foedus_client.cli import app as client_app
from foedus_client.config import Home as ClientHome
from foedus_client.lock import HomeLock
from foedus_client.membership import open_hello
from foedus_client.renewal import introduction, renew_if_due
from foedus_coordinator import executor, service
from foedus_coordinator.cli import app as coordinator_app
from foedus_coordinator.config import Config, Home
from foedus_coordinator.figures import publish
from foedus_protocols.authorities import fingerprints
from foedus_protocols.certificates import check_issuer, parse_certificate, parse_certificates
from foedus_protocols.errors import ConnectError, StateError, UsageError, VerificationError
from foedus_protocols.hello import HelloAnswer, HelloRequest
from foedus_protocols.identity import key_fingerprint, load_signing_key, public_hex
from foedus_protocols.link import LinkClient
from foedus_protocols.store import CHUNK_BYTES
from foedus_protocols.v1 import link_pb2, link_pb2_grpc
from typer import Typer
from typer.testing import CliRunner

DAY = 86_400.0


def call(app: Typer, home: Path, *arguments: str, stdin: str = "") -> dict[str, Any]:
    """Run a command in this process and read its last line."""
    line = [*map(str, arguments), "--home", str(home), "--format", "json"]
    result = CliRunner().invoke(app, line, input=stdin)
    if result.exception is not None:
        raise result.exception
    value: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return value


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


@dataclass
class League:
    """A coordinator that serves, and homes of organisations."""

    root: Path
    link: str = ""
    enrolment: str = ""
    clients: dict[str, ClientHome] = field(default_factory=dict)

    @property
    def home(self) -> Home:
        """The coordinator's folder as another process opens it."""
        return Home(self.root / "coordinator")

    def coordinator(self, *arguments: str) -> dict[str, Any]:
        return call(coordinator_app, self.root / "coordinator", *arguments)

    def ask(self, org: str, *more: str) -> dict[str, Any]:
        """Invite an organisation, and let it present its token."""
        invited = self.coordinator("invite", org)
        home = self.clients.setdefault(org, ClientHome(self.root / org))
        line = ("--coordinator", self.enrolment, "--org", org, "--ca-fingerprint", invited["ca_fingerprint"])
        return call(
            client_app, home.root, "join", *line, "--token-stdin", "--no-wait", *more, stdin=invited["token"] + "\n"
        )

    def join(self, org: str, *more: str) -> ClientHome:
        """Let an organisation in, or in again."""
        asked = self.ask(org, *more)
        self.coordinator("approve", org, "--yes", "--fingerprint", asked["fingerprint"])
        assert call(client_app, self.clients[org].root, "join")["state"] == "joined"
        return self.clients[org]

    @contextmanager
    def dial(self, org: str) -> Iterator[LinkClient]:
        home = self.clients[org]
        with LinkClient(home.membership().link, home.tls, patience_seconds=5.0) as client:
            yield client

    def greet(self, org: str, client: LinkClient) -> bool:
        """What a daemon's greeting does for its identity; returns whether anything was written."""
        home, us = self.clients[org], self.clients[org].membership()

        def say(request: HelloRequest) -> HelloAnswer:
            return open_hello(client.hello(request.encode()), us)

        return renew_if_due(say(introduction(home, us)), home=home, us=us, hello=say, reload=client.reload)

    def leaf(self, org: str) -> Any:
        return parse_certificate(self.clients[org].tls.certificate.read_bytes())

    def trusted(self, org: str) -> list[str]:
        return fingerprints(parse_certificates(self.clients[org].tls.ca.read_bytes()))


@pytest.fixture
def league(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[League]:
    """A running coordinator without members."""
    monkeypatch.setattr(executor, "_RENEW_SECONDS", 0.1)
    made = League(tmp_path)
    config = Config(federation="test", address="127.0.0.1", link_port=0, enrolment_port=0, listen="127.0.0.1")
    Home.create(made.home.root, config)
    stop, lines = threading.Event(), []
    thread = threading.Thread(target=executor.serve, args=(made.home,), kwargs={"stop": stop, "say": lines.append})
    thread.start()
    try:
        wait_for(lambda: bool(lines))
        words = lines[0].replace(",", "").split()
        made.link, made.enrolment = words[words.index("link") + 1], words[words.index("enrolment") + 1]
        yield made
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()


def age(league: League, org: str, days: float) -> None:
    """Enrol an organisation with a certificate that was issued so many days ago."""
    league.ask(org)
    home = league.home
    request = home.members.requests(org)[0]
    now = time.time() - days * DAY
    home.members.approve(request, authority=home.authority, key=home.operator_key, now=now)
    call(client_app, league.clients[org].root, "join")


# Renewal


def test_a_certificate_is_renewed_over_the_link_without_a_restart(league: League) -> None:
    """Ten of its fourteen days are over; the connection that asked goes on, and the next one shows the new one."""
    age(league, "ahorn", 10)
    old = league.leaf("ahorn")
    with league.dial("ahorn") as client:
        assert league.greet("ahorn", client)
        assert league.leaf("ahorn").serial_number != old.serial_number
        assert league.leaf("ahorn").public_key() == old.public_key()
        assert client.poll(0.0) is None
        assert not league.greet("ahorn", client)


def test_before_half_life_nothing_is_renewed(league: League) -> None:
    age(league, "ahorn", 6)
    with league.dial("ahorn") as client:
        assert not league.greet("ahorn", client)


def test_an_expired_identity_joins_again_with_its_signing_key(league: League) -> None:
    league.join("ahorn")
    before = league.home.members.roster()
    key = league.clients["ahorn"].signing_key.read_bytes()
    home = league.join("ahorn", "--again", "--keep-signing-key")
    assert home.signing_key.read_bytes() == key
    assert league.home.members.roster() == before
    with league.dial("ahorn") as client:
        assert not league.greet("ahorn", client)


# Rotation


def test_a_ca_is_rotated_with_both_trusted_for_a_while(league: League) -> None:
    for org in ("ahorn", "birke"):
        league.join(org)
    old = league.home.shown_ca
    with league.dial("ahorn") as ahorn, league.dial("birke") as birke:
        league.greet("ahorn", ahorn)
        league.greet("birke", birke)
        state = league.coordinator("authority", "rotate")
        new = state["authorities"][-1]["fingerprint"]
        assert state["lagging"] == ["ahorn", "birke"]

        assert league.greet("ahorn", ahorn)
        assert league.trusted("ahorn") == [old, new]
        assert fingerprints([check_issuer(league.leaf("ahorn"), league.home.authorities.trusted())]) == [new]
        assert not league.greet("ahorn", ahorn)
        assert league.coordinator("authority", "show")["lagging"] == ["birke"]
        with pytest.raises(StateError, match=r"birke do not yet"):
            league.coordinator("authority", "retire")
        assert league.home.shown_ca == old  # birke could not connect otherwise.
        assert league.coordinator("invite", "celtis")["ca_fingerprint"] == old

        assert league.greet("birke", birke)
        birke.hello(introduction(league.clients["birke"], league.clients["birke"].membership()).encode())
        wait_for(lambda: league.home.shown_ca == new)  # The running coordinator moves its ports by itself.
        league.join("celtis")  # It pins the new CA, and gets both.
        assert league.trusted("celtis") == [old, new]
        with league.dial("celtis") as celtis:
            league.greet("celtis", celtis)
        before = league.clients["ahorn"].tls.certificate.read_bytes()
        done = league.coordinator("authority", "retire")
        assert (done["retired"], done["locked_out"]) == ([old], [])
        assert league.greet("ahorn", ahorn)
        assert league.trusted("ahorn") == [new]
        assert league.clients["ahorn"].tls.certificate.read_bytes() == before
        with league.dial("birke") as again:
            again.poll(0.0)


def test_a_rotation_that_is_forced_locks_out_who_did_not_follow(league: League) -> None:
    for org in ("ahorn", "birke"):
        league.join(org)
    league.coordinator("authority", "rotate")
    with league.dial("birke") as birke:
        with league.dial("ahorn") as ahorn:
            league.greet("ahorn", ahorn)
            ahorn.hello(introduction(league.clients["ahorn"], league.clients["ahorn"].membership()).encode())
        birke.poll(0.0)
        done = league.coordinator("authority", "retire", "--force")
        assert done["locked_out"] == ["birke"]
        with pytest.raises(VerificationError, match="revoked, replaced or never issued"):  # On its open connection.
            wait_until_refused(birke)
    with league.dial("ahorn") as ahorn:
        ahorn.poll(0.0)
    with league.dial("birke") as birke, pytest.raises(ConnectError):  # On a new one, already in the handshake.
        birke.poll(0.0)
    league.join("birke", "--again", "--keep-signing-key")
    with league.dial("birke") as birke:
        birke.poll(0.0)


def wait_until_refused(client: LinkClient, seconds: float = 10.0) -> None:
    """Poll until it raises; another process's change is seen within a second."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        client.poll(0.0)
        time.sleep(0.05)


# Revocation and lost keys


def test_revoking_cuts_an_open_stream_and_the_next_call(
    league: League, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    league.join("ahorn")
    big = tmp_path / "big"
    big.write_bytes(os.urandom(40 * CHUNK_BYTES))
    home = league.home
    digest = home.files.put(big)
    with home.storage.write() as connection:
        publish(connection, digest, "")
    with league.dial("ahorn") as client:
        stream = link_pb2_grpc.LinkStub(client._channel).Pull(link_pb2.PullRequest(digest=digest))
        assert next(stream).size == 40 * CHUNK_BYTES
        assert next(stream).chunk
        said = league.coordinator("revoke", "ahorn", "--reason", "left the league")
        assert said["roster_version"] == 2
        wait_for(lambda: "a transfer is cut off" in caplog.text)  # Nobody reads: buffers hold a few chunks, not forty.
        with pytest.raises(grpc.RpcError):
            list(stream)
        with pytest.raises(VerificationError, match="revoked"):
            wait_until_refused(client)
    with league.dial("ahorn") as client, pytest.raises(VerificationError, match="revoked"):
        client.poll(0.0)
    with pytest.raises(VerificationError, match="'ahorn' is not one"):
        league.coordinator("revoke", "ahorn")
    league.join("ahorn", "--again")
    with league.dial("ahorn") as client:
        client.poll(0.0)


def test_lost_keys_are_replaced_and_the_ledger_stays(league: League, capsys: pytest.CaptureFixture[str]) -> None:
    home = league.join("ahorn")
    kept = {home.ledger: b"the ledger", home.keys / "split-00.key": b"00" * 32, home.state: b""}
    for path, data in kept.items():
        path.write_bytes(data)
    policy, old = home.policy.read_text(), home.signing_key.read_bytes()
    before = key_fingerprint(public_hex(load_signing_key(home.signing_key)))
    home.tls.key.unlink()  # What was lost.

    asked = league.ask("ahorn", "--again")
    assert asked["fingerprint"] != before
    with pytest.raises(UsageError, match="--fingerprint beside --yes"):
        league.coordinator("approve", "ahorn", "--yes")
    line = ["approve", "ahorn", "--yes", "--fingerprint", asked["fingerprint"], "--home", str(league.home.root)]
    shown = CliRunner().invoke(coordinator_app, line)
    assert shown.exit_code == 0
    said = "".join(shown.stderr.split())
    assert before in said
    assert asked["fingerprint"] in said
    call(client_app, home.root, "join")

    assert {path: path.read_bytes() for path in kept} == kept
    assert home.policy.read_text() == policy
    (aside,) = home.keys.glob("old-*")
    assert (aside / "signing.key").read_bytes() == old
    assert {path.name for path in aside.iterdir()} == {"signing.key", "tls.pem", "ca.pem", "request.pem"}
    chain = league.home.members.roster()
    assert chain.version == 3
    assert chain.member("ahorn").fingerprint == asked["fingerprint"]
    with league.dial("ahorn") as client:
        client.poll(0.0)


def test_who_joins_again_accepts_no_other_operator(league: League) -> None:
    """Whoever has the CA's key passes the pin, and must not become the operator by that."""
    home = league.join("ahorn")
    known = "0" * 63 + "1"
    home.save(home.load().model_copy(update={"operator_key": known}))
    policy = home.policy.read_text()
    asked = league.ask("ahorn", "--again")
    league.coordinator("approve", "ahorn", "--yes", "--fingerprint", asked["fingerprint"])
    with pytest.raises(VerificationError, match="expected the operator that this home knows"):
        call(client_app, home.root, "join")
    assert not home.tls.certificate.exists()
    assert (home.policy.read_text(), home.load().operator_key) == (policy, known)


def test_runs_of_a_revoked_or_replaced_member_end_with_its_name(league: League) -> None:
    for org in ("ahorn", "birke"):
        league.join(org)
    league.home.storage.add_run(
        "run-1", charter_digest="0" * 64, operator_signature="1" * 128, base_config=b"{}", orgs=["ahorn"], files=[]
    )
    assert league.coordinator("revoke", "birke")["runs_ended"] == []
    assert league.coordinator("revoke", "ahorn", "--reason", "why not")["runs_ended"] == ["run-1"]
    row = league.home.storage.run("run-1")
    assert (row.wish, row.wish_reason) == ("stop", "ahorn was revoked: why not")


def test_joining_again_is_refused_before_anything_moves(league: League) -> None:
    home = league.join("ahorn")
    before = {path.name: path.read_bytes() for path in home.keys.iterdir()}
    again = ("join", "--again", "--token-stdin")
    with pytest.raises(StateError, match="ledger here is that of ahorn"):
        call(client_app, home.root, *again, "--org", "birke", stdin="token\n")
    with pytest.raises(UsageError, match="empty"):
        call(client_app, home.root, *again, stdin="\n")
    with HomeLock(home.lock), pytest.raises(StateError, match="no other daemon"):
        call(client_app, home.root, *again, stdin="token\n")
    with pytest.raises(StateError, match=r"no client\.toml"):
        call(client_app, league.root / "nobody", *again, stdin="token\n")
    assert {path.name: path.read_bytes() for path in home.keys.iterdir()} == before


# Versions


def test_one_minor_version_apart_works_over_the_link(league: League, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.0 says nothing of minor numbers, 1.2 says more than we know; two apart are refused, with whom to update."""
    home = league.join("ahorn")
    us = home.membership()
    with league.dial("ahorn") as client:
        for coordinators, organisations in itertools.product(range(3), range(3)):
            with monkeypatch.context() as speaking:
                speaking.setattr(service, "MINOR", coordinators)
                speaking.setattr(membership, "MINOR", organisations)
                speaking.setattr(renewal, "MINOR", organisations)
                request = introduction(home, us).encode()
                if organisations == 0:
                    request = {"protocol": 1, "org": us.org}
                elif organisations == 2:
                    request |= {"from_the_future": True}
                if abs(coordinators - organisations) > 1:
                    older = "coordinator" if coordinators < organisations else "organisation"
                    with pytest.raises(VerificationError, match=f"update the {older}"):
                        client.hello(request)
                    continue
                assert open_hello(client.hello(request), us).minor == coordinators
                noted = league.home.members.introductions()["ahorn"]
                assert noted is not None
                assert noted.protocol == f"1.{organisations}"
                assert client.poll(0.0) is None


@pytest.mark.parametrize(("ours", "older"), [(0, "organisation"), (3, "coordinator")])
def test_an_organisation_refuses_a_coordinator_too_far_away(
    league: League, monkeypatch: pytest.MonkeyPatch, ours: int, older: str
) -> None:
    league.join("ahorn")
    us = league.clients["ahorn"].membership()
    with league.dial("ahorn") as client:
        said = client.hello({"protocol": 1, "minor": 1, "org": "ahorn"})
    monkeypatch.setattr(membership, "MINOR", ours)
    with pytest.raises(VerificationError, match=f"update the {older}"):
        open_hello(said | {"minor": 2 if ours == 0 else 1}, us)
