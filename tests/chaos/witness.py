"""What is seen from outside while a federation suffers: bytes that would be erased, and how long each recovery takes.

One thread looks at folders, logs and the coordinator's database several times a second, and changes nothing. It keeps

* the words of every vector (as hard links), so that each published sum can be added up again at the end;
* the digest of every vector of which a part was ever at the coordinator;
* every receipt that the coordinator's database ever showed;
* for each trouble the seconds until the first sign of life after it.

A **sign of life** of an organisation is an answer or a call that the coordinator wrote down, or its daemon's word that
it is connected or that its worker works; of a worker, an answer or its daemon's word that it works; of the coordinator,
an answer, a call or a connection of any organisation.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sqlite3
import threading
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

_LOOK_SECONDS = 0.1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
_CONNECTED = "connected to"
_WORKING = ("worker ready", "trained (")


@dataclass(kw_only=True)
class Recovery:
    """One trouble, from the moment at which recovery was possible.

    Attributes:
        org: Whose sign of life is waited for; empty for anybody's.
        working: Whether it has to be one of the worker.
        since: Unix seconds.
        seconds: How long it took; None while it is not over.
        superseded: Another trouble came first, so that this one's seconds say nothing.
    """

    org: str
    working: bool
    since: float = math.inf
    seconds: float | None = None
    superseded: bool = False

    @property
    def over(self) -> bool:
        """Nothing is waited for any more."""
        return self.superseded or self.seconds is not None


@dataclass(kw_only=True)
class Evidence:
    """What the witness has seen.

    Attributes:
        words: Folder with the words of every vector, named by digest.
        reached: Digests of vectors of which a part was at the coordinator.
        acknowledged: (run, round, org) to digest, of receipts that said `included`.
        contradictions: What was acknowledged and then was not, or was something else.
        recoveries: One for each trouble.
    """

    words: Path
    reached: set[str] = field(default_factory=set)
    acknowledged: dict[tuple[str, int, str], str] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)


class Witness:
    """Watches one federation from its start to its end."""

    def __init__(self, coordinator: Path, homes: dict[str, Path], logs: Path, words: Path) -> None:
        self.evidence = Evidence(words=words)
        self._coordinator = coordinator
        self._homes = homes
        self._logs = {org: logs / f"{org}.log" for org in homes}
        self._read: dict[str, int] = {}
        self._called = dict.fromkeys(homes, 0.0)  # Both ends of the link live.
        self._working = dict.fromkeys(homes, 0.0)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="witness", daemon=True)
        words.mkdir(parents=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> Evidence:
        """Look a last time, and hand over what was seen."""
        self._stop.set()
        self._thread.join()
        self._look()
        return self.evidence

    def recovery(self, org: str, *, working: bool) -> Recovery:
        """Wait for a sign of life, once `since` is set; what was waited for of the same party is superseded."""
        with self._lock:
            for other in self.evidence.recoveries:
                if not other.over and (not org or not other.org or other.org == org):
                    other.superseded = True
            begun = Recovery(org=org, working=working)
            self.evidence.recoveries.append(begun)
        return begun

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        self._keep_words()
        self._note_parts()
        for org in self._homes:
            self._read_log(org)
        with contextlib.suppress(sqlite3.Error):  # Locked, or in the middle of a restart: the next look sees it.
            self._read_database()
        self._judge_recoveries()

    def _keep_words(self) -> None:
        for folder in (*(home / "files" for home in self._homes.values()), self._coordinator / "vectors"):
            for path in folder.glob("??/*"):
                kept = self.evidence.words / path.name
                if not kept.exists():
                    with contextlib.suppress(FileNotFoundError, FileExistsError):
                        os.link(path, kept)

    def _note_parts(self) -> None:
        for path in (self._coordinator / "vectors").rglob("*"):
            if found := _DIGEST.match(path.name):
                self.evidence.reached.add(found.group())

    def _read_log(self, org: str) -> None:
        log = self._logs[org]
        if not log.exists():
            return
        with log.open("rb") as file:
            file.seek(self._read.get(org, 0))
            news = file.read()
        whole = news.rfind(b"\n") + 1
        self._read[org] = self._read.get(org, 0) + whole
        for line in news[:whole].decode(errors="replace").splitlines():
            stamp = _STAMP.match(line)
            working = any(sign in line for sign in _WORKING)
            if stamp is not None and (working or _CONNECTED in line):
                # What the line says, not when it was read: it may stand there since before the trouble.
                moment = datetime.strptime(stamp.group(), "%Y-%m-%d %H:%M:%S,%f").timestamp()
                _note(self._working if working else self._called, org, moment)

    def _read_database(self) -> None:
        with contextlib.closing(_open(self._coordinator / "coordinator.db")) as database:
            for org, seen in database.execute("SELECT org, last_seen FROM nodes WHERE last_seen IS NOT NULL"):
                _note(self._called, org, seen)
            query = "SELECT org, max(answered_at) FROM messages WHERE answered_at IS NOT NULL GROUP BY org"
            for org, answered in database.execute(query):
                _note(self._called, org, answered)
                _note(self._working, org, answered)
            rows = database.execute("SELECT run, round, org, digest FROM vectors WHERE verdict = 'included'").fetchall()
        now = {(run, number, org): digest for run, number, org, digest in rows}
        for key, digest in self.evidence.acknowledged.items():
            if now.get(key) != digest:
                self.evidence.contradictions.append(f"{key}: acknowledged {digest[:12]}, later {now.get(key)}")
        self.evidence.acknowledged |= now

    def _judge_recoveries(self) -> None:
        with self._lock:
            for one in self.evidence.recoveries:
                if not one.org:
                    sign = max(self._called.values())
                elif one.working:
                    sign = self._working[one.org]
                else:
                    sign = max(self._called[one.org], self._working[one.org])
                if not one.over and sign > one.since:
                    one.seconds = sign - one.since


def _note(signs: dict[str, float], org: str, moment: float) -> None:
    signs[org] = max(signs[org], moment)


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0)
