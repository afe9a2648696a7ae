"""The coordinator as a running process: two ports, and one thread for each run that is not finished."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from foedus_protocols.charter import Charter
from foedus_protocols.enrolment import serve_enrolment
from foedus_protocols.errors import FoedusError
from foedus_protocols.identity import public_hex
from foedus_protocols.link import serve_link
from sqlalchemy.exc import SQLAlchemyError

from foedus_coordinator.app import start
from foedus_coordinator.cleanup import sweep
from foedus_coordinator.config import Home, at
from foedus_coordinator.grid import LinkGrid
from foedus_coordinator.presence import Presence
from foedus_coordinator.pulse import Pulse
from foedus_coordinator.run import Run
from foedus_coordinator.runner import Trouble, keep_going, words
from foedus_coordinator.service import EnrolmentDesk, LinkDesk
from foedus_coordinator.storage import RunRow
from foedus_coordinator.variant import write_variant

_LOOK_SECONDS = 0.5  # How long a run that the command line started waits to be picked up.
_RENEW_SECONDS = 10.0


def serve(home: Home, *, stop: threading.Event, say: Callable[[str], None]) -> None:
    """Serve until `stop` is set; runs that were interrupted go on where they were.

    Raises:
        StateError: Another process serves this home, or a port is taken.
    """
    config = home.config
    threads: dict[str, threading.Thread] = {}
    with home.locked(), ExitStack() as stack:
        home.renew_certificate()
        stack.callback(home.storage.close)
        _sweep(home, say)
        stack.callback(_join, threads)
        link = serve_link(at(config.listen, config.link_port), link_desk(home), home.tls, slots=config.slots)
        stack.callback(link.stop)
        enrolment_desk = EnrolmentDesk(
            members=home.members,
            federation=config.federation,
            operator_key=public_hex(home.operator_key),
            authorities=home.authorities,
            link_address=at(config.address, link.port),
        )
        enrolment = serve_enrolment(at(config.listen, config.enrolment_port), enrolment_desk, home.tls)
        stack.callback(enrolment.stop)
        stack.callback(stop.set)  # First of all on the way out: the runs' threads look at it.
        addresses = at(config.address, link.port), at(config.address, enrolment.port)
        pulse = Pulse(home.root, link=addresses[0], enrolment=addresses[1])
        say(f"listening: federation {config.federation}, link {addresses[0]}, enrolment {addresses[1]}")
        _watch(home, threads, stop, say, pulse.report)


def run_of(
    home: Home,
    row: RunRow,
    *,
    stop: threading.Event,
    say: Callable[[str], None],
    alive: Callable[[], None] = lambda: None,
) -> Run:
    """Put together what a run's steps reach for."""
    charter = Charter.parse(home.files.path(row.charter_digest).read_bytes())
    grid = LinkGrid(
        storage=home.storage,
        mailbox=home.mailbox,
        members=home.members,
        key=home.operator_key,
        federation=home.config.federation,
        run_name=row.id,
        orgs=sorted(participant.id for participant in charter.participants),
    )
    return Run(
        id=row.id,
        charter=charter,
        storage=home.storage,
        mailbox=home.mailbox,
        grid=grid,
        files=home.files,
        vectors=home.vectors,
        presence=Presence(charter, members=home.members, clock=time.time),
        stop=stop,
        say=say,
        write_variant=lambda run, chain: write_variant(
            run, chain, folder=home.root / "variants", key=home.operator_key
        ),
        alive=alive,
    )


def link_desk(home: Home) -> LinkDesk:
    """What answers at the link port."""
    return LinkDesk(
        storage=home.storage,
        mailbox=home.mailbox,
        members=home.members,
        authorities=home.authorities,
        files=home.files,
        vectors=home.vectors,
        key=home.operator_key,
        federation=home.config.federation,
    )


def _watch(
    home: Home,
    threads: dict[str, threading.Thread],
    stop: threading.Event,
    say: Callable[[str], None],
    report: Callable[[str, Trouble | None], None],
) -> None:
    """Start a thread for each run that needs one, and renew the certificate, until told to stop."""
    renew_at = time.monotonic() + _RENEW_SECONDS
    said = ""
    while not stop.wait(_LOOK_SECONDS):
        try:
            for row in home.storage.runs():
                if row.state != "finished" and row.id not in threads:
                    threads[row.id] = threading.Thread(
                        target=_execute,
                        args=(home, row),
                        kwargs={"stop": stop, "say": say, "report": partial(report, row.id)},
                        name=f"run-{row.id}",
                    )
                    threads[row.id].start()
            if time.monotonic() > renew_at:
                renew_at = time.monotonic() + _RENEW_SECONDS
                if home.renew_certificate():
                    say("the ports' certificate was renewed")
            said = ""
        except (FoedusError, OSError, SQLAlchemyError) as error:
            # A full disk or a locked database passes, and whoever is connected is served meanwhile.
            if words(error) != said:
                said = words(error)
                say(f"looking after runs and the certificate: {said}; tried again all the time")


def _execute(
    home: Home,
    row: RunRow,
    *,
    stop: threading.Event,
    say: Callable[[str], None],
    report: Callable[[Trouble | None], None],
) -> None:
    """One run's thread."""

    def play() -> None:
        run = run_of(home, row, stop=stop, say=say, alive=lambda: report(None))
        start(run, run.grid)

    keep_going(row.id, play, storage=home.storage, stop=stop, say=say, report=report)
    if not stop.is_set():
        _sweep(home, say)


def _sweep(home: Home, say: Callable[[str], None]) -> None:
    """Erase what ended runs left behind, or say why not: the next one does."""
    try:
        sweep(home.storage, files=home.files, pushed=home.vectors)
    except (FoedusError, OSError, SQLAlchemyError) as error:
        say(f"erasing what ended runs left behind: {words(error)}; tried again later")


def _join(threads: dict[str, threading.Thread]) -> None:
    for thread in threads.values():
        thread.join()
