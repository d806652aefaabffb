"""Load for a web server: as many requests as it answers, or as many as are asked for, over kept connections."""

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


@dataclass
class Outcome:
    """What became of the requests of a phase.

    Attributes:
        seconds: from when a request was due until its last byte, of every request that was answered with 200.
        statuses: number of answers by status; 0 counts connections that broke.
        duration: seconds of the phase.
        samples: what was looked at meanwhile.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    duration: float = 0.0
    samples: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers with 200 per second."""
        return len(self.seconds) / self.duration

    @property
    def num_failed(self) -> int:
        """Requests that were neither answered nor told to come back."""
        return sum(number for status, number in self.statuses.items() if status not in (200, 429))

    def add(self, status: int, seconds: float) -> None:
        """Note one request."""
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200:
            self.seconds.append(seconds)


class Connection:
    """One kept connection, opened when it is first needed and again after it broke."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body; status 0 where the connection breaks."""
        try:
            if self._streams is not None and self._streams[0].at_eof():
                self.close()  # a server closes connections that are idle for long, which is no failure
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._streams
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            return int(head[9:12]), await reader.readexactly(int(length[1]) if length else 0)
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return 0, b""

    def close(self) -> None:
        """Give the connection up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def request_bytes(method: str, path: str, body: Any = None) -> bytes:
    """A whole HTTP request, JSON where it has a body."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def saturate(port: int, requests: Iterator[bytes], *, num_connections: int, seconds: float) -> Outcome:
    """Every connection sends its next request as soon as the last one is answered."""
    outcome = Outcome()
    connections = [Connection(port) for _ in range(num_connections)]
    began = perf_counter()

    async def keep_asking(connection: Connection) -> None:
        while (due := perf_counter()) < began + seconds:
            status, _ = await connection.ask(next(requests))
            outcome.add(status, perf_counter() - due)
            if status != 200:
                await asyncio.sleep(0.01)  # a client that is told to come back does not do so at once
        connection.close()

    await asyncio.gather(*(keep_asking(connection) for connection in connections))
    outcome.duration = perf_counter() - began
    return outcome


async def arrive(port: int, requests: Iterator[bytes], *, rate: float, seconds: float, seed: int = 0) -> Outcome:
    """Requests arrive at random (a Poisson process) at a rate, whether or not earlier ones are answered.

    Time counts from when a request was due, so that a server that stalls cannot hide it.
    """
    outcome, free, gaps = Outcome(), list[Connection](), random.Random(seed)
    began = perf_counter()

    async def ask(due: float) -> None:
        connection = free.pop() if free else Connection(port)
        status, _ = await connection.ask(next(requests))
        outcome.add(status, perf_counter() - due)
        free.append(connection)

    tasks, due = [], began
    while (due := due + gaps.expovariate(rate)) < began + seconds:
        await asyncio.sleep(max(due - perf_counter(), 0))
        tasks.append(asyncio.create_task(ask(due)))
    await asyncio.gather(*tasks)
    outcome.duration = perf_counter() - began
    for connection in free:
        connection.close()
    return outcome


async def watched(port: int, load: Any, path: str, read: Callable[[bytes], float], every: float = 0.05) -> Outcome:
    """The outcome of a load, with samples of what a page says meanwhile."""
    running = asyncio.ensure_future(load)
    connection, samples = Connection(port), []
    while not running.done():
        status, body = await connection.ask(request_bytes("GET", path))
        if status == 200:
            samples.append(read(body))
        await asyncio.sleep(every)
    connection.close()
    outcome: Outcome = await running
    outcome.samples = samples
    return outcome
