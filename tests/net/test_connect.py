"""The link through a proxy with CONNECT: everything goes through it, nothing beside it, and silence does not end it."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from foedus_protocols.errors import ConnectError
from foedus_protocols.link import LinkClient
from foedus_protocols.store import CHUNK_BYTES, FileStore
from support.connect import ConnectProxy
from support.waiting import wait_for

_ACCOUNT = "clinic:open-sesame"
_PING_SECONDS = 10.0  # `channel._KEEPALIVE`


def test_calls_and_transfers_go_through_one_tunnel(served: Any, tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK_BYTES + 17)
    digest = hashlib.sha256(data).hexdigest()
    vector = tmp_path / "vector"
    vector.write_bytes(data)
    with (
        ConnectProxy(account=_ACCOUNT) as proxy,
        LinkClient(served.address, served.tls, proxy=f"http://{_ACCOUNT}@127.0.0.1:{proxy.port}") as client,
    ):
        client.hello({})
        assert client.push(vector, digest, {"run": "run-1", "round": 1})["digest"] == digest
        pulled = client.pull(digest, FileStore(tmp_path / "pulled"))
        assert pulled.read_bytes() == data
        assert proxy.targets == [served.address]  # The name, not what it resolves to here.
        assert proxy.bytes_up > len(data)


@pytest.mark.parametrize("account", ["", "clinic:wrong@"])
def test_a_proxy_that_wants_another_account_is_named_and_not_passed_by(served: Any, account: str) -> None:
    with (
        ConnectProxy(account=_ACCOUNT) as proxy,
        LinkClient(served.address, served.tls, proxy=f"http://{account}127.0.0.1:{proxy.port}") as client,
    ):
        with pytest.raises(ConnectError, match="407") as caught:
            client.hello({})
        assert proxy.refused > 0
        assert proxy.targets == []
    assert "wrong" not in str(caught.value)


def test_a_proxy_that_is_not_there_is_not_passed_by(served: Any) -> None:
    with ConnectProxy() as proxy:
        gone = proxy.port
    with (
        LinkClient(served.address, served.tls, proxy=f"http://127.0.0.1:{gone}") as client,
        pytest.raises(ConnectError, match=rf"{served.address}.*{gone}"),
    ):
        client.hello({})


def test_a_tunnel_is_never_silent_for_long(served: Any) -> None:
    with (
        ConnectProxy() as proxy,
        LinkClient(served.address, served.tls, proxy=f"http://127.0.0.1:{proxy.port}") as client,
    ):
        client.hello({})
        # The exchange's own last frames first, then nothing but the keepalive speaks.
        time.sleep(1.0)
        quiet = proxy.bytes_up
        wait_for(lambda: proxy.bytes_up > quiet, "a ping", 2 * _PING_SECONDS)


@pytest.mark.slow
def test_an_idle_minute_behind_an_address_translator_is_survived(served: Any) -> None:
    with (
        ConnectProxy(forget_seconds=60.0) as proxy,
        LinkClient(served.address, served.tls, proxy=f"http://127.0.0.1:{proxy.port}") as client,
    ):
        client.hello({})
        time.sleep(75.0)
        client.hello({})
        assert len(proxy.targets) == 1


@pytest.mark.slow
def test_a_tunnel_that_was_forgotten_is_noticed_and_opened_again(served: Any) -> None:
    with (
        ConnectProxy(forget_seconds=2.0) as proxy,
        LinkClient(served.address, served.tls, proxy=f"http://127.0.0.1:{proxy.port}") as client,
    ):
        client.hello({})
        # The first ping after two silent seconds is swallowed; the connection is given up 5 s later.
        time.sleep(20.0)
        client.hello({})
        assert len(proxy.targets) == 2
