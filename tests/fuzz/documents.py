"""Parsers of documents that arrive over the link or at enrolment, each with documents that pass."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from conftest import League
from cryptography.hazmat.primitives.serialization import Encoding
from foedus_client import membership
from foedus_client.budget import budget_check
from foedus_client.config import Membership
from foedus_client.ledger import Ledger
from foedus_client.work import (
    CheckTask,
    EvaluateTask,
    Reply,
    Request,
    Setup,
    SetupReply,
    StepTermsTask,
    Task,
    TrainTask,
)
from foedus_client.worker_process import error_of
from foedus_protocols import messages, packing
from foedus_protocols.authorities import open_authorities, sign_authorities
from foedus_protocols.canonical import canonical_bytes, digest, parse_canonical
from foedus_protocols.certificates import (
    CertificateAuthority,
    certificate_name,
    check_own_certificate,
    half_life,
    is_ca,
    make_request,
    parse_certificate,
    parse_certificates,
    parse_der_certificate,
)
from foedus_protocols.charter import sign_charter, verify_agreement
from foedus_protocols.charter_checks import Limits, OrgView, UnitNamespace, check_charter
from foedus_protocols.envelope import open_envelope, seal
from foedus_protocols.errors import VerificationError
from foedus_protocols.hello import Authorities, HelloAnswer, HelloRequest, negotiate
from foedus_protocols.identity import generate_tls_key, key_fingerprint, sign, spki_fingerprint
from foedus_protocols.manifest import Manifest
from foedus_protocols.messages import Agreement
from foedus_protocols.receipt import Receipt, open_receipt, sign_receipt
from foedus_protocols.roster import ROSTER_CONTEXT, SignedRoster
from foedus_protocols.v1 import envelope_pb2
from fuzz import mutate
from fuzz.watch import Target

_DIGEST = "d" * 64
_SIGNATURE = "5" * 128


NAMES = (
    "charter", "agreement", "bodies", "envelope", "receipt", "hello-request", "hello-answer", "roster", "certificate",
    "certificate-shown", "certificate-request", "authorities", "worker-request", "worker-reply", "manifest", "words",
)  # fmt: skip


def targets(scratch: Path, stack: ExitStack) -> Iterator[Target]:
    """Every parser of a document."""
    scratch.mkdir(parents=True, exist_ok=True)
    league = League()
    yield from _charters(league, Ledger(scratch / "ledger.db"))
    yield from _messages(league)
    yield from _members(league)
    yield from _certificates(league)
    yield from _worker()
    yield _manifest()
    yield _words()


def _charters(league: League, ledger: Ledger) -> Iterator[Target]:
    private = league.draft()
    plain = league.draft(
        privacy={"mode": "none", "rounds": 2}, evaluation={"term": "plain"}, release={"adapter": "best"}, seed=3
    )
    limits = Limits(
        coordinators=frozenset({league.operator_key}),
        minimum_members=2,
        peers={org: key_fingerprint(league.public(org)) for org in ("ash", "cedar")},
        namespaces={
            "research": UnitNamespace(name="patients", unit="patient", units_at_most=256, epsilon_cap=8.0, delta=1e-5)
        },
        allow_unprotected=True,
        evaluation=frozenset({"none", "plain"}),
        max_tokens=1 << 20,
        max_records_per_unit=1 << 20,
        max_rounds=1 << 20,
        max_rate=1e9,
        max_rank=1 << 20,
        min_survivors=2,
    )
    view = OrgView(
        org="birch",
        signing_key=league.public("birch"),
        federation=league.name,
        operator_key=league.operator_key,
        rosters=league.rosters,
        limits=limits,
        base_configs={league.base: league.config},
        budget=budget_check(ledger, limits, "sign"),
        now=float(league.now),
    )

    def offered(data: bytes) -> None:
        """A charter as a coordinator that lies signs and offers it; policy leaves open what it can."""
        named = digest(data)
        charter = check_charter(data, named, sign_charter(league.operator, named), view, stage="sign")
        charter.coding()
        charter.rule()
        charter.coding_key("run-1", 1)

    yield Target(
        name="charter",
        seeds=[private.canonical(), plain.canonical()],
        mutate=mutate.canonical,
        parse=offered,
        memory_bytes=512 << 20,  # The accountant's tables.
        hang_seconds=60.0,
    )
    agreement = league.agreement(private)
    yield Target(
        name="agreement",
        seeds=[agreement.encode()],
        mutate=mutate.canonical,
        parse=lambda data: verify_agreement(private, Agreement.decode(data), league.operator_key),
    )


def _messages(league: League) -> Iterator[Target]:
    bodies = _bodies()
    kinds = list(bodies)
    seeds = [canonical_bytes({"kind": kind, "body": json.loads(body.encode())}) for kind, body in bodies.items()]

    def decode(data: bytes) -> None:
        """The shape that a message's type names; where that is unreadable, every shape."""
        try:
            outer = json.loads(data)
            named, inner = [str(outer["kind"])], canonical_bytes(outer["body"])
        except (ValueError, TypeError, KeyError, RecursionError):
            named, inner = kinds, data
        for kind in named if named[0] in bodies else kinds:
            type(bodies[kind]).decode(inner)

    yield Target(
        name="bodies",
        seeds=seeds,
        mutate=mutate.canonical,
        parse=decode,
        memory_bytes=4 * messages.MAX_HISTORY_BYTES,  # A history is read as a whole.
    )

    def sealed(body: bytes) -> bytes:
        return seal(
            league.keys["ash"], type="train", federation=league.name, run="run-1", round=1, attempt=1, sender="ash",
            receiver="coordinator", sequence=4, body=body, reply_to=_DIGEST,
        ).encode()  # fmt: skip

    yield Target(
        name="envelope",
        seeds=[sealed(bodies["train"].encode()), sealed(b""), sealed(b"x" * 5000)],
        mutate=mutate.message(envelope_pb2.Envelope, {"header": mutate.canonical, "body": mutate.bytewise}),
        parse=lambda data: open_envelope(
            data, public_key=league.public("ash"), sender="ash", receiver="coordinator", federation=league.name
        ),
    )
    receipt = sign_receipt(
        league.operator, federation=league.name, run="run-1", round=1, org="ash", digest=_DIGEST, size=4000,
        verdict="included", time=league.now,
    )  # fmt: skip
    yield Target(
        name="receipt",
        seeds=[receipt.encode()],
        mutate=mutate.canonical,
        parse=lambda data: open_receipt(
            data, operator_key=league.operator_key, federation=league.name, run="run-1", round=1, org="ash",
            digest=_DIGEST, size=4000,
        ),
    )  # fmt: skip
    yield from _hellos(league, receipt)


def _hellos(league: League, receipt: Receipt) -> Iterator[Target]:
    key = generate_tls_key()
    ca = CertificateAuthority.create(league.name)
    request = HelloRequest(
        protocol=1, minor=1, version="0.2.0", org="ash", receipts_from=3, authorities=[_DIGEST],
        request=make_request(key, "ash").decode(),
    )  # fmt: skip

    def asked(data: bytes) -> None:
        said = HelloRequest.decode(_object(data))
        negotiate(said, us="coordinator", them="organisation")
        if said.request is not None:
            ca.issue_certificate(said.request.encode(), org="ash", federation=league.name)

    yield Target(name="hello-request", seeds=[canonical_bytes(request.encode())], mutate=mutate.canonical, parse=asked)

    signed = SignedRoster.make(league.operator, league.rosters[-1])
    answer = HelloAnswer(
        protocol=1, minor=1, version="0.2.0", federation=league.name, org="ash", operator_key=league.operator_key,
        roster_digest=signed.roster.digest, roster_version=3, roster_signature=signed.signature,
        server_time=float(league.now), receipts=[{"charter": _DIGEST, "receipt": receipt}], receipts_total=1,
        authorities=sign_authorities(league.operator, league.name, [ca.certificate]), renew=True,
        certificate=ca.issue_certificate(make_request(key, "ash"), org="ash", federation=league.name).decode(),
    )  # fmt: skip
    us = Membership(org="ash", federation=league.name, operator_key=league.operator_key, link="127.0.0.1:1", proxy=None)

    def told(data: bytes) -> None:
        said = membership.open_hello(_object(data), us)
        if said.authorities is not None:
            open_authorities(said.authorities, operator_key=us.operator_key, federation=us.federation)
        if said.certificate is not None:
            for certificate in parse_certificates(said.certificate.encode()):
                check_own_certificate(certificate, key=key, cas=[ca.certificate])

    yield Target(name="hello-answer", seeds=[canonical_bytes(answer.encode())], mutate=mutate.canonical, parse=told)


def _members(league: League) -> Iterator[Target]:
    def signed(data: bytes) -> bytes:
        """The operator's signature over whatever roster is in there: a coordinator that lies."""
        try:
            value = json.loads(data)
            value["signature"] = sign(league.operator, ROSTER_CONTEXT, canonical_bytes(value["roster"]))
            return canonical_bytes(value)
        except (ValueError, TypeError, KeyError, RecursionError):
            return data

    yield Target(
        name="roster",
        seeds=[SignedRoster.make(league.operator, roster).encode() for roster in league.rosters],
        mutate=lambda rng, seeds: signed(mutate.canonical(rng, seeds)),
        parse=lambda data: SignedRoster.open(data, operator_key=league.operator_key, federation=league.name),
    )


def _certificates(league: League) -> Iterator[Target]:
    ca = CertificateAuthority.create(league.name)
    key = generate_tls_key()
    leaf = ca.issue_certificate(make_request(key, "ash"), org="ash", federation=league.name)
    server = ca.issue_server_certificate(key.public_key(), federation=league.name, hosts=["127.0.0.1", "a.example"])

    def read(data: bytes) -> None:
        for certificate in parse_certificates(data):
            is_ca(certificate)
            half_life(certificate)
            certificate_name(certificate)
            check_own_certificate(certificate, key=key, cas=[ca.certificate])

    yield Target(name="certificate", seeds=[leaf, server, leaf + ca.pem], mutate=_pem, parse=read)

    def shown(data: bytes) -> None:
        """A chain that a server shows before anybody trusts it."""
        certificate = parse_der_certificate(data)
        if is_ca(certificate) and spki_fingerprint(certificate) != ca.fingerprint:
            raise VerificationError("another CA")

    yield Target(
        name="certificate-shown",
        seeds=[parse_certificate(pem).public_bytes(Encoding.DER) for pem in (ca.pem, leaf, server)],
        mutate=mutate.bytewise,
        parse=shown,
    )
    yield Target(
        name="certificate-request",
        seeds=[make_request(key, "ash"), make_request(generate_tls_key(), "birch")],
        mutate=_pem,
        parse=lambda data: ca.issue_certificate(data, org="ash", federation=league.name),
    )
    signed = sign_authorities(league.operator, league.name, [ca.certificate])

    def resigned(data: bytes) -> None:
        """A bundle with the operator's own signature over whatever it holds."""
        pem = data.decode("utf-8", "replace")
        signature = sign(
            league.operator, "foedus/authorities/1", canonical_bytes({"federation": league.name, "pem": pem})
        )
        bundle = Authorities.model_construct(pem=pem, signature=signature)
        open_authorities(bundle, operator_key=league.operator_key, federation=league.name)

    yield Target(name="authorities", seeds=[signed.pem.encode()], mutate=_pem, parse=resigned)


def _worker() -> Iterator[Target]:
    terms = StepTermsTask(
        private=True, l2_clip_norm=1.0, noise_multiplier=2.0, sampling_prob=0.1, expected_units=8.0, seed=None
    )
    setup = Setup(
        base="/base", base_digest=_DIGEST, rank=4, alpha=8.0, adapter_seed="s", layout_digest=_DIGEST,
        files=["/data/a.jsonl"], units="patient", columns={}, split_key="0" * 64, max_tokens=64, max_records_per_unit=2,
    )  # fmt: skip
    tasks: dict[str, Task] = {
        "setup": setup,
        "check": CheckTask(terms=terms, steps=3, delta=1e-5, epsilon=8.0),
        "train": TrainTask(terms=terms, org="ash", round=1, adapter="a", output="o"),
        "evaluate": EvaluateTask(adapter="a", max_records=3),
    }

    def asked(data: bytes) -> None:
        request = Request.decode(data)
        type(tasks[request.kind]).decode(request.body.encode("utf-8", "surrogatepass"))

    def answered(data: bytes) -> None:
        reply = Reply.decode(data)
        if reply.error is not None:
            raise error_of(reply)
        SetupReply.decode((reply.body or "").encode("utf-8", "surrogatepass"))

    yield Target(
        name="worker-request",
        seeds=[
            Request.model_validate({"kind": kind, "body": task.encode().decode()}).encode()
            for kind, task in tasks.items()
        ],
        mutate=_nested("body"),
        parse=asked,
    )
    yield Target(
        name="worker-reply",
        seeds=[
            Reply(body=SetupReply(train_units=3, heldout_units=1, device="cpu").encode().decode()).encode(),
            Reply(error="DataError", text="expected a file").encode(),
            Reply(error="PolicyRefused", text="no", step=7).encode(),
            Reply(error="FoedusError", text="x").encode(),
        ],
        mutate=_nested("body"),
        parse=answered,
    )


def _manifest() -> Target:
    folder = Path(__file__).parents[2] / "model" / "foedus_model" / "tiny"
    return Target(
        name="manifest",
        seeds=[(folder / "manifest.json").read_bytes()],
        mutate=mutate.canonical,
        parse=Manifest.decode,
    )


def _words() -> Target:
    """Words arrive as bytes of a length that the charter fixes; what is packed in them is anybody's."""
    seeds = [bytes([bits]) + packing.pack(_sevens(bits), bits) for bits in packing.RING_BITS]

    def unpack(data: bytes) -> None:
        bits = data[0] if data else 0
        words = packing.unpack(data[1:], bits, 7)
        if packing.pack(words, bits) != data[1:]:
            raise AssertionError("words that are not what was packed")

    return Target(name="words", seeds=seeds, mutate=mutate.bytewise, parse=unpack)


def _bodies() -> dict[str, messages.Body]:
    order = {"charter_digest": _DIGEST, "agreement_digest": _DIGEST, "history_digest": _DIGEST, "round": 1}
    scores = messages.Scores(loss_sum=10.5, tokens=20, units=3)
    closed = messages.ClosedRound(
        round=1, attempt=1, survivors=["ash", "birch"], sum_digest=_DIGEST, adapter_digest=_DIGEST
    )
    made: list[messages.Body] = [
        messages.CharterOffer(charter_digest=_DIGEST, operator_signature=_SIGNATURE),
        messages.CharterAnswer(signature=_SIGNATURE),
        messages.TrainOrder(**order, attempt=1, adapter_digest=_DIGEST, deadline=1.8e9, evaluate=True),
        messages.TrainAnswer(vector_digest=_DIGEST, vector_bytes=4000, scores=scores),
        messages.AdvanceOrder(charter_digest=_DIGEST, round=1, history_digest=_DIGEST),
        messages.AdvanceAnswer(adapter_digest=_DIGEST),
        messages.EvaluateOrder(**order, adapter_digest=_DIGEST, deadline=1.8e9),
        messages.EvaluateAnswer(scores=scores),
        messages.CloseNotice(charter_digest=_DIGEST, outcome="failed", reason="nobody came"),
        messages.CloseAnswer(),
        messages.History(charter_digest=_DIGEST, rounds=[closed, closed]),
    ]
    named: dict[str, messages.Body] = {type(body).__name__: body for body in made}
    return {"train": named["TrainAnswer"], **named}


def _sevens(bits: int) -> Any:
    return np.arange(-3, 4, dtype=np.int64) * (1 << (bits - 4))


def _object(data: bytes) -> dict[str, Any]:
    """As the link does: canonical JSON, and an object."""
    value = parse_canonical(data)
    if not isinstance(value, dict):
        raise VerificationError("expected an object")
    return value


def _pem(rng: Any, seeds: Any) -> bytes:
    """PEM with its DER changed, or its text."""
    if rng.random() < 0.3:
        return mutate.bytewise(rng, seeds)
    text = rng.choice(seeds)
    head, _, rest = text.partition(b"-----\n")
    body, _, tail = rest.partition(b"-----END")
    der = mutate.bytewise(rng, [base64.b64decode(body)])
    return head + b"-----\n" + base64.encodebytes(der) + b"-----END" + tail


def _nested(field: str) -> mutate.Mutator:
    """JSON that carries JSON in a string."""

    def change(rng: Any, seeds: Any) -> bytes:
        outer = json.loads(rng.choice(seeds))
        if rng.random() < 0.6 and isinstance(outer.get(field), str):
            inner = mutate.json_bytes(rng, [outer[field].encode()])
            outer[field] = inner.decode("utf-8", "replace")
            return json.dumps(outer).encode()
        return mutate.json_bytes(rng, seeds)

    return change
