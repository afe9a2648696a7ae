"""The link over real TLS on the loopback."""

from __future__ import annotations

import hashlib
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from foedus_protocols import channel
from foedus_protocols.certificates import CertificateAuthority
from foedus_protocols.channel import TlsFiles, TransientError, Watch
from foedus_protocols.errors import ConfigError, ConnectError, FoedusError, StateError, VerificationError
from foedus_protocols.files import DiskTrouble
from foedus_protocols.identity import public_hex
from foedus_protocols.link import LinkClient, LinkServer, serve_link
from foedus_protocols.receipt import Receipt, open_receipt, sign_receipt
from foedus_protocols.store import CHUNK_BYTES, FileStore, Part
from foedus_protocols.turns import CALLS_AT_ONCE
from foedus_protocols.v1 import link_pb2, link_pb2_grpc

DATA = os.urandom(3 * CHUNK_BYTES + 4321)
DIGEST = hashlib.sha256(DATA).hexdigest()


class Coordinator:
    """Handlers over a folder, with what arrived written down."""

    def __init__(self, federation: Any, store: FileStore) -> None:
        self.federation = federation
        self.store = store
        self.members = {"clinic", "bank"}
        self.inbox: list[tuple[str, bytes]] = []
        self.outbox: dict[str, list[bytes]] = {}
        self.serials: set[str] = set()
        self.max_bytes = 64 << 20
        self.receipts = 0
        self.polling: list[str] = []
        self.wrap: Callable[[Part], Part] = lambda part: part

    def check_member(self, org: str, leaf_serial: str) -> None:
        self.serials.add(leaf_serial)
        if org not in self.members:
            raise VerificationError(f"expected a member, {org!r} was removed")

    def hello(self, org: str, body: dict[str, Any], leaf_serial: str) -> dict[str, Any]:
        if body.get("break"):
            raise RuntimeError("patient 17 has the flu")  # What no error text may carry outside.
        return {"you": org, "said": body}

    def poll(self, org: str, wait_seconds: float) -> bytes | None:
        self.polling.append(org)
        deadline = time.monotonic() + wait_seconds
        while not self.outbox.get(org):
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)
        return self.outbox[org][0]

    def deliver(self, org: str, envelope: bytes) -> None:
        self.inbox.append((org, envelope))

    def granted(self, org: str, digest: str, size: int, context: dict[str, Any]) -> Part:
        if size > self.max_bytes:
            raise VerificationError(f"expected at most {self.max_bytes} bytes, got {size} announced")
        return self.wrap(self.store.open_part(digest, size))

    def received(self, org: str, digest: str, size: int, context: dict[str, Any]) -> bytes:
        self.receipts += 1
        return sign_receipt(
            self.federation.operator,
            federation=self.federation.name,
            run=context["run"],
            round=context["round"],
            org=org,
            digest=digest,
            size=size,
            verdict="included",
            time=1_800_000_000,
        ).encode()

    def path_of(self, org: str, digest: str) -> Path:
        return self.store.path(digest)


CONTEXT = {"run": "run-1", "round": 1}


@pytest.fixture
def coordinator(federation, tmp_path) -> Coordinator:
    return Coordinator(federation, FileStore(tmp_path / "coordinator-files"))


@pytest.fixture
def server(federation, coordinator) -> Iterator[LinkServer]:
    running = serve_link("127.0.0.1:0", coordinator, federation.coordinator_tls(), slots=1, stall_seconds=2.0)
    yield running
    running.stop(0.2)


@contextmanager
def connect(server: LinkServer, tls: TlsFiles, **more: Any) -> Iterator[LinkClient]:
    with LinkClient(f"127.0.0.1:{server.port}", tls, **{"patience_seconds": 5.0} | more) as client:
        yield client


@pytest.fixture
def client(federation, server) -> Iterator[LinkClient]:
    with connect(server, federation.org_tls("clinic")) as connected:
        yield connected


@pytest.fixture
def vector(tmp_path) -> Path:
    path = tmp_path / "vector"
    path.write_bytes(DATA)
    return path


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


# Control


def test_hello_names_the_certificates_organisation(client, coordinator):
    assert client.hello({"version": 1}) == {"you": "clinic", "said": {"version": 1}}
    assert len(coordinator.serials) == 1
    assert client.bytes_up > 0
    assert client.bytes_down > 0


def test_poll_gives_the_same_message_until_it_is_answered(client, coordinator):
    assert client.poll(0.0) is None
    timer = threading.Timer(0.3, lambda: coordinator.outbox.setdefault("clinic", []).append(b"order"))
    timer.start()
    started = time.monotonic()
    assert client.poll(10.0) == b"order"
    assert time.monotonic() - started < 5
    assert client.poll(0.0) == b"order"
    client.deliver(b"answer")
    assert coordinator.inbox == [("clinic", b"answer")]


def test_a_members_poll_never_sees_anothers_message(client, coordinator):
    coordinator.outbox["bank"] = [b"for the bank"]
    assert client.poll(0.2) is None


def test_a_handlers_unexpected_error_says_nothing_outside(client):
    with pytest.raises(ConnectError, match="internal error") as caught:
        client.hello({"break": True})
    assert "patient" not in str(caught.value)


def test_one_member_cannot_hold_every_call(server, client, coordinator, federation):
    """Four polls of a member wait; its fifth call is refused, another member is served, and an ended one makes room."""
    threads = [threading.Thread(target=lambda: client.poll(20.0)) for _ in range(CALLS_AT_ONCE)]
    for thread in threads:
        thread.start()
    wait_for(lambda: coordinator.polling.count("clinic") >= CALLS_AT_ONCE)
    with pytest.raises(TransientError, match="at most 4 calls of clinic at once"):
        client.hello({})
    with connect(server, federation.org_tls("bank")) as bank:
        assert bank.hello({})["you"] == "bank"
    coordinator.outbox["clinic"] = [b"order"]
    for thread in threads:
        thread.join(10)
    wait_for(lambda: answers(client))


def answers(client: LinkClient) -> bool:
    """Whether a call is served; the coordinator may count an answered call for a moment longer than its caller."""
    try:
        client.hello({})
    except ConnectError:
        return False
    return True


def test_a_full_disk_at_the_coordinator_is_waited_for(client, coordinator, vector, monkeypatch, caplog):
    """What the disk did not take comes again; where the disk lies is for the coordinator's log alone."""
    monkeypatch.setattr(channel, "_trouble_said", {"at": float("-inf")})
    full = iter([True, True, False])

    class Filling(Part):
        def write(self, chunk: bytes) -> None:
            if next(full, False):
                raise DiskTrouble("expected to write in /srv/foedus, got: no space left")
            super().write(chunk)

    coordinator.wrap = lambda part: Filling(coordinator.store, part.digest, part.size)
    assert client.push(vector, DIGEST, CONTEXT)["digest"] == DIGEST
    assert [record.message for record in caplog.records if "no space left" in record.message] != []
    assert len([record for record in caplog.records if "no space left" in record.message]) == 1


def test_the_watch_outlives_a_check_that_breaks():
    """A check that fails in an unforeseen way ends its own transfer, and the others stay under watch."""
    watch, first, second = Watch(60.0), threading.Event(), threading.Event()

    def broken() -> None:
        raise RuntimeError("the database is gone")

    def revoked() -> None:
        raise VerificationError("revoked")

    try:
        with watch.over(first.set, broken):
            assert first.wait(10)
        with watch.over(second.set, revoked):
            assert second.wait(10)
    finally:
        watch.stop()


def test_control_messages_have_limits(client):
    with pytest.raises(VerificationError, match="at most"):
        client.hello({"x": "y" * (64 << 10)})
    with pytest.raises(VerificationError, match="at most"):
        client.deliver(bytes(80 << 10))
    assert client.hello({})["you"] == "clinic"


# Who may call


def test_without_a_certificate_nobody_gets_in(server, federation):
    credentials = grpc.ssl_channel_credentials(federation.ca.pem)
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(f"127.0.0.1:{server.port}", credentials, options=options) as raw:
        with pytest.raises(grpc.RpcError) as caught:
            link_pb2_grpc.LinkStub(raw).Hello(link_pb2.HelloRequest(body=b"{}"), timeout=5)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def refused_in_the_handshake(server: LinkServer, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dial with our own check of our certificate out of the way, and be refused by the server."""
    monkeypatch.setattr(channel, "check_own_certificate", lambda *_, **__: None)
    monkeypatch.setattr(LinkClient, "_check_certificate", lambda self: None)
    with connect(server, tls) as client, pytest.raises(ConnectError, match="refused our certificate"):
        client.hello({})


def test_a_strangers_certificate_is_refused_on_both_sides(server, federation, monkeypatch):
    stranger = CertificateAuthority.create(federation.name)
    tls = federation.org_tls("clinic", name="stranger", ca=stranger)
    with pytest.raises(ConnectError, match="another CA"), connect(server, tls):
        pass
    refused_in_the_handshake(server, tls, monkeypatch)


def test_an_expired_certificate_is_refused_on_both_sides(server, federation, monkeypatch):
    tls = federation.org_tls("clinic", name="old", age_days=8)
    with pytest.raises(ConnectError, match="expired"), connect(server, tls):
        pass
    refused_in_the_handshake(server, tls, monkeypatch)


def test_the_coordinators_certificate_cannot_call(server, federation, monkeypatch):
    refused_in_the_handshake(server, federation.coordinator_tls("second"), monkeypatch)


def test_an_organisation_cannot_pose_as_the_coordinator(federation, coordinator):
    tls = federation.org_tls("bank")
    with pytest.raises(ConfigError, match="coordinator"):
        serve_link("127.0.0.1:0", coordinator, tls)


def test_a_server_of_another_ca_is_refused(federation, coordinator):
    tls = federation.org_tls("clinic")
    ours, federation.ca = federation.ca, CertificateAuthority.create(federation.name)
    running = serve_link("127.0.0.1:0", coordinator, federation.coordinator_tls("impostor"))
    federation.ca = ours
    try:
        with connect(running, tls) as client, pytest.raises(ConnectError, match="federation's CA"):
            client.hello({})
    finally:
        running.stop(0.1)


def test_a_removed_member_is_refused_on_its_open_connection(client, coordinator):
    client.hello({})
    coordinator.members.discard("clinic")
    for call in (lambda: client.hello({}), lambda: client.poll(5.0), lambda: client.deliver(b"answer")):
        with pytest.raises(VerificationError, match="removed"):
            call()
    assert coordinator.inbox == []


def test_a_waiting_poll_ends_with_the_membership(client, coordinator):
    threading.Timer(0.3, lambda: coordinator.members.discard("clinic")).start()
    started = time.monotonic()
    with pytest.raises(VerificationError, match="removed"):
        client.poll(20.0)
    assert time.monotonic() - started < 10


def test_a_removed_members_open_stream_is_cut(client, coordinator, tmp_path):
    big = tmp_path / "big"
    big.write_bytes(os.urandom(40 * CHUNK_BYTES))
    digest = coordinator.store.put(big)
    call = link_pb2_grpc.LinkStub(client._channel).Pull(link_pb2.PullRequest(digest=digest))
    assert next(call).size == 40 * CHUNK_BYTES
    coordinator.members.discard("clinic")
    with pytest.raises(grpc.RpcError):
        list(call)


def test_a_removed_members_silent_push_is_cut(client, coordinator):
    """The handler waits for a chunk that never comes: the watch must notice, before the 2 s of a stall are over."""
    silent = threading.Event()

    def stall() -> Iterator[Any]:
        yield header()
        silent.wait(30)

    call = link_pb2_grpc.LinkStub(client._channel).Push(stall())
    assert next(call).WhichOneof("kind") == "granted_offset"
    coordinator.members.discard("clinic")
    started = time.monotonic()
    with pytest.raises(grpc.RpcError):
        next(call)
    silent.set()
    assert time.monotonic() - started < 1.9


def test_a_certificate_that_runs_out_on_an_open_connection_is_refused(client, monkeypatch):
    """gRPC looks at dates only in the handshake; here the server's clock moves on by eight days."""
    client.hello({})

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=8)

    monkeypatch.setattr(channel, "datetime", Later)
    with pytest.raises(VerificationError, match="expired"):
        client.hello({})


def test_a_certificate_that_ran_out_is_said_before_dialling(client, monkeypatch):
    client._expires = datetime.now(UTC) - timedelta(seconds=1)
    reads = []
    monkeypatch.setattr(type(client._tls), "read", lambda self: reads.append(1) or expired())

    def expired():
        raise ConnectError("expected a valid certificate, ours expired")

    with pytest.raises(ConnectError, match="ours expired"):
        client.poll(0)
    assert reads


def test_a_renewed_certificate_is_used_without_a_restart(client, federation, coordinator):
    client.hello({})
    renewed = federation.org_tls("clinic", name="renewed")
    os.replace(renewed.key, client._tls.key)
    os.replace(renewed.certificate, client._tls.certificate)
    client.reload()
    client.hello({})
    assert len(coordinator.serials) == 2


def test_a_key_file_that_others_can_read_stops_the_client(server, federation):
    tls = federation.org_tls("clinic")
    tls.key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"), connect(server, tls):
        pass


# Transfers


def test_a_push_ends_in_a_signed_receipt(client, coordinator, federation, vector):
    receipt = client.push(vector, DIGEST, CONTEXT)
    assert coordinator.store.path(DIGEST).read_bytes() == DATA
    opened = open_receipt(
        Receipt.model_validate(receipt).encode(),
        operator_key=public_hex(federation.operator),
        federation=federation.name,
        run="run-1",
        round=1,
        org="clinic",
        digest=DIGEST,
        size=len(DATA),
    )
    assert opened.verdict == "included"
    assert len(DATA) < client.bytes_up < len(DATA) * 1.01


def test_a_repeated_push_sends_no_byte_again(client, vector):
    first = client.push(vector, DIGEST, CONTEXT)
    sent = client.bytes_up
    assert client.push(vector, DIGEST, CONTEXT) == first
    assert client.bytes_up - sent < 1000


def test_a_push_resumes_where_it_broke(client, coordinator, vector):
    with coordinator.store.open_part(DIGEST, len(DATA)) as part:
        part.write(DATA[: 2 * CHUNK_BYTES + 5])
    client.push(vector, DIGEST, CONTEXT)
    assert client.bytes_up < len(DATA) - 2 * CHUNK_BYTES + 5000
    assert coordinator.store.path(DIGEST).read_bytes() == DATA


def test_a_part_that_lost_its_data_is_sent_again_once(client, coordinator, vector):
    with coordinator.store.open_part(DIGEST, len(DATA)) as part:
        part.write(bytes(2 * CHUNK_BYTES))
    client.push(vector, DIGEST, CONTEXT)
    assert coordinator.store.path(DIGEST).read_bytes() == DATA


def test_a_push_of_other_bytes_is_refused_and_leaves_nothing(client, coordinator, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(VerificationError, match="digest"):
        client.push(wrong, DIGEST, CONTEXT)
    assert not coordinator.store.has(DIGEST)
    assert coordinator.store.received(DIGEST) == 0
    assert coordinator.receipts == 0


def test_an_oversized_push_is_refused_before_a_byte(client, coordinator, vector):
    coordinator.max_bytes = len(DATA) - 1
    with pytest.raises(VerificationError, match="at most"):
        client.push(vector, DIGEST, CONTEXT)
    assert client.bytes_up < 1000
    assert coordinator.store.received(DIGEST) == 0


def push_raw(client: LinkClient, requests: Iterator[Any]) -> list[Any]:
    return list(link_pb2_grpc.LinkStub(client._channel).Push(requests, timeout=20))


def header(size: int = len(DATA), digest: str = DIGEST) -> Any:
    return link_pb2.PushRequest(header=link_pb2.PushHeader(digest=digest, size=size, context=b'{"round":1,"run":"r"}'))


def chunk(data: bytes) -> Any:
    return link_pb2.PushRequest(chunk=data)


def test_more_bytes_than_announced_are_refused(client, coordinator):
    with pytest.raises(grpc.RpcError) as caught:
        push_raw(client, iter([header(size=10), chunk(b"x" * 11)]))
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert coordinator.receipts == 0


def test_a_truncated_stream_gives_no_receipt_and_keeps_the_part(client, coordinator):
    """The end of the stream is no sign of completeness: a broken one may look like a finished one."""
    with pytest.raises(grpc.RpcError) as caught:
        push_raw(client, iter([header(), chunk(DATA[:CHUNK_BYTES])]))
    assert "ended at" in caught.value.details()
    assert coordinator.receipts == 0
    assert coordinator.store.received(DIGEST) == CHUNK_BYTES


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [chunk(b"x")],
        [header(digest="../../etc/passwd")],
        [header(size=1 << 60)],
        [header(), header()],
        [header(), chunk(bytes(2 * CHUNK_BYTES))],
    ],
)
def test_a_malformed_push_is_refused(client, coordinator, requests):
    with pytest.raises(grpc.RpcError) as caught:
        push_raw(client, iter(requests))
    assert caught.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert coordinator.receipts == 0
    assert client.hello({})["you"] == "clinic"


def test_a_stalled_push_is_cut_and_gives_its_slot_back(federation, server, client, vector):
    """The only slot is taken by a peer that sends nothing after its first chunk."""
    silent = threading.Event()

    def stall() -> Iterator[Any]:
        yield header(digest="ab" * 32)
        yield chunk(bytes(CHUNK_BYTES))
        silent.wait(30)

    with connect(server, federation.org_tls("bank")) as bank:
        call = link_pb2_grpc.LinkStub(bank._channel).Push(stall())
        assert next(call).WhichOneof("kind") == "granted_offset"
        started = time.monotonic()
        client.push(vector, DIGEST, CONTEXT)  # Waits for the watch (2 s) to free the slot.
        assert time.monotonic() - started < 20
        with pytest.raises(grpc.RpcError):
            next(call)
        silent.set()


def test_a_broken_pull_gives_its_slot_back(federation, server, client, coordinator, tmp_path, vector):
    big = tmp_path / "big"
    big.write_bytes(os.urandom(40 * CHUNK_BYTES))
    digest = coordinator.store.put(big)
    with connect(server, federation.org_tls("bank")) as bank:
        call = link_pb2_grpc.LinkStub(bank._channel).Pull(link_pb2.PullRequest(digest=digest))
        assert next(call).size == 40 * CHUNK_BYTES
    threading.Thread(target=client.push, args=(vector, DIGEST, CONTEXT), daemon=True).start()
    wait_for(lambda: coordinator.receipts == 1)


def test_without_a_slot_not_a_byte_is_sent(federation, server, client, coordinator, vector, tmp_path):
    release, first = threading.Event(), threading.Event()

    class Held:
        def __init__(self, part: Part) -> None:
            self.part = part

        def __enter__(self) -> Part:
            first.set()
            release.wait(20)
            return self.part

        def __exit__(self, *_: object) -> None:
            self.part.close()

    coordinator.wrap = lambda part: Held(part) if part.digest == DIGEST else part
    other = tmp_path / "other"
    other.write_bytes(DATA[::-1])
    with connect(server, federation.org_tls("bank"), stall_seconds=15.0) as bank:
        pushes = [
            threading.Thread(target=client.push, args=(vector, DIGEST, CONTEXT)),
            threading.Thread(
                target=bank.push, args=(other, hashlib.sha256(DATA[::-1]).hexdigest(), CONTEXT | {"round": 2})
            ),
        ]
        pushes[0].start()
        assert first.wait(10)
        pushes[1].start()
        wait_for(lambda: bank.bytes_up > 0)
        assert client.poll(1.0) is None  # Control goes on beside it, and a second passes.
        assert bank.bytes_up < 1000
        release.set()
        for push in pushes:
            push.join(20)
    assert coordinator.receipts == 2


def test_a_push_survives_a_restart_of_the_coordinator(federation, coordinator, vector):
    """The server goes away in the middle; on the same port it comes back, and the push resumes."""
    tls = federation.coordinator_tls()
    running = serve_link("127.0.0.1:0", coordinator, tls)
    port = running.port
    half = threading.Event()

    class Slow(Part):
        def write(self, data: bytes) -> None:
            super().write(data)
            if self.offset >= 2 * CHUNK_BYTES:
                half.set()
                time.sleep(0.5)

    def slow(part: Part) -> Part:
        part.__class__ = Slow
        return part

    coordinator.wrap = slow
    receipts: list[Any] = []
    with LinkClient(f"127.0.0.1:{port}", federation.org_tls("clinic"), patience_seconds=20.0) as client:
        push = threading.Thread(target=lambda: receipts.append(client.push(vector, DIGEST, CONTEXT)))
        push.start()
        assert half.wait(10)
        running.stop(0)
        coordinator.wrap = lambda part: part
        running = serve_link(f"127.0.0.1:{port}", coordinator, tls)
        push.join(20)
        running.stop(0.1)
    assert receipts[0]["digest"] == DIGEST
    assert coordinator.store.path(DIGEST).read_bytes() == DATA


def test_a_member_that_pulls_again_does_not_wait_for_its_broken_pull(federation, coordinator, tmp_path):
    """The old stream is open and nobody reads it, as after a line that went dead: the new pull takes its place."""
    big = tmp_path / "big"
    big.write_bytes(os.urandom(40 * CHUNK_BYTES))
    digest = coordinator.store.put(big)
    store, tls = FileStore(tmp_path / "org-files"), federation.org_tls("clinic")
    running = serve_link("127.0.0.1:0", coordinator, federation.coordinator_tls(), slots=2, stall_seconds=600.0)
    try:
        with connect(running, tls) as client:
            dead = link_pb2_grpc.LinkStub(client._channel).Pull(link_pb2.PullRequest(digest=digest))
            assert next(dead).size == 40 * CHUNK_BYTES
            threading.Thread(target=client.pull, args=(digest, store), daemon=True).start()
            wait_for(lambda: store.has(digest), 20.0)
            with pytest.raises(grpc.RpcError) as caught:
                list(dead)
            assert caught.value.code() == grpc.StatusCode.CANCELLED
    finally:
        running.stop(0.1)


def test_a_pull_checks_and_resumes(client, coordinator, vector, tmp_path):
    coordinator.store.put(vector)
    store = FileStore(tmp_path / "org-files")
    with store.open_part(DIGEST, len(DATA)) as part:
        part.write(DATA[:CHUNK_BYTES])
    assert client.pull(DIGEST, store).read_bytes() == DATA
    assert client.bytes_down < len(DATA) - CHUNK_BYTES + 5000
    down = client.bytes_down
    client.pull(DIGEST, store)
    assert client.bytes_down == down
    with pytest.raises(VerificationError, match="longer"):
        client.pull(DIGEST, store, max_bytes=len(DATA) - 1)


def test_a_transfer_ends_as_a_broken_one_when_its_link_is_closed(client, coordinator, vector):
    """Never as an error of the transfer: the daemon would answer without its vector."""
    begun = threading.Event()

    def slow(part: Part) -> Part:
        begun.set()
        time.sleep(1.0)
        return part

    coordinator.wrap = slow
    ended: list[Exception] = []

    def push() -> None:
        try:
            client.push(vector, DIGEST, CONTEXT)
        except FoedusError as error:
            ended.append(error)

    thread = threading.Thread(target=push)
    thread.start()
    assert begun.wait(10)
    client.close()
    thread.join(5)
    assert [type(error) for error in ended] == [TransientError]
    with pytest.raises(ConnectError, match="closed"):
        client.push(vector, DIGEST, CONTEXT)
    client.close()


def test_a_pull_over_a_damaged_part_starts_again_once(client, coordinator, vector, tmp_path):
    coordinator.store.put(vector)
    store = FileStore(tmp_path / "org-files")
    with store.open_part(DIGEST, len(DATA)) as part:
        part.write(bytes(CHUNK_BYTES))
    assert client.pull(DIGEST, store).read_bytes() == DATA


def test_a_pull_is_capped_by_the_announced_size(client, coordinator, vector, tmp_path):
    coordinator.store.put(vector)
    store = FileStore(tmp_path / "org-files")
    with pytest.raises(VerificationError, match="announced"):
        client.pull(DIGEST, store, max_bytes=len(DATA) - 1)
    assert store.received(DIGEST) == 0


def test_a_pull_of_other_bytes_is_refused(client, coordinator, vector, tmp_path, monkeypatch):
    wrong = tmp_path / "wrong"
    wrong.write_bytes(DATA[::-1])
    monkeypatch.setattr(coordinator, "path_of", lambda org, digest: wrong)
    store = FileStore(tmp_path / "org-files")
    with pytest.raises(VerificationError, match="digest"):
        client.pull(DIGEST, store)
    assert not store.has(DIGEST)


def test_a_pull_of_what_is_not_there_says_so(client, tmp_path):
    with pytest.raises(StateError, match="not there"):
        client.pull(DIGEST, FileStore(tmp_path / "org-files"))


# Ports, proxies, patience


def test_a_second_coordinator_cannot_take_the_port(server, federation, coordinator):
    with pytest.raises(StateError, match="free"):
        serve_link(f"127.0.0.1:{server.port}", coordinator, federation.coordinator_tls("second"))


def test_nobody_there_is_a_connect_error_within_patience(federation, tmp_path, vector):
    tls = federation.org_tls("clinic")
    with LinkClient("127.0.0.1:1", tls, patience_seconds=0.5) as client:
        with pytest.raises(ConnectError):
            client.hello({})
        started = time.monotonic()
        with pytest.raises(ConnectError):
            client.push(vector, DIGEST, CONTEXT)
        assert time.monotonic() - started < 10


def test_environment_proxies_are_not_used(server, federation, monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with connect(server, federation.org_tls("clinic")) as client:
        assert client.hello({})["you"] == "clinic"


def test_a_proxy_that_grpc_would_ignore_is_refused(server, federation):
    with pytest.raises(ConfigError, match="proxy"), connect(server, federation.org_tls("clinic"), proxy="https://p:1"):
        pass


def test_the_port_follows_a_renewed_server_certificate(federation, coordinator):
    tls = federation.coordinator_tls()
    running = serve_link("127.0.0.1:0", coordinator, tls)
    try:
        clinic = federation.org_tls("clinic")
        with connect(running, clinic) as client:
            client.hello({})
        renewed = federation.coordinator_tls("renewed")
        os.replace(renewed.key, tls.key)
        os.replace(renewed.certificate, tls.certificate)
        os.utime(tls.certificate, ns=(0, time.time_ns() + 10**9))
        assert shown_serial(running.port) == tls.read().certificate.serial_number
        tls.certificate.write_bytes(b"nothing")  # A bad file changes nothing.
        os.utime(tls.certificate, ns=(0, time.time_ns() + 2 * 10**9))
        with connect(running, clinic) as client:
            client.hello({})
    finally:
        running.stop(0.1)


def shown_serial(port: int) -> int:
    return x509.load_pem_x509_certificate(ssl.get_server_certificate(("127.0.0.1", port)).encode()).serial_number
