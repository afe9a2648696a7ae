"""What the link's desk accepts, and from whom."""

from __future__ import annotations

from typing import Any

import pytest
from foedus_coordinator import service
from foedus_protocols.canonical import digest
from foedus_protocols.certificates import parse_certificate
from foedus_protocols.envelope import Envelope, seal
from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.files import DiskTrouble
from foedus_protocols.identity import COORDINATOR, verify
from foedus_protocols.messages import CharterAnswer, CharterOffer, CloseAnswer
from foedus_protocols.receipt import open_receipt
from foedus_protocols.roster import ROSTER_CONTEXT

OLD_HELLO = {"protocol": 1, "org": "alpha"}
"""What an organisation of protocol 1.0 says."""


@pytest.fixture
def offered(federation: Any) -> Any:
    """A federation whose charter has been offered to everybody."""
    charter = federation.start_run()
    run = federation.run()
    signature = federation.home.storage.run(federation.run_id).operator_signature
    body = CharterOffer(charter_digest=charter.digest, operator_signature=signature)
    run.ask("charter", dict.fromkeys(run.orgs, body))
    run.storage.close()
    for org in federation.orgs.values():
        org.run, org.charter = federation.run_id, charter
    return federation


def answer(federation: Any, org: str, question: Envelope, /, **changes: Any) -> bytes:
    """A right answer to a charter, or one with something changed."""
    header = question.header
    fields: dict[str, Any] = {
        "key": federation.orgs[org].key,
        "type": header.type,
        "federation": header.federation,
        "run": header.run,
        "round": header.round,
        "attempt": header.attempt,
        "sender": org,
        "receiver": COORDINATOR,
        "sequence": 1,
        "body": CharterAnswer(refused_step=6).encode(),
        "reply_to": question.digest,
    }
    fields |= changes
    return seal(fields.pop("key"), **fields).encode()


def asked(federation: Any, org: str) -> Envelope:
    data = federation.desk.poll(org, 0.0)
    assert data is not None
    return Envelope.decode(data)


def test_hello_names_the_roster_and_proves_it(federation: Any) -> None:
    said = federation.desk.hello("alpha", OLD_HELLO, "")
    roster = federation.home.members.roster()
    assert (said["roster_digest"], said["roster_version"]) == (roster.digest, 3)
    verify(said["operator_key"], ROSTER_CONTEXT, roster.canonical(), said["roster_signature"])
    assert federation.desk.path_of("alpha", said["roster_digest"]).read_bytes() == roster.canonical()
    assert federation.home.members.last_seen()["alpha"] is not None


def test_a_stranger_is_no_member(federation: Any) -> None:
    request = federation.home.members.requests("alpha")[0]
    serial = f"{parse_certificate(request.certificate_pem).serial_number:x}"
    federation.desk.check_member("alpha", serial)
    for org, other in (("alpha", "00"), ("stranger", "00"), ("beta", serial)):
        with pytest.raises(VerificationError, match=f"'{org}' was revoked, replaced or never issued"):
            federation.desk.check_member(org, other)


def test_a_message_is_not_handed_out_twice_in_a_row(offered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = offered.desk.poll("alpha", 0.0)
    assert first is not None
    assert offered.desk.poll("alpha", 0.0) is None
    offered.desk.hello("alpha", OLD_HELLO, "")  # A restarted daemon gets it at once.
    assert offered.desk.poll("alpha", 0.0) == first
    monkeypatch.setattr(service, "_HANDED_OUT_SECONDS", 0.0)
    assert offered.desk.poll("alpha", 0.0) == first


def test_a_right_answer_is_stored_and_may_come_again(offered: Any) -> None:
    question = asked(offered, "alpha")
    data = answer(offered, "alpha", question)
    offered.desk.deliver("alpha", data)
    offered.desk.deliver("alpha", data)
    assert offered.home.mailbox.answers([question.digest]) == {question.digest: data}
    with pytest.raises(StateError, match="another one"):
        offered.desk.deliver("alpha", answer(offered, "alpha", question, sequence=2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sender": "beta"}, "claims to be from 'beta'"),
        ({"federation": "other"}, "of federation 'test'"),
        ({"receiver": "beta"}, "addressed to 'beta'"),
        ({"run": "another"}, "expected an answer about"),
        ({"round": 1}, "expected an answer about"),
        ({"attempt": 1}, "expected an answer about"),
        ({"type": "close", "body": CloseAnswer().encode()}, "expected an answer about"),
        ({"body": b"{}x"}, "canonical JSON"),
        ({"body": b'{"signature":"short"}'}, "wrong or missing fields: signature"),
        ({"reply_to": None}, "answers none"),
    ],
)
def test_a_wrong_answer_is_refused_and_stores_nothing(offered: Any, changes: dict[str, Any], said: str) -> None:
    question = asked(offered, "alpha")
    with pytest.raises(VerificationError, match=said):
        offered.desk.deliver("alpha", answer(offered, "alpha", question, **changes))
    assert offered.home.mailbox.answers([question.digest]) == {}


def test_nobody_answers_in_anothers_name(offered: Any) -> None:
    question = asked(offered, "alpha")
    right = answer(offered, "alpha", question)
    with pytest.raises(VerificationError, match="from 'beta'"):
        offered.desk.deliver("beta", right)
    forged = answer(offered, "alpha", question, key=offered.orgs["beta"].key)
    with pytest.raises(VerificationError, match="signature"):
        offered.desk.deliver("alpha", forged)
    with pytest.raises(StateError, match="that beta was sent"):
        offered.desk.deliver("beta", answer(offered, "beta", question))
    assert offered.home.mailbox.answers([question.digest]) == {}


def test_files_are_for_the_participants(offered: Any) -> None:
    charter = offered.home.storage.run(offered.run_id).charter_digest
    assert offered.desk.path_of("alpha", charter).exists()
    with pytest.raises(VerificationError, match="stranger may pull"):
        offered.desk.path_of("stranger", charter)
    with pytest.raises(VerificationError, match="alpha may pull"):
        offered.desk.path_of("alpha", "c" * 64)


def test_a_vector_of_another_size_or_round_is_refused_before_a_byte(offered: Any) -> None:
    size = offered.orgs["alpha"].charter.coding().packed_bytes
    context = {"run": offered.run_id, "round": 1, "attempt": 1}
    with pytest.raises(StateError, match="never offered"):
        offered.desk.granted("alpha", "a" * 64, size, context)
    offered.home.storage.add_round(offered.run_id, 1, deadline=1.0, start_digest="a" * 64, history_digest="b" * 64)
    with pytest.raises(VerificationError, match=f"{size} bytes"):
        offered.desk.granted("alpha", "a" * 64, size + 1, context)
    with pytest.raises(VerificationError, match="'stranger'"):
        offered.desk.granted("stranger", "a" * 64, size, context)
    with pytest.raises(StateError, match="none named"):
        offered.desk.granted("alpha", "a" * 64, size, context | {"run": "other"})
    with pytest.raises(VerificationError, match="run and round"):
        offered.desk.granted("alpha", "a" * 64, size, {"run": 3})
    offered.desk.granted("alpha", "a" * 64, size, context).close()


def test_a_round_holds_one_vector_of_an_organisation(offered: Any) -> None:
    """A member that pushes one file after the other fills no disk: neither with parts nor with whole files."""
    alpha = offered.orgs["alpha"]
    offered.home.storage.add_round(offered.run_id, 1, deadline=1.0, start_digest="a" * 64, history_digest="b" * 64)
    words = alpha._words(1)
    context = {"run": offered.run_id, "round": 1}
    for name in ("a" * 64, "b" * 64, "c" * 64):
        with offered.desk.granted("alpha", name, len(words), context) as part:
            part.write(words[:-1])
    assert [path.name for path in offered.home.vectors.root.rglob("*.part")] == [f"{'c' * 64}.part"]
    alpha.push(words, 1)
    with pytest.raises(StateError, match="one round has one vector"):
        offered.desk.granted("alpha", "d" * 64, len(words), context)
    assert [path.name for path in offered.home.vectors.root.rglob("*") if path.is_file()] == [digest(words)]


def test_unfinished_vectors_of_many_rounds_fill_no_disk(offered: Any) -> None:
    """The newest four stay to be resumed; another member's are its own, also where they have the same name."""
    size = offered.orgs["alpha"].charter.coding().packed_bytes
    for number in range(1, 8):
        offered.home.storage.add_round(
            offered.run_id, number, deadline=1.0, start_digest="a" * 64, history_digest="b" * 64
        )
        with offered.desk.granted("alpha", f"{number}" * 64, size, {"run": offered.run_id, "round": number}) as part:
            part.write(b"begun")
        if number == 1:
            offered.desk.granted("beta", "1" * 64, size, {"run": offered.run_id, "round": 1}).close()
    parts = sorted(path.stem[0] for path in offered.home.vectors.root.rglob("*.part"))
    assert parts == ["1", "4", "5", "6", "7"]


def test_a_full_disk_is_no_reason_to_refuse_a_poll(offered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(org: str, at: float) -> None:
        raise DiskTrouble("expected to write, got: no space left")

    monkeypatch.setattr(offered.home.members, "seen", full)
    assert offered.desk.poll("alpha", 0.0) is not None


def test_a_receipt_is_the_operators(offered: Any) -> None:
    alpha = offered.orgs["alpha"]
    offered.home.storage.add_round(offered.run_id, 1, deadline=1.0, start_digest="a" * 64, history_digest="b" * 64)
    words = alpha._words(1)
    receipt = alpha.push(words, 1)
    row = offered.home.storage.vectors(offered.run_id, 1)[0]
    opened = open_receipt(
        row.receipt,
        operator_key=alpha.operator_key,
        federation="test",
        run=offered.run_id,
        round=1,
        org="alpha",
        digest=row.digest,
        size=len(words),
    )
    assert opened.verdict == receipt["verdict"] == "included"
    with pytest.raises(StateError, match="one round has one vector"):
        alpha.push(words[:-1] + bytes([words[-1] ^ 1]), 1)
