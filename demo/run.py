"""`make run` without a backend of your own: a llama.cpp server with a tiny model, and the proxy in front of it.

Both are child processes. Ctrl-C or SIGTERM stops them and waits for them; when one ends by itself the other is stopped
and the exit code is 1.
"""

import argparse
import asyncio
import signal
import socket
import sys
from asyncio.subprocess import Process
from pathlib import Path

import aiohttp

DEMO = Path(__file__).resolve().parent
MODEL = "tiny-think"
READY_WITHIN_S = 30
STOP_WITHIN_S = 10
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# An address that means "all interfaces" is one to listen on, not one to call.
CALLABLE_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}

RUNNING = """
  proxy    {url}  (pid {proxy_pid})
  backend  {backend_url}  (llama.cpp, pid {backend_pid})
  model    {model}  (4 MB, answers a few fixed questions)

A plain answer:

curl -s {url}/responses -H 'content-type: application/json' -d '{{
  "model": "{model}", "input": "Hello", "temperature": 0, "max_output_tokens": 200}}'

A streamed one:

curl -sN {url}/responses -H 'content-type: application/json' -d '{{
  "model": "{model}", "input": "Tell me a story", "stream": true, "temperature": 0, "max_output_tokens": 200}}'

A tool call (the model knows the tool, but is too small to copy the city):

curl -s {url}/responses -H 'content-type: application/json' -d '{{
  "model": "{model}", "input": "What is the weather in Paris?", "temperature": 0, "max_output_tokens": 200,
  "tools": [{{"type": "function", "name": "get_weather", "description": "Get the weather", "parameters": {{
    "type": "object", "properties": {{"city": {{"type": "string"}}}}, "required": ["city"]}}}}]}}'

Ctrl-C stops everything."""


class DemoError(Exception):
    """Says in one line why the demo cannot go on."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the proxy in front of a built-in backend.")
    parser.add_argument("--host", default="127.0.0.1", help="where the proxy listens (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one (default: %(default)s)")
    return parser.parse_args()


def usable_port(host: str, port: int) -> int:
    """Where the proxy will listen. Raises: DemoError when it could not."""
    try:
        return bind_once(host, port)
    except OSError as exc:
        reason = exc.strerror or exc
        raise DemoError(f"Cannot listen on {host} port {port}: {reason}. Try `make run PORT=8081`.") from exc


def bind_once(host: str, port: int) -> int:
    """The port that was bound and let go again: `port` itself, or a free one for 0."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        return int(probe.getsockname()[1])


def base_url(host: str, port: int) -> str:
    host = CALLABLE_HOST.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Children:
    """The child processes: started in order, watched, stopped in reverse order."""

    def __init__(self) -> None:
        self._processes: list[Process] = []

    async def start(self, script: Path, *arguments: str) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), *arguments, stdin=asyncio.subprocess.DEVNULL
        )
        self._processes.append(process)
        return process

    async def stop(self) -> None:
        while self._processes:
            await stop_one(self._processes.pop())


async def stop_one(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_WITHIN_S)
    except TimeoutError:
        process.kill()
        await process.wait()


async def watch(name: str, process: Process) -> None:
    code = await process.wait()
    raise DemoError(f"The {name} ended by itself with exit code {code}.")


async def wait_until_ready(name: str, url: str) -> None:
    """Raises: DemoError when `url` has not answered 200 within READY_WITHIN_S."""
    try:
        async with asyncio.timeout(READY_WITHIN_S), aiohttp.ClientSession() as session:
            while True:
                if await answers(session, url):
                    return
                await asyncio.sleep(0.05)
    except TimeoutError as exc:
        raise DemoError(f"The {name} did not answer {url} within {READY_WITHIN_S} s.") from exc


async def answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as reply:
            return reply.status == 200
    except aiohttp.ClientError:
        return False


async def serve(host: str, port: int, children: Children) -> None:
    """Runs until cancelled, or until a child ends. Raises: a group of DemoError."""
    url, backend_port = base_url(host, port), bind_once("127.0.0.1", 0)
    backend_url = base_url("127.0.0.1", backend_port)
    async with asyncio.TaskGroup() as watchers:
        backend = await children.start(DEMO / "llamacpp_server.py", "--port", str(backend_port), "--name", MODEL)
        watchers.create_task(watch("backend", backend))
        await wait_until_ready("backend", f"{backend_url}/health")
        options = ("--upstream", f"{backend_url}/v1", "--host", host, "--port", str(port))
        proxy = await children.start(DEMO.parent / "proxy.py", *options)
        watchers.create_task(watch("proxy", proxy))
        await wait_until_ready("proxy", f"{url}/healthz")
        facts = {"url": f"{url}/v1", "proxy_pid": proxy.pid, "backend_url": f"{backend_url}/v1"}
        print(RUNNING.format(**facts, backend_pid=backend.pid, model=MODEL), flush=True)


async def serve_until_signal(host: str, port: int) -> None:
    """Returns after a stop signal; a second one changes nothing, since stopping is bounded. Raises: as `serve`."""
    asked = asyncio.Event()
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    children = Children()
    serving = asyncio.create_task(serve(host, port, children))
    waiting = asyncio.create_task(asked.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    serving.cancel()
    waiting.cancel()
    await asyncio.gather(serving, waiting, return_exceptions=True)
    await children.stop()
    # Ctrl-C reaches the children too, and their end is then no failure.
    if not asked.is_set():
        serving.result()


def main() -> None:
    args = parse_args()
    problems: list[str] = []
    try:
        asyncio.run(serve_until_signal(args.host, usable_port(args.host, args.port)))
    except* DemoError as group:
        problems += map(str, group.exceptions)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
