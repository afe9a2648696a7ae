"""The organisation's policy: deny by default, clear errors, edits that keep comments."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from foedus_client import policy
from foedus_client.policy import BaseEntry, DatasetEntry, Namespace, Policy
from foedus_protocols.errors import ConfigError, PolicyRefused
from foedus_protocols.identity import human_fingerprint

KEY = "a" * 64

PATIENTS = Namespace(unit="patient", units_at_most=256, epsilon_cap=8.0, delta=1e-5)


def letters(**changes: object) -> DatasetEntry:
    terms = {
        "name": "letters",
        "purposes": ["research"],
        "namespace": "patients",
        "files": ["/srv/letters.jsonl"],
        "units": "patient_id",
    }
    return DatasetEntry.model_validate(terms | changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A fresh policy as `foedus client join` writes it."""
    file = tmp_path / "policy.toml"
    policy.write_template(file)
    return file


def test_template_allows_nothing(path: Path) -> None:
    fresh = policy.load(path)
    assert fresh == Policy()
    limits = fresh.limits()
    assert not limits.coordinators
    assert not limits.namespaces
    assert not limits.peers
    assert not limits.allow_unprotected
    assert not fresh.auto_sign
    assert limits.evaluation == {"none"}
    with pytest.raises(PolicyRefused):
        fresh.dataset_for("research")
    with pytest.raises(PolicyRefused):
        fresh.base_path("b" * 64)


def test_template_with_its_examples_switched_on_is_a_policy(path: Path) -> None:
    lines = path.read_text().splitlines()
    text = "\n".join(line[1:] if line.startswith("#") and not line.startswith("# ") else line for line in lines)
    path.write_text(text.replace('digest = "..."', f'digest = "{KEY}"'))
    example = policy.load(path)
    assert example.namespaces["patients"].units_at_most == 4096
    assert example.datasets[0].columns == {"letters": {"question": "subject", "answer": "body"}}


def test_template_is_private_and_never_overwritten(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("minimum_members = 5")
    policy.write_template(path)
    assert policy.load(path).minimum_members == 5


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("minimum_members = ", "TOML"),
        ("minimum_member = 2", "minimum_member"),
        ("auto_sign = 1", "auto_sign"),
        ("coordinators = ['me']", "coordinators"),
        ("[peers]\nbirch = 'aa'", "peers.birch"),
        ("[bounds]\nevaluation = ['noised']", "bounds.evaluation"),
        ("[namespaces.p]\nunit = 'u'\nunits_at_most = 100\nepsilon_cap = 8.0", "power of two"),
        ("[namespaces.p]\nunit = 'u'\nunits_at_most = 16384\nepsilon_cap = 8.0", "lower it"),
        ("[namespaces.p]\nunit = 'u'\nunits_at_most = 64\nepsilon_cap = inf", "epsilon_cap"),
        ("[[datasets]]\nname='a'\npurposes=['x']\nnamespace='p'\nfiles=['f']\nunits='record'", "no namespace here"),
    ],
)
def test_a_wrong_policy_is_refused_by_the_fields_name(path: Path, text: str, names: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=names):
        policy.load(path)


def test_a_missing_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.toml"):
        policy.load(tmp_path / "policy.toml")


def test_a_policy_of_another_encoding_is_named(path: Path) -> None:
    path.write_bytes(b"purposes = ['soins-hospitali\xe8res']")
    with pytest.raises(ConfigError, match=r"UTF-8 in .*policy\.toml"):
        policy.load(path)


def test_one_data_set_serves_a_purpose(path: Path) -> None:
    policy.add_dataset(path, letters(), PATIENTS)
    before = path.read_text()
    with pytest.raises(ConfigError, match="both serve"):
        policy.add_dataset(path, letters(name="notes"), PATIENTS)
    with pytest.raises(ConfigError, match="same name"):
        policy.add_dataset(path, letters(purposes=["teaching"]), PATIENTS)
    assert path.read_text() == before


def test_registering_keeps_every_comment_and_adds_what_checks_need(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    policy.add_coordinator(path, KEY)
    policy.add_coordinator(path, KEY)
    policy.add_base(path, BaseEntry(digest="b" * 64, path="/old"))
    policy.add_base(path, BaseEntry(digest="b" * 64, path="/srv/tiny"))
    policy.confirm_peers(path, {"birch": human_fingerprint("c" * 64).upper()})
    policy.add_dataset(path, letters(), PATIENTS)
    policy.add_dataset(path, letters(name="notes", purposes=["teaching"], units={"a": "pid", "b": "record"}), PATIENTS)

    lines = path.read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == comments
    found = policy.load(path)
    assert found.coordinators == [KEY]
    assert found.base_path("b" * 64) == Path("/srv/tiny")
    assert found.dataset_for("research") == letters()
    assert found.dataset_for("teaching").units == {"a": "pid", "b": "record"}
    limits = found.limits()
    assert limits.peers == {"birch": "c" * 64}
    assert limits.namespaces["research"] == limits.namespaces["teaching"]
    assert limits.namespaces["research"].name == "patients"
    assert limits.namespaces["research"].units_at_most == 256
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_purpose_that_is_struck_out_is_refused_though_data_serves_it(path: Path) -> None:
    policy.add_dataset(path, letters(), PATIENTS)
    path.write_text(path.read_text().replace('purposes = ["research"]', "purposes = []", 1))
    found = policy.load(path)
    assert found.limits().namespaces == {}
    with pytest.raises(PolicyRefused, match="research") as caught:
        found.dataset_for("research")
    assert caught.value.step == 9


def test_a_namespace_is_declared_once(path: Path) -> None:
    policy.add_dataset(path, letters(), PATIENTS)
    before = path.read_text()
    wider = Namespace(unit="patient", units_at_most=512, epsilon_cap=80.0)
    with pytest.raises(ConfigError, match="declared with"):
        policy.add_dataset(path, letters(name="notes", purposes=["teaching"]), wider)
    assert path.read_text() == before


def test_a_confirmed_key_is_not_replaced_silently(path: Path) -> None:
    policy.confirm_peers(path, {"birch": "c" * 64})
    policy.confirm_peers(path, {"birch": "c" * 64})
    with pytest.raises(ConfigError, match="confirmed before"):
        policy.confirm_peers(path, {"birch": "d" * 64})
    with pytest.raises(ConfigError, match="fingerprint"):
        policy.confirm_peers(path, {"cedar": "not a fingerprint"})
    with pytest.raises(ConfigError, match="peers"):
        policy.confirm_peers(path, {"Not An Id": "d" * 64})
    assert policy.load(path).peers == {"birch": "c" * 64}


@pytest.mark.parametrize("start", ["", "[bounds]\nmax_rounds = 5\n", "minimum_members = 3\n\n[peers]\n# nobody yet\n"])
def test_registering_works_on_a_hand_written_policy(path: Path, start: str) -> None:
    path.write_text(start)
    before = policy.load(path)
    policy.add_coordinator(path, KEY)
    policy.add_base(path, BaseEntry(digest="b" * 64, path="/srv/tiny"))
    policy.confirm_peers(path, {"birch": "c" * 64})
    policy.add_dataset(path, letters(), PATIENTS)
    found = policy.load(path)
    assert (found.bounds, found.minimum_members) == (before.bounds, before.minimum_members)
    assert (found.coordinators, found.peers, found.purposes) == ([KEY], {"birch": "c" * 64}, ["research"])


def test_a_form_that_cannot_be_edited_is_named(path: Path) -> None:
    path.write_text(f"bases = [{{digest = '{KEY}', path = '/srv'}}]")
    assert policy.load(path).base_path(KEY) == Path("/srv")
    with pytest.raises(ConfigError, match=r"\[\[bases\]\]"):
        policy.add_base(path, BaseEntry(digest="b" * 64, path="/srv/tiny"))


def test_one_file_in_two_namespaces_is_refused_and_nothing_is_written(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "letters.jsonl"
    file.touch()
    link = tmp_path / "the-same.jsonl"
    link.symlink_to(file)
    policy.add_dataset(path, letters(files=[str(file)]), PATIENTS)
    before = path.read_bytes()
    again = letters(name="again", purposes=["audit"], namespace="matters", files=[str(link)])
    with pytest.raises(ConfigError, match="two budgets"):
        policy.add_dataset(path, again, PATIENTS)
    assert path.read_bytes() == before
    policy.add_dataset(path, letters(name="same", purposes=["audit"], files=[str(link)]), PATIENTS)


EDITOR = """
import sys
from pathlib import Path
from foedus_client import policy
path, name = Path(sys.argv[1]), sys.argv[2]
for number in range(15):
    policy.confirm_peers(path, {f"{name}-{number}": "%064x" % number})
"""


def test_two_commands_that_edit_at_once_lose_nothing(path: Path) -> None:
    editors = [subprocess.Popen([sys.executable, "-c", EDITOR, str(path), name]) for name in ("ash", "birch")]
    assert [editor.wait(120) for editor in editors] == [0, 0]
    assert len(policy.load(path).peers) == 30
