"""Clients that are processes of their own: started, waited for, and ended when they take too long."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

DEADLINE_S = 60.0


@dataclass
class Client:
    """How a client is started: where, and with nothing but these variables."""

    folder: Path
    environment: dict[str, str]

    async def run(self, *command: str | Path, told: str = "") -> str:
        """What it wrote, of a run that went well."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, cwd=self.folder, env=self.environment, stdin=pipe, stdout=pipe, stderr=pipe
        )
        try:
            async with asyncio.timeout(DEADLINE_S):
                written, complaints = await process.communicate(told.encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, (written.decode(), complaints.decode())
        return written.decode()
