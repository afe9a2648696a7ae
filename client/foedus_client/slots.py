"""When a finished vector leaves: at fixed slots, so that its time of arrival says nothing of the size of the sample.

With `vector_slot_seconds` in the charter the words are reserved as soon as they are made, and then held until the next
multiple of it since the Unix epoch, by the coordinator's clock. Other messages are answered meanwhile: holding is an
exception that puts the order aside. The moment is written down first, so that a kill does not shift it.
"""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime

from foedus_client.seat import Ports, Seat
from foedus_client.state import RoundRecord

_LOG = logging.getLogger("foedus.client")

_MARGIN_SECONDS = 10.0
_SLOWEST_BYTES_A_SECOND = 1 << 20  # What a vector is given to arrive in before the deadline; a public constant.


class Held(Exception):
    """The order is to be looked at again in so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"held for {seconds:.1f} s")
        self.seconds = seconds


def departure(now: float, *, slot: float, deadline: float, size: int) -> float:
    """When words that are ready now leave, in Unix seconds of the coordinator's clock.

    That is the next slot. Where it comes too late for the deadline, they leave at the last moment at which they can
    still arrive, if that is to come: as fixed a moment as a slot, since it follows from the deadline and the words'
    length alone. Where that has passed too, they leave at the next slot and are late: a later attempt takes the same
    words.
    """
    next_slot = math.ceil(now / slot) * slot
    last = deadline - _MARGIN_SECONDS - size / _SLOWEST_BYTES_A_SECOND
    return last if now <= last < next_slot else next_slot


def wait_for_slot(made: RoundRecord, deadline: float, seat: Seat, ports: Ports) -> None:
    """Return when the words may leave.

    Raises:
        Held: Not yet.

    Guarantees:
        Where the charter names slots, the first byte of a vector leaves at a moment that depends on the sample by at
        most which slot it is. After a kill or a broken line it goes on at once, since the slot has passed.
    """
    slot = seat.charter.schedule.vector_slot_seconds
    if not slot:
        return
    name, now = f"slot:{seat.digest}:{made.round}", ports.clock()
    planned = ports.state.fact(name)
    if planned is not None and float(planned) <= now:
        return
    moment = departure(now, slot=slot, deadline=deadline, size=made.words_bytes)
    if planned != str(moment):
        ports.state.remember(name, str(moment))
    when = f"{datetime.fromtimestamp(moment, UTC):%H:%M:%S} UTC"
    _LOG.info("round %d: the vector is ready and waits for its slot at %s", made.round, when)
    ports.doing(f"round {made.round} of {seat.run}: the vector waits for its slot at {when}")
    raise Held(max(0.0, moment - now))
