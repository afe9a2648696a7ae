"""Who speaks with whom: one minor version apart at most, and unknown fields are no trouble."""

from __future__ import annotations

from typing import Any

import pytest
from foedus_protocols.errors import VerificationError
from foedus_protocols.hello import PROGRAM, HelloAnswer, HelloRequest, negotiate

REQUEST: dict[str, Any] = {"protocol": 1, "org": "clinic"}
ANSWER: dict[str, Any] = {
    "protocol": 1,
    "version": "0.1.0",
    "federation": "test-league",
    "org": "clinic",
    "operator_key": "0" * 64,
    "roster_digest": "1" * 64,
    "roster_version": 3,
    "roster_signature": "2" * 128,
    "server_time": 1_800_000_000.5,
}


def test_what_version_1_0_says_is_read_as_1_0() -> None:
    assert HelloRequest.decode(REQUEST).minor == 0
    said = HelloAnswer.decode(ANSWER)
    assert (said.minor, said.receipts, said.authorities, said.renew) == (0, [], None, False)


def test_what_a_newer_side_adds_is_left_out() -> None:
    assert HelloRequest.decode(REQUEST | {"minor": 2, "from_the_future": {"x": 1}}).minor == 2
    assert HelloAnswer.decode(ANSWER | {"minor": 2, "from_the_future": [1]}).minor == 2


def test_what_is_said_is_read_back() -> None:
    said = HelloRequest(protocol=1, minor=1, version=PROGRAM, org="clinic", receipts_from=3, authorities=["3" * 64])
    assert HelloRequest.decode(said.encode()) == said


@pytest.mark.parametrize("change", [{"org": "Clinic!"}, {"protocol": "1"}, {"receipts_from": -1}, {"request": 7}])
def test_a_malformed_hello_is_refused_by_field(change: dict[str, Any]) -> None:
    with pytest.raises(VerificationError, match=next(iter(change))):
        HelloRequest.decode(REQUEST | change)


@pytest.mark.parametrize("ours", [0, 1, 2])
@pytest.mark.parametrize("theirs", [0, 1, 2])
def test_one_minor_apart_speaks_the_lower_one(ours: int, theirs: int) -> None:
    said = HelloRequest.decode(REQUEST | {"minor": theirs})
    if abs(ours - theirs) <= 1:
        assert negotiate(said, us="coordinator", them="organisation", minor=ours) == min(ours, theirs)
        return
    older = "coordinator" if ours < theirs else "organisation"
    with pytest.raises(VerificationError, match=f"update the {older}$"):
        negotiate(said, us="coordinator", them="organisation", minor=ours)


@pytest.mark.parametrize(("theirs", "older"), [(0, "organisation"), (2, "coordinator")])
def test_another_major_version_is_refused_whatever_the_minor(theirs: int, older: str) -> None:
    with pytest.raises(VerificationError, match=f"update the {older}$"):
        negotiate(
            HelloRequest.decode(REQUEST | {"protocol": theirs, "minor": 1}), us="coordinator", them="organisation"
        )
