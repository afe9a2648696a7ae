"""Refusals that need no port: command lines that cannot be meant, files that are wrong, homes that are not there.

Each is met from the root command on: one line, its exit code, and everything on the disk as it was.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from foedus_client import policy
from foedus_client.config import ClientConfig
from foedus_client.config import Home as ClientHome
from foedus_client.join import prepare
from foedus_client.state import ClientState
from foedus_model.presets import TINY
from foedus_protocols.charter import MAX_CHARTER_BYTES
from support.refusals import refusal, run, state

PIN = "ab" * 32
ARGUMENTS = list[str | Path]


@pytest.fixture
def coordinator(tmp_path: Path) -> Path:
    """A coordinator's home, as `init` makes it."""
    home = tmp_path / "coordinator"
    run("coordinator", "init", "--federation", "north", "--address", "127.0.0.1", "--home", home)
    return home


@pytest.fixture
def member(tmp_path: Path) -> Path:
    """An organisation's home that asks for nothing yet: keys and a policy that allows nothing."""
    home = ClientHome(tmp_path / "ahorn")
    prepare(home, ClientConfig(org="ahorn", enrolment="127.0.0.1:1", ca_fingerprint=PIN))
    return home.root


@pytest.fixture
def registered(member: Path) -> Path:
    """The home of an approved organisation, with a namespace of patients in its policy."""
    home = ClientHome(member)
    known = {"federation": "north", "operator_key": "cd" * 32, "link": "127.0.0.1:1"}
    home.save(home.load().model_copy(update=known))
    entry = policy.DatasetEntry(
        name="letters", purposes=["care"], namespace="patients", files=["/letters.jsonl"], units="patient"
    )
    terms = policy.Namespace(unit="patient", units_at_most=64, epsilon_cap=8.0, delta=1e-5)
    policy.add_dataset(ClientHome(member).policy, entry, terms)
    return member


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a command that is refused with a code and a text, and changes nothing."""

    def check(code: int, text: str, *arguments: str | Path) -> None:
        before = state(tmp_path)
        left, said = refusal(capsys, *arguments)
        assert (left, text in said) == (code, True), said
        assert state(tmp_path) == before
        assert not list(tmp_path.rglob("*.tmp"))
        assert not list(tmp_path.rglob("*.part"))

    return check


Refused = Callable[..., None]


# --- Joining ---------------------------------------------------------------------------------------------------------


def test_a_token_that_cannot_be_read(member: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "empty").touch()
    line = ("client", "join", "--home", member)
    refused(2, "one of --token-file and --token-stdin", *line, "--token-file", tmp_path / "empty", "--token-stdin")
    refused(2, "No such file", *line, "--token-file", tmp_path / "absent")
    refused(2, "bytes that are no text", *line, "--token-file", tmp_path / "binary")
    refused(2, "an empty line", *line, "--token-file", tmp_path / "empty")
    refused(2, "there is no terminal to ask at", *line)


def test_an_invitation_that_is_not_complete(tmp_path: Path, refused: Refused) -> None:
    line: ARGUMENTS = ["client", "join", "--home", tmp_path / "new", "--coordinator", "127.0.0.1:1"]
    refused(2, "at least one is missing", *line, "--org", "ahorn")
    refused(3, "lower-case letters", *line, "--org", "Ahorn & Co", "--ca-fingerprint", PIN)
    refused(3, "64 hexadecimal characters", *line, "--org", "ahorn", "--ca-fingerprint", "abc")
    refused(2, "without user and password", *line, "--org", "ahorn", "--proxy", "http://me:secret@proxy:3128")
    assert not (tmp_path / "new").exists()


def test_a_home_of_another_organisation(member: Path, refused: Refused) -> None:
    refused(12, "use another --home", "client", "join", "--org", "birke", "--home", member)


def test_a_new_start_under_another_id(member: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "token").write_text("made-up")
    line = ("client", "join", "--again", "--token-file", tmp_path / "token", "--home", member)
    refused(12, "the ledger here is that of ahorn", *line, "--org", "birke")
    assert not list((member / "keys").glob("old-*"))


def test_a_home_that_is_none_or_waits(member: Path, tmp_path: Path, refused: Refused) -> None:
    refused(12, "found no client.toml", "client", "up", "--home", tmp_path / "absent")
    refused(12, "its request still waits", "client", "up", "--home", member)
    (member / "client.toml").write_text("org = [")
    refused(3, "a readable client.toml", "client", "up", "--home", member)


def test_a_coordinator_that_is_not_there(member: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "token").write_text("made-up")
    refused(4, "enrolment port", "client", "join", "--token-file", tmp_path / "token", "--home", member)


def test_a_key_that_others_can_read_or_that_is_none(member: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "token").write_text("made-up")
    line = ("client", "join", "--token-file", tmp_path / "token", "--home", member)
    key = ClientHome(member).signing_key
    key.chmod(0o644)
    refused(3, "chmod 600", *line)
    key.chmod(0o600)
    key.write_text("no key")
    refused(3, "a PEM private key", *line)
    key.unlink()
    key.write_bytes(ClientHome(member).tls.key.read_bytes())
    key.chmod(0o600)
    refused(3, "an Ed25519 key", *line)


# --- The coordinator's home ------------------------------------------------------------------------------------------


def test_names_and_settings_that_cannot_be(coordinator: Path, tmp_path: Path, refused: Refused) -> None:
    new: ARGUMENTS = ["coordinator", "init", "--address", "127.0.0.1", "--home", tmp_path / "new"]
    refused(3, "a federation name", *new, "--federation", "North & South")
    refused(3, "from 0 to 65535", *new, "--federation", "north", "--link-port", "70000")
    refused(12, "an empty or absent folder", *new[:-1], coordinator, "--federation", "north")
    refused(3, "an organisation id", "coordinator", "invite", "coordinator", "--home", coordinator)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"federation = [", "expected TOML"),
        (b'federation = "north"\nspeed = 3\n', "unknown settings or wrong types: speed"),
        (b"# \xff\n", "save it as UTF-8"),
    ],
)
def test_settings_that_cannot_be_read(content: bytes, text: str, coordinator: Path, refused: Refused) -> None:
    (coordinator / "coordinator.toml").write_bytes(content)
    refused(3, text, "coordinator", "status", "--home", coordinator)


def test_a_coordinator_that_was_never_made(tmp_path: Path, refused: Refused) -> None:
    refused(3, "foedus coordinator init", "coordinator", "status", "--home", tmp_path / "absent")


def test_what_the_coordinator_does_not_know(coordinator: Path, refused: Refused) -> None:
    home = ("--home", coordinator)
    refused(12, "there is none; see `foedus coordinator status`", "coordinator", "approve", "birke", *home)
    refused(7, "'birke' is not one", "coordinator", "revoke", "birke", *home)
    refused(12, "see `foedus coordinator run list`", "coordinator", "run", "show", "first-0", *home)
    refused(12, "see `foedus coordinator run list`", "coordinator", "run", "stop", "first-0", *home)
    refused(12, "there is one CA only", "coordinator", "authority", "retire", *home)


def test_a_token_file_that_is_there_already(coordinator: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "token").write_text("something of mine")
    line = ("coordinator", "invite", "ahorn", "--token-file", tmp_path / "token", "--home", coordinator)
    refused(12, "there is one; move it away", *line)  # Also a token that was handed out before is still good.


def test_a_second_rotation(coordinator: Path, refused: Refused) -> None:
    run("coordinator", "authority", "rotate", "--home", coordinator)
    refused(12, "a rotation is going on", "coordinator", "authority", "rotate", "--home", coordinator)


def test_a_newer_coordinators_database(coordinator: Path, refused: Refused) -> None:
    with closing(sqlite3.connect(coordinator / "coordinator.db")) as database, database:
        assert database.execute("UPDATE alembic_version SET version_num = '9999'").rowcount == 1
    refused(12, "use a newer foedus", "coordinator", "status", "--home", coordinator)


# --- Policy, charters, ledger ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"datasets = [", "expected TOML"),
        (b"# \xff\n", "expected UTF-8"),
        (b'colour = "blue"\n', "colour"),
        (
            b'[namespaces.patients]\nunit = "patient"\nunits_at_most = 48\nepsilon_cap = 8.0\ndelta = 1e-5\n',
            "units_at_most must be a power of two",
        ),
        (
            b'[namespaces.patients]\nunit = "patient"\nunits_at_most = 64\nepsilon_cap = 8.0\ndelta = 0.5\n',
            "delta must be at most 1/(10 x 64)",
        ),
    ],
)
def test_a_policy_that_cannot_be_read(content: bytes, text: str, member: Path, refused: Refused) -> None:
    ClientHome(member).policy.write_bytes(content)
    line = ("client", "privacy", "ledger", "state", "--namespace", "patients", "--nothing", "--home", member)
    refused(3, text, *line)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("namespaces = {}\n", "expected a table [namespaces]"),
        ("datasets = []\n", "expected blocks [[datasets]]"),
    ],
)
def test_a_policy_in_a_form_that_no_command_edits(
    content: str, text: str, registered: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "letters.jsonl"
    rows = [f'{{"person": "p{number}", "text": "Good morning, said postman {number}."}}' for number in range(20)]
    path.write_text("\n".join(rows) + "\n")
    home = ClientHome(registered)
    home.policy.write_text(content)
    home.split_key("letters")
    line: ARGUMENTS = ["client", "data", "add", path, "--unit", "person", "--purpose", "post", "--name", "more"]
    line += ["--epsilon-cap", "8", "--units-at-most", "64", "--namespace", "letters", "--home", registered]
    refused(3, text, *line)


def test_a_policy_that_is_gone(registered: Path, refused: Refused) -> None:
    ClientHome(registered).policy.unlink()
    line = ("client", "privacy", "ledger", "state", "--namespace", "patients", "--nothing", "--home", registered)
    refused(3, "expected a policy in", *line)


def test_charters_that_nobody_offered(registered: Path, tmp_path: Path, refused: Refused) -> None:
    refused(12, "no daemon has run there yet", "client", "charter", "list", "--home", registered)
    ClientState(ClientHome(registered).state).close()  # As a daemon's first start leaves it.
    refused(12, "at least four hexadecimal", "client", "charter", "show", "ab", "--home", registered)
    refused(12, "found 0", "client", "charter", "approve", "abcdef", "--home", registered)
    refused(12, "found 0", "client", "leave", "abcdef", "--yes", "--home", registered)
    refused(2, "tuning on private records", "client", "check", "abcdef", "--rate", "0.1", "--home", registered)
    (tmp_path / "huge.json").write_bytes(b" " * (MAX_CHARTER_BYTES + 1))
    refused(3, "a charter of at most", "client", "check", tmp_path / "huge.json", "--home", registered)
    (tmp_path / "other.json").write_text("{}")
    refused(7, "a charter of version 1", "client", "check", tmp_path / "other.json", "--home", registered)


def test_a_statement_that_cannot_be_meant(registered: Path, refused: Refused) -> None:
    line = ("client", "privacy", "ledger", "state", "--home", registered, "--namespace")
    refused(2, "got both or neither", *line, "patients")
    refused(12, "register its data first", *line, "matters", "--nothing")
    refused(2, "the policy's unit 'patient'", *line, "patients", "--nothing", "--unit", "record")
    refused(2, "NOISE:PROB:STEPS, e.g.", *line, "patients", "--event", "much")


def test_a_ledger_that_is_not_there_torn_or_changed(
    registered: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ClientHome(registered).ledger
    line: ARGUMENTS = ["client", "privacy", "ledger"]
    home: ARGUMENTS = ["--home", registered]
    refused(12, "there is no such file", *line, "verify", *home)
    run(*line, "state", "--namespace", "patients", "--event", "2.0:0.25:4", *home)
    copy = tmp_path / "copy"
    run(*line, "backup", copy, *home)
    refused(12, "name another", *line, "backup", copy, *home)
    with closing(sqlite3.connect(path)) as database, database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        changed = "UPDATE entries SET content = CAST(replace(CAST(content AS TEXT), '0.25', '0.10') AS BLOB)"
        assert database.execute(changed).rowcount > 0
    refused(7, "an unbroken ledger, got a changed entry 1", *line, "verify", *home)
    path.write_bytes(copy.read_bytes()[:5000])
    code, said = refusal(capsys, *line, "verify", *home)
    assert (code, "a torn or damaged file" in said) == (12, True)


# --- Data and models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--unit", "a=b=c", "--unit", "=x"], "--unit FIELD, --unit NAME=FIELD or --unit record"),
        (["--unit", "person", "--unit", "person"], "names a field for all files twice"),
        (["--unit", "person", "--columns", "letters"], "--columns FILE:question=COLUMN"),
        (["--unit", "person", "--unit", "other=person"], "expected one of the files"),
        ([], "the privacy unit is missing"),
    ],
)
def test_options_that_name_no_unit_or_column(options: ARGUMENTS, text: str, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "letters.jsonl"
    path.write_text('{"person": "a", "text": "Good morning, said the postman."}\n')
    refused(2, text, "data", "check", path, *options)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("letters.xml", b"<a/>", "expected a file called"),
        ("letters.jsonl.gz", b"\x1f\x8b\x08 no gzip", "a complete gzip file"),
        ("letters.csv", b"text,text\na,b\n", "distinct column names"),
        ("letters.csv", b"text,person\n\xff\xfe,b\n", "expected UTF-8 text"),
        ("letters.csv", b'text,person\n"a"b,c\n', "a field that breaks it"),
        ("letters.jsonl", b"", "correct the file or say"),
    ],
)
def test_a_file_that_is_no_data(name: str, content: bytes, text: str, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(8, text, "data", "check", path, "--unit", "person")


def test_a_data_file_that_is_not_there(tmp_path: Path, refused: Refused) -> None:
    refused(8, "check the name and the permissions", "data", "check", tmp_path / "absent.jsonl", "--unit", "record")


def test_a_declaration_that_the_policy_cannot_hold(registered: Path, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "letters.jsonl"
    rows = [f'{{"person": "p{number}", "text": "Good morning, said postman {number}."}}' for number in range(80)]
    path.write_text("\n".join(rows) + "\n")
    line: ARGUMENTS = ["client", "data", "add", path, "--unit", "person", "--purpose", "post", "--name", "more"]
    line += ["--epsilon-cap", "8", "--home", registered]
    ClientHome(registered).split_key("patients")  # Made at the first look at a namespace's data, and stays.
    ClientHome(registered).split_key("letters")
    refused(3, "units as declared, the files hold more", *line, "--namespace", "letters", "--units-at-most", "64")
    refused(3, "a power of two", *line, "--namespace", "letters", "--units-at-most", "100")
    refused(3, "was declared with, got others", *line, "--namespace", "patients", "--units-at-most", "128")
    refused(2, "there is no terminal to ask at", *line[:-4], "--home", registered, "--namespace", "letters")


def test_a_prompt_that_cannot_be_meant(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    line = ("model", "generate")
    refused(2, "only one of them", *line)
    refused(2, "only one of them", *line, "--prompt", "Who?", "--prompt-file", tmp_path / "binary")
    refused(2, "a text file in UTF-8", *line, "--prompt-file", tmp_path / "binary")
    refused(2, "at least 1 new token", *line, "--prompt", "Who?", "--max-new-tokens", "0")
    refused(2, "a temperature of 0 or more", *line, "--prompt", "Who?", "--temperature", "-1")
    refused(2, "got empty text", *line, "--prompt", "")


def test_a_folder_that_is_no_model(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "folder").mkdir()
    refused(9, "expected a base model with manifest.json", "model", "inspect", tmp_path / "folder")
    refused(9, "expected a folder with a model", "model", "manifest", tmp_path / "absent")
    line = ("model", "generate", "--prompt", "a")
    refused(9, "a variant with manifest.json", *line, "--variant", tmp_path / "folder")
    (tmp_path / "folder" / "manifest.json").write_text("no JSON")
    refused(9, "expected JSON, got something else", *line, "--variant", tmp_path / "folder")
    (tmp_path / "folder" / "manifest.json").unlink()
    (tmp_path / "folder" / "config.json").write_bytes((TINY / "config.json").read_bytes())
    refused(9, "expected safetensors files", "model", "manifest", tmp_path / "folder")
    refused(2, "a new or empty folder", "model", "pretrain", "--out", tmp_path / "folder", "--work", tmp_path / "work")


# --- Demo and simulation ---------------------------------------------------------------------------------------------


def test_a_demo_that_cannot_be_meant(tmp_path: Path, refused: Refused) -> None:
    place = ("--folder", tmp_path / "demo")
    refused(2, "--domain or --data, got both", "demo", "--domain", "clinics", "--data", tmp_path, *place)
    refused(2, "expected --domain", "demo", "--domain", "ships", *place)
    refused(8, "one data file for each organisation", "demo", "--data", tmp_path / "absent", "--unit", "a", *place)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    refused(12, "got other files", "demo", "--folder", tmp_path / "other")


def test_a_command_whose_packages_are_missing(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    def load(_: EntryPoint) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(EntryPoint, "load", load)
    refused(13, "needs the Python package torch, which is not installed", "model", "inspect")
