"""The yardstick of what goes through: aiohttp in front of aiohttp, which copies bytes and knows nothing of them."""

import argparse
import asyncio

import aiohttp
import uvloop
from aiohttp import web


class BytesRelay:
    def __init__(self, upstream: str, session: aiohttp.ClientSession) -> None:
        self.upstream = upstream
        self.session = session

    async def healthy(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def relay(self, request: web.Request) -> web.StreamResponse:
        url = self.upstream + request.path.removeprefix("/v1")
        headers = {"content-type": request.headers["content-type"], "content-length": request.headers["content-length"]}
        async with self.session.post(url, data=request.content, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status, headers={"content-type": answer.content_type})
            response.content_length = answer.content_length
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
        return response


async def serve(upstream: str, port: int) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        relay = BytesRelay(upstream, session)
        application = web.Application(client_max_size=0)
        application.add_routes([web.get("/healthz", relay.healthy), web.post("/{path:.*}", relay.relay)])
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--upstream", required=True)
    flags.add_argument("--port", type=int, required=True)
    given = flags.parse_args()
    uvloop.run(serve(given.upstream, given.port))


if __name__ == "__main__":
    main()
