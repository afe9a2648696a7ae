"""What an organisation's daemon remembers between two instants: one SQLite file, durable before it is acted upon.

Four things live here, and the privacy ledger does not (`ledger.py` has a file of its own, since it outlives
coordinators):

* **mail**: the answer to every message, so that a message that comes twice is answered with the same bytes;
* **charters**: what was offered, what a person or the policy decided, what was signed, how it ended;
* **rounds**: the coded words of a round by digest, its scores and its receipt: drawn once, sent as often as needed;
* **departures**: what left, when, and under which rule (the organisation's own log of the gate).

The command line opens the same file beside a running daemon: that is how a person's decision reaches it.
"""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foedus_protocols.errors import StateError, VerificationError
from foedus_protocols.messages import ClosedRound, Scores

from foedus_client.database import Database

CharterState = Literal["offered", "approved", "declined", "refused", "signed", "agreed", "left", "closed"]
Receipt = dict[str, object]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS mail (
    message TEXT PRIMARY KEY, sequence INTEGER NOT NULL UNIQUE, answer BLOB NOT NULL, delivered INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS charters (
    digest TEXT PRIMARY KEY, run TEXT NOT NULL, name TEXT NOT NULL, purpose TEXT NOT NULL,
    operator_signature TEXT NOT NULL, state TEXT NOT NULL, refused_step INTEGER, reason TEXT NOT NULL,
    signature TEXT, agreement TEXT, checked INTEGER NOT NULL, offered_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS history (
    charter TEXT NOT NULL, position INTEGER NOT NULL, entry TEXT NOT NULL, PRIMARY KEY (charter, position));
CREATE TABLE IF NOT EXISTS rounds (
    charter TEXT NOT NULL, round INTEGER NOT NULL, words TEXT NOT NULL, words_bytes INTEGER NOT NULL, receipt TEXT,
    PRIMARY KEY (charter, round));
CREATE TABLE IF NOT EXISTS scores (
    charter TEXT NOT NULL, after INTEGER NOT NULL, scores TEXT, PRIMARY KEY (charter, after));
CREATE TABLE IF NOT EXISTS departures (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, charter TEXT, round INTEGER, digest TEXT,
    bytes INTEGER NOT NULL, rule TEXT NOT NULL);
"""


@dataclass(frozen=True, kw_only=True)
class CharterRecord:
    """One charter as this organisation knows it.

    Attributes:
        digest: The charter's digest, also the name of its file in the store.
        run: The coordinator's name for the run, fixed at the first offer.
        state: offered (nobody decided), approved or declined (a person did), refused (a check failed), signed, agreed
            (everybody signed), left (a person took us out of the run), closed.
        refused_step: The number of the failed check: what left of a refusal.
        reason: The refusal's or the ending's text, which stays here.
        checked: The sensitivity and noise checks of this run have passed.
    """

    digest: str
    run: str
    name: str
    purpose: str
    operator_signature: str
    state: CharterState
    refused_step: int | None
    reason: str
    signature: str | None
    agreement: str | None
    checked: bool
    offered_at: float


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """The coded words of one round, and the coordinator's receipt for them once there is one."""

    charter: str
    round: int
    words: str
    words_bytes: int
    receipt: Receipt | None


@dataclass(frozen=True, kw_only=True)
class Departure:
    """One thing that left the organisation, and the rule that let it."""

    at: float
    kind: str
    charter: str | None
    round: int | None
    digest: str | None
    bytes: int
    rule: str


class ClientState(Database):
    """The daemon's durable memory. Every method is one transaction; nothing is cached.

    Guarantees:
        `save_words` keeps the first digest of a round for ever: a second one is refused, so two sets of words of one
        round can never both leave.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, _SCHEMA)

    def next_sequence(self) -> int:
        """The next number for an envelope of ours: strictly increasing, also across restarts."""
        with self._write() as db:
            row = db.execute("SELECT value FROM facts WHERE name = 'sequence'").fetchone()
            number = 1 if row is None else int(row["value"]) + 1
            db.execute("INSERT OR REPLACE INTO facts VALUES ('sequence', ?)", (str(number),))
        return number

    # Mail.

    def answer_to(self, message: str) -> bytes | None:
        """The answer that was given to a message (by its digest), to be sent again as it is."""
        row = self._one("SELECT answer FROM mail WHERE message = ?", message)
        return None if row is None else bytes(row["answer"])

    def require_unused(self, sequence: int) -> None:
        """Check, before a new message is acted on, that no other message with its number was answered.

        Raises:
            VerificationError: One was: numbers are used once.
        """
        if self._one("SELECT 1 FROM mail WHERE sequence = ?", sequence) is not None:
            raise VerificationError(f"expected a message with a number of its own, got a second one with {sequence}")

    def save_answer(self, message: str, sequence: int, answer: bytes) -> bytes:
        """Store an answer before it leaves. The first one stands, and is returned.

        Raises:
            VerificationError: Another message with this number was answered: numbers are used once.
        """
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO mail VALUES (?, ?, ?, 0)", (message, sequence, answer))
        stored = self.answer_to(message)
        if stored is None:
            self.require_unused(sequence)
            raise StateError("expected an answer in client.db right after it was saved")
        return stored

    def mark_delivered(self, message: str) -> None:
        """Note that the coordinator has an answer."""
        with self._write() as db:
            db.execute("UPDATE mail SET delivered = 1 WHERE message = ?", (message,))

    # Charters.

    def note_offer(self, *, digest: str, run: str, name: str, purpose: str, operator_signature: str) -> CharterRecord:
        """Remember an offered charter; a repeated offer changes nothing.

        Raises:
            VerificationError: The same charter was offered under another run before, or another charter under this run:
                receipts name a run, and must lead to one charter.
        """
        with self._write() as db:
            other = db.execute("SELECT digest FROM charters WHERE run = ? AND digest != ?", (run, digest)).fetchone()
            if other is not None:
                raise VerificationError(
                    f"expected one charter in run {run}, got {digest[:12]} beside {other['digest'][:12]}"
                )
            db.execute(
                "INSERT OR IGNORE INTO charters VALUES (?, ?, ?, ?, ?, 'offered', NULL, '', NULL, NULL, 0, ?)",
                (digest, run, name, purpose, operator_signature, time.time()),
            )
        record = self.charter(digest)
        if record.run != run:
            raise VerificationError(f"expected charter {digest[:12]} in run {record.run}, got it in run {run}")
        return record

    def charter(self, digest: str) -> CharterRecord:
        """A charter by its digest, or by an unambiguous beginning of at least four characters.

        Raises:
            StateError: Unknown, or several begin like this.
        """
        if len(digest) < 4 or not set(digest) <= set("0123456789abcdef"):
            raise StateError(f"expected at least four hexadecimal characters of a charter's digest, got {digest!r}")
        rows = self._all("SELECT * FROM charters WHERE digest LIKE ? || '%'", digest)
        if len(rows) != 1:
            raise StateError(
                f"expected one charter that begins with {digest[:12]}, found {len(rows)}; "
                "see `foedus client charter list`"
            )
        return _charter(rows[0])

    def knows(self, digest: str) -> bool:
        """Whether this charter was ever offered here."""
        return self._one("SELECT 1 FROM charters WHERE digest = ?", digest) is not None

    def charters(self) -> list[CharterRecord]:
        """Every charter, oldest first."""
        rows = self._all("SELECT * FROM charters ORDER BY offered_at, digest")
        return [_charter(row) for row in rows]

    def decide(self, digest: str, *, approve: bool, reason: str = "") -> CharterRecord:
        """A person's decision on an offered charter.

        Raises:
            StateError: The charter is no longer waiting for one.
        """
        record = self.charter(digest)
        wanted = "approved" if approve else "declined"
        with self._write() as db:
            changed = db.execute(
                "UPDATE charters SET state = ?, reason = ? WHERE digest = ? AND state IN ('offered', ?)",
                (wanted, reason, record.digest, wanted),
            ).rowcount
        if not changed:
            raise StateError(f"expected charter {record.digest[:12]} to wait for a decision, it is {record.state}")
        return self.charter(record.digest)

    def mark_refused(self, digest: str, *, step: int, reason: str) -> None:
        """A numbered check failed: the number leaves, the reason stays."""
        self._set(digest, "state = 'refused', refused_step = ?, reason = ?", (step, reason))

    def mark_signed(self, digest: str, signature: str) -> None:
        """Our signature is given."""
        self._set(digest, "state = 'signed', signature = ?", (signature,))

    def mark_agreed(self, digest: str, agreement: str) -> None:
        """Everybody has signed."""
        self._set(digest, "state = 'agreed', agreement = ?", (agreement,))

    def mark_left(self, digest: str, reason: str) -> None:
        """A person took us out of the run; nothing brings us back into it, and its end does not make that forgotten."""
        self.remember(f"left:{digest}", reason)
        self._set(digest, "state = 'left', reason = ?", (reason,))

    def was_left(self, digest: str) -> bool:
        """Whether a person took us out of this charter's run, also long ago."""
        return self.fact(f"left:{digest}") is not None

    def mark_checked(self, digest: str) -> None:
        """The sensitivity and noise checks passed for this run."""
        self._set(digest, "checked = 1", ())

    def mark_closed(self, digest: str, reason: str) -> None:
        """The run is over; where we said no ourselves, our own reason stays."""
        kept = "CASE WHEN state IN ('refused', 'declined', 'left') THEN reason ELSE ? END"
        self._set(digest, f"state = 'closed', reason = {kept}", (reason,))

    def _set(self, digest: str, assignment: str, values: tuple[object, ...]) -> None:
        with self._write() as db:
            # The assignment is one of the constants above, never input.
            changed = db.execute(f"UPDATE charters SET {assignment} WHERE digest = ?", (*values, digest)).rowcount  # nosec B608
        if changed != 1:
            raise StateError(f"expected a known charter, got {digest[:12]}; was client.db restored from a backup?")

    # The closed rounds of a run, as this organisation replayed them.

    def history(self, charter: str) -> list[ClosedRound]:
        """The entries that were replayed and found right, oldest first."""
        rows = self._all("SELECT entry FROM history WHERE charter = ? ORDER BY position", charter)
        return [ClosedRound.model_validate(json.loads(row["entry"])) for row in rows]

    def append_history(self, charter: str, position: int, entry: ClosedRound) -> None:
        """Add the entry at a position; the same entry again changes nothing, another one is refused.

        Raises:
            VerificationError: Another entry stands at this position.
        """
        text = entry.encode().decode()
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO history VALUES (?, ?, ?)", (charter, position, text))
            row = db.execute(
                "SELECT entry FROM history WHERE charter = ? AND position = ?", (charter, position)
            ).fetchone()
        if row["entry"] != text:
            raise VerificationError(f"expected the history seen before, entry {position} has been rewritten")

    # Rounds.

    def round(self, charter: str, number: int) -> RoundRecord | None:
        """What is known of a round, or None."""
        row = self._one("SELECT * FROM rounds WHERE charter = ? AND round = ?", charter, number)
        return None if row is None else _round(row)

    def save_words(self, charter: str, number: int, *, digest: str, size: int) -> None:
        """Name the coded words of a round, before anything is reserved for them.

        Raises:
            StateError: The round has other words already.
        """
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO rounds VALUES (?, ?, ?, ?, NULL)", (charter, number, digest, size))
        record = self.round(charter, number)
        if record is None or record.words != digest:
            raise StateError(f"expected one set of words in round {number}, got a second one")

    def scores(self, charter: str, after: int) -> tuple[bool, Scores | None]:
        """Whether the adapter after so many closed rounds was scored, and the scores (None: nothing is held out)."""
        row = self._one("SELECT scores FROM scores WHERE charter = ? AND after = ?", charter, after)
        if row is None or row["scores"] is None:
            return row is not None, None
        return True, Scores.model_validate(json.loads(row["scores"]))

    def save_scores(self, charter: str, after: int, scores: Scores | None) -> None:
        """Keep an adapter's held-out scores, so that a repeated answer says the same."""
        text = None if scores is None else scores.encode().decode()
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", (charter, after, text))

    def last_scored(self, charter: str) -> int | None:
        """After how many closed rounds the run's last scores were asked for; None while they were not."""
        text = self.fact(f"last-scored:{charter}")
        return None if text is None else int(text)

    def mark_last_scored(self, charter: str, after: int) -> int:
        """Note that the run's last scores are asked for; the first call stands, and its number is returned."""
        return int(self.remember_first(f"last-scored:{charter}", str(after)))

    def save_receipt(self, charter: str, number: int, receipt: Receipt) -> None:
        """Keep the coordinator's receipt for a round's words."""
        with self._write() as db:
            db.execute(
                "UPDATE rounds SET receipt = ? WHERE charter = ? AND round = ?",
                (json.dumps(receipt, sort_keys=True), charter, number),
            )

    def restore_round(self, charter: str, number: int, *, words: str, size: int, receipt: Receipt) -> None:
        """Take over a round that this memory forgot, from the coordinator's receipt; what is known stays as it is."""
        with self._write() as db:
            db.execute(
                "INSERT OR IGNORE INTO rounds VALUES (?, ?, ?, ?, ?)",
                (charter, number, words, size, json.dumps(receipt, sort_keys=True)),
            )

    def rounds(self, charter: str) -> list[RoundRecord]:
        """Every round of a charter that left a trace here."""
        rows = self._all("SELECT * FROM rounds WHERE charter = ? ORDER BY round", charter)
        return [_round(row) for row in rows]

    # Departures.

    def note_departure(self, departure: Departure) -> None:
        """Write down what is about to leave; `gate.py` calls this before it sends."""
        with self._write() as db:
            db.execute(
                "INSERT INTO departures (at, kind, charter, round, digest, bytes, rule) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    departure.at,
                    departure.kind,
                    departure.charter,
                    departure.round,
                    departure.digest,
                    departure.bytes,
                    departure.rule,
                ),
            )

    def departures(self, *, kind: str | None = None, since: float = 0.0) -> list[Departure]:
        """What left since a moment, oldest first."""
        rows = self._all(
            "SELECT at, kind, charter, round, digest, bytes, rule FROM departures "
            "WHERE at >= ? AND (? IS NULL OR kind = ?) ORDER BY id",
            since,
            kind,
            kind,
        )
        return [Departure(**dict(row)) for row in rows]


def _charter(row: sqlite3.Row) -> CharterRecord:
    return CharterRecord(**{**dict(row), "checked": bool(row["checked"])})


def _round(row: sqlite3.Row) -> RoundRecord:
    receipt = row["receipt"]
    return RoundRecord(**{**dict(row), "receipt": None if receipt is None else json.loads(receipt)})
