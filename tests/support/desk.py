"""The home of an organisation that was offered a charter, and the person there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from foedus_client import policy
from foedus_client.config import ClientConfig, Home
from foedus_client.membership import update_rosters
from foedus_client.policy import BaseEntry, DatasetEntry, Namespace
from foedus_client.state import ClientState
from foedus_model.presets import TINY
from foedus_protocols.charter import Charter
from foedus_protocols.cli import main
from foedus_protocols.identity import key_fingerprint, save_key
from foedus_protocols.manifest import read_config, read_manifest
from foedus_protocols.roster import SignedRoster
from foedus_protocols.store import FileStore

US = "ash"


class Desk:
    """The home of an organisation whose daemon has been offered a charter of epsilon 8, and the person there."""

    def __init__(self, folder: Path, league: Any, file: Path = Path("/d.jsonl"), **changes: Any) -> None:
        league.now, league.base, league.config = int(time.time()), read_manifest(TINY).digest, read_config(TINY)
        self.home = Home(folder)
        self.home.make()
        save_key(self.home.signing_key, league.keys[US])
        self.home.save(
            ClientConfig(
                org=US, enrolment="127.0.0.1:1", ca_fingerprint="0" * 64, federation=league.name,
                operator_key=league.operator_key, link="127.0.0.1:2",
            )
        )  # fmt: skip
        policy.write_template(self.home.policy)
        policy.add_coordinator(self.home.policy, league.operator_key)
        policy.add_base(self.home.policy, BaseEntry(digest=league.base, path=str(TINY)))
        for org in ("birch", "cedar"):
            policy.confirm_peers(self.home.policy, {org: key_fingerprint(league.public(org))})
        entry = DatasetEntry(name="d", purposes=["research"], namespace="people", files=[str(file)], units="patient")
        terms = Namespace(unit="patient", units_at_most=64, epsilon_cap=8.0, delta=1e-5)
        policy.add_dataset(self.home.policy, entry, terms)
        self.charter: Charter = league.draft(**changes)
        files = FileStore(self.home.files)
        for content in (self.charter, *league.rosters):
            files.put_bytes(content.canonical())
        self.state = ClientState(self.home.state)
        newest = SignedRoster.make(league.operator, league.rosters[-1])
        update_rosters(
            newest.roster.digest, newest.signature, us=self.home.membership(), state=self.state,
            pull=lambda digest, _most: files.path(digest),
        )  # fmt: skip
        self.state.note_offer(
            digest=self.charter.digest, run="r-1", name="first", purpose="research",
            operator_signature=league.signature(self.charter),
        )  # fmt: skip

    def change(self, before: str, after: str) -> None:
        """Change the policy, as a person would."""
        head, found, tail = self.home.policy.read_text().rpartition(before)  # The last: comments come first.
        assert found
        self.home.policy.write_text(head + after + tail)

    def approve(self) -> int:
        with pytest.raises(SystemExit) as left:
            main(["client", "charter", "approve", self.charter.digest[:12], "--home", str(self.home.root)])
        assert isinstance(left.value.code, int)
        return left.value.code

    def stands(self) -> str:
        return str(self.state.charter(self.charter.digest).state)
