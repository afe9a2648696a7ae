"""An organisation whose only way out is ``HTTPS_PROXY``: it joins and stays connected through it, and says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from foedus_local.processes import FOEDUS, Process, child_environment, free_ports, run_command
from support.connect import ConnectProxy
from support.waiting import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

_ACCOUNT = "clinic:open-sesame"


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A running coordinator's home, and an invitation for `clinic`."""
    home = tmp_path / "coordinator"
    link, enrolment = free_ports(2)
    run_command(
        "coordinator", "init", "--federation", "league", "--address", "127.0.0.1", "--link-port", str(link),
        "--enrolment-port", str(enrolment), "--home", str(home),
    )  # fmt: skip
    up = Process("coordinator", ["coordinator", "up", "--home", str(home)], tmp_path / "coordinator.log")
    up.start()
    wait_for(lambda: "listening" in up.log.read_text(), "the coordinator to listen")
    yield home, run_command("coordinator", "invite", "clinic", "--home", str(home))
    up.stop()


def client(*arguments: str, home: Path, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FOEDUS, "client", *arguments, "--home", str(home)],
        input=stdin,
        capture_output=True,
        text=True,
        env=child_environment() | variables,
        check=False,
    )


def test_https_proxy_is_honoured_for_enrolment_and_link_and_its_password_told_to_nobody(
    coordinator: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, invited = coordinator
    ours = tmp_path / "clinic"
    join = (
        "join", "--coordinator", invited["coordinator"], "--org", "clinic", "--ca-fingerprint",
        invited["ca_fingerprint"], "--token-stdin", "--no-wait",
    )  # fmt: skip
    with ConnectProxy(account=_ACCOUNT) as proxy:
        url = f"http://{_ACCOUNT}@127.0.0.1:{proxy.port}"
        named = client(*join, "--proxy", url, home=ours, stdin=invited["token"])
        assert named.returncode == 2  # A password in an argument is refused.
        assert "open-sesame" not in named.stdout + named.stderr

        joined = client(*join, home=ours, stdin=invited["token"], HTTPS_PROXY=url)
        assert joined.returncode == 0, joined.stderr
        run_command("coordinator", "approve", "clinic", "--yes", "--home", str(home))
        fetched = client("join", home=ours, HTTPS_PROXY=url)
        assert fetched.returncode == 0, fetched.stderr
        assert set(proxy.targets) == {invited["coordinator"]}

        enrolments = len(proxy.targets)
        log = tmp_path / "clinic.log"
        with log.open("wb") as output:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "foedus_protocols.cli", "client", "up", "--home", str(ours)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=child_environment() | {"HTTPS_PROXY": url},
            )
        try:
            wait_for(lambda: _seen(home), "the coordinator to hear of the daemon")
        finally:
            daemon.terminate()
            daemon.wait(30)
        assert len(proxy.targets) > enrolments
        assert f"127.0.0.1:{proxy.port}" in log.read_text()
        assert "HTTPS_PROXY" in log.read_text()
        for written in (log.read_text(), joined.stderr, joined.stdout, fetched.stderr, fetched.stdout):
            assert "open-sesame" not in written
        assert not [path for path in ours.rglob("*") if path.is_file() and b"open-sesame" in path.read_bytes()]


def test_no_proxy_dials_directly(coordinator: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, invited = coordinator
    with ConnectProxy() as proxy:
        joined = client(
            "join", "--coordinator", invited["coordinator"], "--org", "clinic", "--ca-fingerprint",
            invited["ca_fingerprint"], "--token-stdin", "--no-wait", home=tmp_path / "clinic", stdin=invited["token"],
            HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}", NO_PROXY="example.org,127.0.0.0/8",
        )  # fmt: skip
        assert joined.returncode == 0, joined.stderr
        assert proxy.targets == []


def _seen(home: Path) -> bool:
    members = run_command("coordinator", "status", "--home", str(home))["members"]
    return any(one["org"] == "clinic" and one["last_seen"] for one in members)
