"""How long the first events of a turn take whose chain is long, as one JSON line:
`bench/windows.py --port P --turns N --count N [--store FILE]`.

Grows chains of so many turns; then one more turn of each is measured, one at a time. With `--store` it waits until the
file says that the end of each chain was compacted ahead of that turn, one at a time too: few are made at once.
"""

import argparse
import asyncio
import sqlite3
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.load import (
    DEADLINE_S,
    LOOK_EVERY_S,
    Connection,
    Exchange,
    connect,
    median_delay_ms,
)

TEXT = ("word that then some line more time here " * 26)[:1024]
READY = "SELECT ahead IS NOT NULL FROM turn WHERE id = ?"


class Chain:
    """One chain on a connection of its own."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.tip: str | None = None

    async def grow(self, turns: int) -> None:
        for _ in range(turns):
            await self.turn()

    async def turn(self) -> tuple[Exchange, dict[str, Any]]:
        body = orjson.dumps({"model": "bench", "input": TEXT, "previous_response_id": self.tip, "stream": True})
        head = b"POST /v1/responses HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        exchange = self._connection.send(head + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        await exchange.finished
        response = exchange.answer()
        if response.get("status") != "completed":
            raise SystemExit(f"a turn has failed: {response}")
        self.tip = response["id"]
        return exchange, response


async def until_ready(file: str, chain: Chain) -> None:
    """The end of the chain was compacted ahead."""
    db = sqlite3.connect(f"file:{file}?mode=ro", uri=True, isolation_level=None)
    while not db.execute(READY, (chain.tip,)).fetchone()[0]:  # noqa: ASYNC110 - another process makes it
        await asyncio.sleep(LOOK_EVERY_S)
    db.close()


async def measured(given: argparse.Namespace) -> dict[str, Any]:
    chains = [Chain(await connect(given.port)) for _ in range(given.count)]
    await asyncio.gather(*(chain.grow(given.turns - 1) for chain in chains))
    for chain in chains:
        await chain.turn()
        if given.store:
            await until_ready(given.store, chain)
    seen = [await chain.turn() for chain in chains]
    return {
        "failed": 0,
        "created_ms": median_delay_ms([(exchange.sent_at, exchange.created_at) for exchange, _ in seen]),
        "delta_ms": median_delay_ms([(exchange.sent_at, exchange.delta_at) for exchange, _ in seen]),
        "compacted": sum(response["output"][0]["type"] == "compaction" for _, response in seen),
        "tokens": statistics.median(response["usage"]["input_tokens"] for _, response in seen),
    }


async def drive(given: argparse.Namespace) -> None:
    begun_at = time.perf_counter()
    async with asyncio.timeout(DEADLINE_S):
        seen = await measured(given)
    print(orjson.dumps({"took_s": time.perf_counter() - begun_at, **seen}).decode())


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--port", type=int, required=True)
    flags.add_argument("--turns", type=int, required=True)
    flags.add_argument("--count", type=int, required=True)
    flags.add_argument("--store")
    uvloop.run(drive(flags.parse_args()))


if __name__ == "__main__":
    main()
