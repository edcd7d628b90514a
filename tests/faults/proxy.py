"""A network that is not to be trusted: a TCP proxy on loopback that spoils what passes."""

# ruff: noqa: S311 - chance that can be repeated, not secrets
from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("cut", "delay", "drop", "reply")
CHANCE = 0.004  # that a given chunk is spoilt
READY = b"Z\0\0\0\5"  # begins the last message of an answer, one byte from its end

STOP_CHANCE = 0.05  # that a given write is held up by its backend
STOPPED = 1.0  # seconds, at most, that a backend is stopped
GREETING = re.compile(b"K\0\0\0\x0c(.{4}).{4}" + READY + rb"I\Z", re.DOTALL)  # has its process id
RUN = re.compile(rb"(?:own-\d+-[0-9a-f]+|shared-\d+)\b")
WRITE = re.compile(rb":\d+:[0-9a-f]{16}|COMMIT")  # names a lease, or ends a transaction
WHOLE = (b"S\0\0\0\4", b"COMMIT\0")  # how requests end; a long one comes in parts


@dataclass
class Link:
    """One connection of a client, and the one to the server that stands for it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    backend: int = 0  # its process
    request: bytes = b""  # the one that is not answered yet, as far as it has come
    run: bytes = b""  # what the last request was about
    lost: asyncio.Event = field(default_factory=asyncio.Event)  # swallow the answer


class Proxy:
    """Forwards to the server, and for each chunk throws the dice.

    ``cut`` forwards a part of it and cuts the connection; ``delay`` holds it back; ``drop``
    swallows it, stays silent and then cuts; ``reply`` sends a request on, waits until the server
    has done all of it, and cuts without an answer. ``stop`` stops the backend of a write, cuts
    its client off, and lets it do the write when the run has gone on by another connection.
    """

    def __init__(self, port: int, target: int, kinds: tuple[str, ...], seed: int, folder: str):
        self.port, self.target, self.kinds = port, target, kinds
        self._chance = random.Random(seed)
        self._folder = Path(folder)
        self._count = os.open(self._folder / "spoilt", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        self._late = os.open(self._folder / "late", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        self._answered: Counter[bytes] = Counter()  # requests, by the run that they are about
        self._answer = asyncio.Condition()
        # Of a task that waits for a stream, asyncio itself keeps only weak references.
        self._connections: set[asyncio.Task[None] | None] = set()

    async def serve(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        async with server:
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, up_writer)
        me = asyncio.current_task()
        self._connections.add(me)
        pumps = [
            asyncio.ensure_future(self._pump(reader, up_writer, link, request=True)),
            asyncio.ensure_future(self._pump(up_reader, writer, link, request=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (writer, up_writer):
                end.transport.abort()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._connections.discard(me)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        link: Link,
        *,
        request: bool,
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if request:
                    link.request += data
                    named = RUN.search(data)
                    link.run = named[0] if named else link.run
                elif link.lost.is_set():
                    if data[-6:-1] == READY:
                        return
                    continue
                elif not link.backend and (greeting := GREETING.search(data)):
                    link.backend = int.from_bytes(greeting[1], "big")
                whole = request and link.backend and link.request.endswith(WHOLE)
                kind = self._dice(stoppable=whole and WRITE.search(link.request))
                if kind == "stop":
                    await self._stop(link, data)
                if kind == "cut":
                    target.write(data[: self._chance.randrange(len(data))])
                    await target.drain()
                    return
                if kind == "drop":
                    await asyncio.sleep(self._chance.uniform(0.2, 1.0))
                    return
                if kind == "delay":
                    await asyncio.sleep(self._chance.uniform(0.05, 0.4))
                if kind == "reply":
                    if not request:
                        return  # the server has done it, and nobody hears of it
                    link.lost.set()
                target.write(data)
                await target.drain()
                if data[-6:-1] == READY and not request:
                    link.request = b""
                    async with self._answer:
                        self._answered[link.run] += 1
                        self._answer.notify_all()

    async def _stop(self, link: Link, data: bytes) -> None:
        """Hold a write up until its run has gone on, or nothing moves without it; never return."""
        at_once = self._chance.random() < 0.7
        link.lost.set()
        try:
            if at_once:
                os.kill(link.backend, signal.SIGSTOP)
            link.server.write(data)
            await link.server.drain()
            if not at_once:  # somewhere in the middle, perhaps with the row locked
                await asyncio.sleep(self._chance.uniform(0, 0.001))
                os.kill(link.backend, signal.SIGSTOP)
            link.client.transport.abort()
            goal = self._answered[link.run] + self._chance.randint(2, 6)
            async with self._answer:
                gone_on = self._answer.wait_for(lambda: self._answered[link.run] >= goal)
                await asyncio.wait_for(gone_on, STOPPED)
            os.write(self._late, b".")
        except asyncio.TimeoutError:
            pass
        finally:
            os.kill(link.backend, signal.SIGCONT)
        await asyncio.Event().wait()  # the other pump ends this one when the answer has come

    def _dice(self, stoppable: object) -> str | None:
        kind = self._chance.choice(self.kinds)
        chance = CHANCE if kind != "stop" else STOP_CHANCE if stoppable else 0
        if self._chance.random() >= chance or (self._folder / "calm").exists():
            return None
        os.write(self._count, b".")
        return kind


def spoilt(folder: Path, what: str = "spoilt") -> int:
    """Tell how many chunks were spoilt so far, or how many writes have come late."""
    counted = folder / what
    return counted.stat().st_size if counted.exists() else 0


def run(port: int, target: int, kinds: tuple[str, ...], seed: int, folder: str) -> None:
    asyncio.run(Proxy(port, target, kinds, seed, folder).serve())
