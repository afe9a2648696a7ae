"""Slow lines made of packets: what `tc netem` does, as a process between pairs of TUN devices.

A kernel often lacks netem's module, and a proxy that shapes bytes shows TCP a perfect line. Here every IP packet is
read from one device, queued behind the packets before it at the line's rate, delayed, perhaps lost, and written to the
other device: TCP at both ends sees a real line and does what it does there. Losses come from a seed.

Run as a program by `netns.py`: one argument of JSON, the devices as inherited descriptors, commands on standard input.
Left out: reordering, jitter, corruption.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import sys
import time
from dataclasses import dataclass

_PACKET_BYTES = 2048  # An MTU of 1500 and the device's own four bytes fit.


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one line does to packets, the same in both directions.

    Attributes:
        rate_bits: Bits a second.
        delay_seconds: One way, beyond the time that a packet takes at that rate.
        loss: The probability that a packet never arrives.
        queue_seconds: How long a packet may wait for those before it; beyond, it is dropped, as a modem does.
        seed: Of the losses.
    """

    rate_bits: float = 20e6
    delay_seconds: float = 0.1
    loss: float = 0.01
    queue_seconds: float = 0.2
    seed: int = 0


class _Direction:
    """One direction of one line."""

    def __init__(self, line: Line, target: int, seed: str) -> None:
        self.line = line
        self.target = target
        self._random = random.Random(seed)
        self._free_at = 0.0

    def arrival(self, length: int, now: float) -> float | None:
        """When a packet that enters now comes out, or None where it is lost."""
        start = max(now, self._free_at)
        if self._random.random() < self.line.loss or start - now > self.line.queue_seconds:
            return None
        self._free_at = start + 8 * length / self.line.rate_bits
        return self._free_at + self.line.delay_seconds


class Wire:
    """All lines of a network, in one loop."""

    def __init__(self, lines: list[Line], devices: list[tuple[int, int]]) -> None:
        """`devices[i]` are the descriptors of the two ends of line i."""
        self._directions: dict[int, tuple[int, _Direction]] = {}
        for number, (line, (near, far)) in enumerate(zip(lines, devices, strict=True)):
            self._directions[near] = (number, _Direction(line, far, f"{line.seed} {number} out"))
            self._directions[far] = (number, _Direction(line, near, f"{line.seed} {number} back"))
        self._cut: set[int] = set()
        self._due: list[tuple[float, int, int, bytes]] = []
        self._count = 0

    def run(self, commands: int) -> None:
        """Carry packets until `commands` ends; its lines are ``cut N`` and ``mend N``."""
        waiting = b""
        while True:
            pause = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            ready, _, _ = select.select([commands, *self._directions], [], [], pause)
            for descriptor in ready:
                if descriptor != commands:
                    self._take(descriptor)
                    continue
                data = os.read(commands, 4096)
                if not data:
                    return
                *whole, waiting = (waiting + data).split(b"\n")
                for command in whole:
                    self._obey(command.decode())
            self._deliver()

    def _obey(self, command: str) -> None:
        verb, number = command.split()
        (self._cut.add if verb == "cut" else self._cut.discard)(int(number))
        print(command, flush=True)  # Who asked may wait until it is so.

    def _take(self, descriptor: int) -> None:
        packet = os.read(descriptor, _PACKET_BYTES)
        number, direction = self._directions[descriptor]
        due = direction.arrival(len(packet), time.monotonic())
        if due is not None and number not in self._cut:
            self._count += 1
            heapq.heappush(self._due, (due, self._count, descriptor, packet))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, descriptor, packet = heapq.heappop(self._due)
            number, direction = self._directions[descriptor]
            if number not in self._cut:
                os.write(direction.target, packet)


def main() -> None:
    """Read the description, say that the wire is up, and carry packets."""
    described = json.loads(sys.argv[1])
    lines = [Line(**line) for line in described["lines"]]
    wire = Wire(lines, [(near, far) for near, far in described["devices"]])
    print("up", flush=True)
    wire.run(sys.stdin.fileno())


if __name__ == "__main__":
    main()
