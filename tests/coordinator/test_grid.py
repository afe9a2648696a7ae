"""`LinkGrid` as Flower's own code would use it."""

from __future__ import annotations

import os
from typing import Any

import pytest
from foedus_coordinator.grid import COORDINATOR_NODE, LinkGrid
from foedus_protocols.envelope import open_envelope
from foedus_protocols.errors import StateError
from foedus_protocols.identity import COORDINATOR
from foedus_protocols.messages import AdvanceAnswer, AdvanceOrder, CharterAnswer, CharterOffer, CloseNotice


@pytest.fixture
def grid(federation: Any) -> Any:
    federation.start_run()
    run = federation.run()
    yield run.grid
    run.storage.close()


def offer(federation: Any) -> CharterOffer:
    row = federation.home.storage.run(federation.run_id)
    return CharterOffer(charter_digest=row.charter_digest, operator_signature=row.operator_signature)


def test_telemetry_and_update_check_are_off() -> None:
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_organisations_are_nodes(grid: LinkGrid, federation: Any) -> None:
    nodes = list(grid.get_node_ids())
    assert sorted(nodes) == sorted(federation.home.members.node_of(org) for org in federation.orgs)
    assert [node.node_id for node in grid.get_nodes()] == nodes


def test_a_pushed_message_is_a_signed_envelope(grid: LinkGrid, federation: Any) -> None:
    ids = list(grid.push_messages([grid.message("beta", "charter", offer(federation))]))
    alpha = federation.orgs["alpha"]
    data = federation.desk.poll("beta", 0.0)
    opened = open_envelope(data, public_key=alpha.operator_key, sender=COORDINATOR, receiver="beta", federation="test")
    assert [opened.digest] == ids
    assert CharterOffer.decode(opened.body) == offer(federation)
    assert federation.desk.poll("alpha", 0.0) is None


def test_pushing_again_after_a_restart_queues_nothing(grid: LinkGrid, federation: Any) -> None:
    body = CloseNotice(charter_digest="a" * 64, outcome="complete", reason="first")
    first = list(grid.push_messages([grid.message("beta", "close", body)]))
    again = federation.run().grid
    other = CloseNotice(charter_digest="a" * 64, outcome="failed", reason="second")
    assert list(again.push_messages([again.message("beta", "close", other)])) == first


def test_send_and_receive_returns_replies_as_flower_messages(grid: LinkGrid, federation: Any, pump: Any) -> None:
    messages = [grid.message(org, "charter", offer(federation)) for org in federation.orgs]
    assert {message.metadata.message_type for message in messages} == {"query.charter"}
    with pump(federation):
        replies = list(grid.send_and_receive(messages, timeout=30.0))
    assert sorted(grid.sender(reply) for reply in replies) == ["alpha", "beta", "gamma"]
    for reply in replies:
        assert reply.metadata.dst_node_id == COORDINATOR_NODE
        assert CharterAnswer.decode(grid.body(reply)).signature is not None


def test_send_and_receive_gives_up_at_its_timeout(grid: LinkGrid, federation: Any) -> None:
    message = grid.message("alpha", "charter", offer(federation))
    assert list(grid.send_and_receive([message], timeout=0.05)) == []


def test_replies_are_kept_until_asked_again(grid: LinkGrid, federation: Any) -> None:
    order = AdvanceOrder(charter_digest="a" * 64, round=1, history_digest="b" * 64)
    alpha = federation.orgs["alpha"]
    alpha._answer = lambda opened: AdvanceAnswer(adapter_digest="c" * 64)
    ids = list(grid.push_messages([grid.message("alpha", "advance", order, round=1, attempt=2)]))
    alpha.step()
    for _ in range(2):
        reply = next(iter(grid.pull_messages(ids)))
        assert reply.metadata.reply_to_message_id == ids[0]
        assert reply.metadata.group_id == "1.2"


def test_run_must_be_set_before_it_is_read(grid: LinkGrid) -> None:
    with pytest.raises(StateError, match="set_run"):
        _ = grid.run
