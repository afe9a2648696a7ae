from __future__ import annotations

import pytest
from foedus_protocols.canonical import canonical_bytes, parse_canonical
from foedus_protocols.errors import ConfigError, StateError, VerificationError
from foedus_protocols.identity import generate_signing_key, public_hex
from foedus_protocols.roster import Roster, SignedRoster, ancestor, check_chain, stayed_since

LEAGUE = "test-league"


def key() -> str:
    return public_hex(generate_signing_key())


@pytest.fixture
def chain() -> list[Roster]:
    """Nobody; clinic; clinic and bank; clinic; clinic and firm."""
    rosters = [Roster.genesis(LEAGUE)]
    rosters.append(rosters[-1].add("clinic", key(), since=100))
    rosters.append(rosters[-1].add("bank", key(), since=200))
    rosters.append(rosters[-1].remove("bank"))
    rosters.append(rosters[-1].add("firm", key(), since=400))
    return rosters


def test_a_roster_comes_back_from_its_bytes(chain):
    for roster in chain:
        assert Roster.parse(roster.canonical()) == roster
        assert Roster.parse(roster.canonical()).digest == roster.digest
    assert [member.id for member in chain[2].members] == ["bank", "clinic"]
    assert chain[2].member("bank").tls_name == "spiffe://test-league/org/bank"
    with pytest.raises(VerificationError, match="bank"):
        chain[3].member("bank")


def test_the_chain_holds_and_a_fork_or_gap_does_not(chain):
    check_chain(chain)
    fork = chain[2].add("stranger", key(), since=300)
    for wrong in ([], chain[:2] + chain[3:], [*chain[:3], fork, chain[4]], chain[::-1], [chain[1], chain[1]]):
        with pytest.raises(VerificationError):
            check_chain(wrong)


def test_who_stayed(chain):
    assert stayed_since(chain, chain[2].digest) == {"clinic"}
    assert stayed_since(chain, chain[-1].digest) == {"clinic", "firm"}
    assert ancestor(chain, chain[1].digest) is chain[1]
    fork = chain[2].add("stranger", key(), since=300)
    with pytest.raises(VerificationError, match="ancestor"):
        stayed_since(chain, fork.digest)


def test_who_left_and_came_back_did_not_stay(chain):
    bank = chain[2].member("bank")
    back = chain[-1].add("bank", bank.signing_key, since=500)
    assert "bank" not in stayed_since([*chain, back], chain[2].digest)
    # Nor does a member whose key was changed within one version.
    renewed = chain[-1].remove("firm").add("firm", key(), since=400)
    assert "firm" not in stayed_since([*chain, chain[-1].remove("firm"), renewed], chain[-1].digest)


def test_ids_and_keys_are_taken_once(chain):
    with pytest.raises(StateError):
        chain[1].add("clinic", key(), since=1)
    with pytest.raises(StateError):
        chain[1].add("other", chain[1].member("clinic").signing_key, since=1)
    for org in ("coordinator", "Clinic", ""):
        with pytest.raises(ConfigError):
            chain[1].add(org, key(), since=1)
    with pytest.raises(ConfigError):
        chain[1].add("other", "00", since=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(members=value["members"][::-1]),
        lambda value: value.update(members=[value["members"][0]] * 2),
        lambda value: value.update(previous=None),
        lambda value: value.update(extra=1),
        lambda value: value.pop("federation"),
        lambda value: value["members"][0].update(tls_name="spiffe://test-league/org/clinic"),
        lambda value: value["members"][0].update(signing_key=value["members"][1]["signing_key"]),
        lambda value: value.update(federation="other-league"),
    ],
)
def test_an_inconsistent_roster_is_refused(chain, change):
    value = parse_canonical(chain[2].canonical())
    change(value)
    with pytest.raises(VerificationError):
        Roster.parse(canonical_bytes(value))


def test_only_the_operator_signs(chain):
    operator, other = generate_signing_key(), generate_signing_key()
    data = SignedRoster.make(operator, chain[2]).encode()
    assert SignedRoster.open(data, operator_key=public_hex(operator), federation=LEAGUE) == chain[2]
    with pytest.raises(VerificationError):
        SignedRoster.open(data, operator_key=public_hex(other), federation=LEAGUE)
    with pytest.raises(VerificationError):
        SignedRoster.open(data, operator_key=public_hex(operator), federation="other-league")
    moved = parse_canonical(data) | {"roster": parse_canonical(chain[3].canonical())}
    with pytest.raises(VerificationError):
        SignedRoster.open(canonical_bytes(moved), operator_key=public_hex(operator), federation=LEAGUE)
