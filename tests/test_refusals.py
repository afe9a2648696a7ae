"""Every refusal as a person meets it: one error line that says what to do, its documented exit code, no trace left.

The reasons behind the refusals have tests of their own in the packages; here the commands run from the root command on,
against a coordinator that serves real ports where one is needed.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foedus_client.lock import HomeLock
from foedus_coordinator.config import Home
from foedus_coordinator.executor import serve
from foedus_model.presets import TINY
from foedus_protocols.certificates import CertificateAuthority, make_request
from foedus_protocols.identity import load_tls_key
from foedus_protocols.layout import adapter_layout, vector_digest
from foedus_protocols.manifest import read_config, read_manifest
from foedus_protocols.peft_folder import write_peft
from support.refusals import refusal, run, state

FEDERATION = "north"

# --- The coordinator's ports -----------------------------------------------------------------------------------------


@dataclass
class Office:
    """A coordinator that serves."""

    home: Path
    enrolment: str

    def invite(self, org: str, file: Path) -> None:
        run("coordinator", "invite", org, "--token-file", file, "--home", self.home)

    def join(self, org: str, token: Path, home: Path) -> list[str | Path]:
        """The command line with which an organisation presents a token."""
        pin = Home(self.home).authority.fingerprint
        line: list[str | Path] = ["client", "join", "--coordinator", self.enrolment, "--org", org]
        return [*line, "--ca-fingerprint", pin, "--token-file", token, "--no-wait", "--home", home]

    def approve(self, org: str) -> None:
        run("coordinator", "approve", org, "--yes", "--home", self.home)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    home = tmp_path / "coordinator"
    run("coordinator", "init", "--federation", FEDERATION, "--address", "127.0.0.1", "--link-port", "0",
        "--enrolment-port", "0", "--home", home)  # fmt: skip
    stop, said = threading.Event(), []
    thread = threading.Thread(target=serve, args=(Home(home),), kwargs={"stop": stop, "say": said.append})
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not said:
            assert time.monotonic() < deadline
            assert thread.is_alive()
            time.sleep(0.01)
        yield Office(home, said[0].rpartition(" ")[2])
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def member(office: Office, tmp_path: Path) -> Path:
    """The home of an organisation that joined."""
    home, token = tmp_path / "ahorn", tmp_path / "token"
    office.invite("ahorn", token)
    run(*office.join("ahorn", token, home))
    office.approve("ahorn")
    run("client", "join", "--home", home)
    return home


@pytest.mark.parametrize("why", ["used", "expired"])
def test_a_token_that_was_used_or_has_expired(
    why: str, office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token, latecomer = tmp_path / "token", tmp_path / "latecomer"
    office.invite("ahorn", token)
    if why == "used":
        run(*office.join("ahorn", token, tmp_path / "first"))
    else:
        with closing(sqlite3.connect(office.home / "coordinator.db")) as database, database:
            assert database.execute("UPDATE tokens SET expires = 1").rowcount == 1
    before = state(office.home)
    code, said = refusal(capsys, *office.join("ahorn", token, latecomer))
    assert code == 12
    assert why in said
    assert "foedus coordinator invite ahorn" in said
    assert token.read_text().strip() not in said
    assert state(office.home) == before
    assert not (latecomer / "keys" / "tls.pem").exists()
    # The home is as good as new: with a fresh token it joins.
    office.invite("ahorn", tmp_path / "fresh")
    run(*office.join("ahorn", tmp_path / "fresh", latecomer))


def test_a_token_that_was_never_given(office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("made-up")
    before = state(office.home)
    code, said = refusal(capsys, *office.join("ahorn", tmp_path / "token", tmp_path / "ahorn"))
    assert (code, "foedus coordinator invite" in said) == (7, True)
    assert state(office.home) == before


def test_a_strangers_certificate(office: Office, member: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The right name and the right key, certified by a CA that calls itself by the federation's name."""
    stranger = CertificateAuthority.create(FEDERATION)
    request = make_request(load_tls_key(member / "keys" / "tls.key"), "ahorn")
    pem = stranger.issue_certificate(request, org="ahorn", federation=FEDERATION)
    (member / "keys" / "tls.pem").write_bytes(pem)
    before = state(office.home, member)
    code, said = refusal(capsys, "client", "peers", "--confirm-all", "--home", member)
    assert code == 4
    assert "certificate" in said
    after = state(office.home, member)
    after.pop(str(member / "client.db"), None)  # Made by the command, and empty of what a coordinator would have said.
    before.pop(str(member / "client.db"), None)
    assert after == before


def test_a_second_daemon_on_one_home(member: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(member)
    with HomeLock(member / "daemon.lock"):
        code, said = refusal(capsys, "client", "up", "--home", member)
    assert (code, "another --home" in said) == (12, True)
    assert state(member) == before


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_rows(tmp_path: Path) -> Path:
    path = tmp_path / "letters.jsonl"
    path.write_text('{"colour": "blue"}\nnot JSON\n{"question": "Who?"}\n', encoding="utf-8")
    return path


def test_a_file_of_bad_rows(member: Path, bad_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(member)
    code, said = refusal(capsys, "data", "check", bad_rows, "--unit", "record")
    assert code == 8
    assert "none of its 3 rows is usable (line 1: " in said
    declared = ("--name", "letters", "--purpose", "care", "--namespace", "patients", "--unit", "patient")
    line = ("client", "data", "add", bad_rows, *declared, "--units-at-most", "64", "--epsilon-cap", "8")
    assert refusal(capsys, *line, "--home", member)[0] == 8
    after = state(member)
    for key in set(after) - set(before):  # The key of the held-out split may be made, and stays for the next attempt.
        assert Path(key).name.startswith("split-")
    assert {key: after[key] for key in before} == before


def test_a_unit_that_was_not_said(bad_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refusal(capsys, "data", "check", bad_rows)
    assert (code, "--unit record" in said) == (2, True)


# --- Models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the shipped base, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "base"))


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    """A variant of the shipped base, to be damaged."""
    folder = tmp_path / "variant"
    layout = adapter_layout(read_config(TINY), targets="attention", rank=2)
    vector = np.zeros(layout.length, np.float32)
    write_peft(folder, layout=layout, vector=vector, seed="s", rank=2, alpha=4, base_name="tiny")
    manifest = {"base": read_manifest(TINY).digest, "adapter": vector_digest(vector), "private": True}
    (folder / "manifest.json").write_text(json.dumps({"manifest": manifest}))
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_truncated_base(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(base / "model.safetensors")
    code, said = refusal(capsys, "model", "inspect", base)
    assert (code, "truncated" in said) == (9, True)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_for_a_base(name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "model.safetensors").unlink()
    (base / name).write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
    (base / "manifest.json").unlink()
    code, said = refusal(capsys, "model", "manifest", base)
    assert (code, "safetensors" in said) == (9, True)
    assert not (base / "manifest.json").exists()
    assert not (tmp_path / "opened").exists()


def test_a_truncated_variant(variant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(variant / "adapter_model.safetensors")
    assert refusal(capsys, "model", "generate", "--variant", variant, "--prompt", "Who?")[0] == 9


def test_a_pickle_for_a_variant(variant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (variant / "adapter_model.safetensors").unlink()
    (variant / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "opened")))
    assert refusal(capsys, "model", "generate", "--variant", variant, "--prompt", "Who?")[0] == 9
    assert not (tmp_path / "opened").exists()


def test_a_variant_of_another_base(variant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signed = json.loads((variant / "manifest.json").read_text())
    signed["manifest"]["base"] = "0" * 64
    (variant / "manifest.json").write_text(json.dumps(signed))
    code, said = refusal(capsys, "model", "generate", "--variant", variant, "--prompt", "Who?")
    assert (code, "--base" in said) == (9, True)


class Trap:
    """Whoever unpickles it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_run_on_a_damaged_base_or_a_malformed_charter(
    office: Office, member: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    charter = tmp_path / "charter.toml"
    charter.write_text(
        'name = "first"\npurpose = "tests"\ndomain = "none"\n'
        '[[participants]]\nid = "ahorn"\nunit = "record"\nunits_at_most = 64\n'
        "[privacy]\nepsilon = 8.0\ndelta = 1e-5\nrounds = 1\n"
    )
    truncate(base / "tokenizer.json")
    before = state(office.home)
    line = ("coordinator", "run", "start", charter, "--home", office.home, "--base")
    code, said = refusal(capsys, *line, base)
    assert (code, "tokenizer.json" in said) == (9, True)
    charter.write_text(charter.read_text().replace("rounds", "turns"))
    code, said = refusal(capsys, *line, TINY)
    assert (code, "turns" in said) == (3, True)
    assert state(office.home) == before
