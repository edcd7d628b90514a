"""A network that is not to be trusted: a TCP proxy on loopback that spoils what passes."""

# ruff: noqa: S311 - chance that can be repeated, not secrets
from __future__ import annotations

import asyncio
import os
import random
from contextlib import suppress
from pathlib import Path

KINDS = ("cut", "delay", "drop", "reply")
CHANCE = 0.004  # that a given chunk is spoilt
READY = b"Z\0\0\0\5"  # begins the last message of an answer, one byte from its end


class Proxy:
    """Forwards to the server, and for each chunk throws the dice.

    ``cut`` forwards a part of it and cuts the connection; ``delay`` holds it back; ``drop``
    swallows it, stays silent and then cuts; ``reply`` sends a request on, waits until the server
    has done all of it, and cuts without an answer.
    """

    def __init__(self, port: int, target: int, kinds: tuple[str, ...], seed: int, folder: str):
        self.port, self.target, self.kinds = port, target, kinds
        self._chance = random.Random(seed)
        self._folder = Path(folder)
        self._count = os.open(self._folder / "spoilt", os.O_APPEND | os.O_CREAT | os.O_WRONLY)

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
        lost = asyncio.Event()  # set when the answer is to be swallowed
        pumps = [
            asyncio.ensure_future(self._pump(reader, up_writer, lost, request=True)),
            asyncio.ensure_future(self._pump(up_reader, writer, lost, request=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (writer, up_writer):
                end.transport.abort()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        lost: asyncio.Event,
        *,
        request: bool,
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if lost.is_set() and not request:
                    if data[-6:-1] == READY:
                        return
                    continue
                kind = self._dice()
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
                    lost.set()
                target.write(data)
                await target.drain()

    def _dice(self) -> str | None:
        if self._chance.random() > CHANCE or (self._folder / "calm").exists():
            return None
        os.write(self._count, b".")
        return self._chance.choice(self.kinds)


def spoilt(folder: Path) -> int:
    """Tell how many chunks were spoilt so far."""
    counted = folder / "spoilt"
    return counted.stat().st_size if counted.exists() else 0


def run(port: int, target: int, kinds: tuple[str, ...], seed: int, folder: str) -> None:
    asyncio.run(Proxy(port, target, kinds, seed, folder).serve())
