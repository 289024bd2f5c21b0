"""Where the program listens: a port or a unix socket; how large the head of a request may be; and what is said of it.

May not know routes. Source: unix(7); RFC 6585 on 431; httptools, which gives a header only when it is whole.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from settings import ServerSettings, SettingsError

log = logging.getLogger("responses_proxy.listening")

BACKLOG = 2048
CONNECT_S = 1.0
LINGER_S = 0.05  # that long the first request of a connection may be on its way when the program stops
# The request line and all headers.
HEAD_BYTES = 64 * 1024
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


# -- unix sockets ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unix_listener(path: str, mode: int) -> Iterator[socket.socket]:
    """Listens on a file that nobody else listens on, and removes it at the end. Raises: SettingsError."""
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        mask = os.umask(0o777 & ~mode)  # so that the file never has another mode, not even for a moment
        try:
            listener.bind(path)
        except OSError as error:
            raise SettingsError(f"server.unix_socket: {path}: {error.strerror or error}") from error
        finally:
            os.umask(mask)
        own = _identity(path)
        listener.listen(BACKLOG)
        try:
            yield listener
        finally:
            if _identity(path) == own:  # else another process has put its own there
                os.unlink(path)


def _remove_stale(path: str) -> None:
    """What a killed process left; nothing else. Raises: SettingsError."""
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return
    if not is_socket:
        raise SettingsError(f"server.unix_socket: {path} is there already, and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(CONNECT_S)
        try:
            client.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError as error:
            raise SettingsError(f"server.unix_socket: {path}: {error.strerror or error}") from error
        else:
            raise SettingsError(f"server.unix_socket: {path}: another process listens there")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


# -- heads -------------------------------------------------------------------------------------------------------------


ABOUT_UPGRADES = frozenset((b"connection", b"http2-settings", b"upgrade"))


class HeadLimit(HttpToolsProtocol):
    """Refuses a head that is too large, before it is kept; the server itself has no limit with this parser.

    An upgrade to anything but a WebSocket is left alone, as RFC 9110, section 7.8, allows: the parser, which would take
    the body for what comes after the upgrade, reads such a head again without it.
    """

    _is_in_head = True
    _is_in_body = False
    _is_too_large = False
    # What came of the head at least, and what came last; which may begin with the end of another request.
    _came_bytes = 0
    _read = b""
    _is_mixed = False
    _is_left_alone = False

    def shutdown(self) -> None:
        """A connection that has brought nothing yet is not closed at once: its request is on its way, most likely."""
        if self.cycle is None:
            self.loop.call_later(LINGER_S, self._shut_down)
        else:
            super().shutdown()

    def _shut_down(self) -> None:
        if not self.transport.is_closing():
            protocol = cast(Any, self.transport.get_protocol())  # of a WebSocket, if the request was for one
            super().shutdown() if protocol is self else protocol.shutdown()

    def data_received(self, data: bytes) -> None:
        self._read, self._is_mixed = data, self._is_in_body
        self._came_bytes += len(data)
        super().data_received(data)
        self._read = b""
        if self._is_in_head and self._came_bytes > HEAD_BYTES and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._came_bytes = 0 if self._is_mixed else len(self._read)

    def on_headers_complete(self) -> None:
        self._is_in_head, self._is_in_body = False, True
        if self._came_bytes + len(self._read) > HEAD_BYTES and self._head_bytes() > HEAD_BYTES:
            self._is_too_large = True
            raise ValueError("the head of a request is too large")  # the parser then asks for `send_400_response`
        self._is_left_alone = self._is_foreign_upgrade()
        if not self._is_left_alone:
            super().on_headers_complete()

    def _is_foreign_upgrade(self) -> bool:
        """A CONNECT is one, too, for the parser; it is refused by the application."""
        return self.parser.should_upgrade() and not self._should_upgrade() and self.parser.get_method() != b"CONNECT"

    def on_message_complete(self) -> None:
        self._is_in_body, self._is_mixed = False, True
        if not self._is_left_alone:
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """The server calls it where the parser has stopped, which tells how much of the read was the head."""
        stopped = sys.exception()
        if not (self._is_left_alone and isinstance(stopped, httptools.HttpParserUpgrade)):
            super()._unsupported_upgrade_warning()
            return
        rest = self._read[stopped.args[0] :]
        head = head_without_upgrade(self.parser.get_method(), self.url, self.parser.get_http_version(), self.headers)
        self._is_left_alone = False
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # of older parsers; as the server sets it
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(head + rest)

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def send_400_response(self, msg: str) -> None:
        if self._is_too_large:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        log.warning("the head of a request has more than %d bytes", HEAD_BYTES)
        self.transport.write(TOO_LARGE)
        self.transport.close()


def head_without_upgrade(method: bytes, url: bytes, version: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    tokens = [token.strip() for name, value in headers if name == b"connection" for token in value.lower().split(b",")]
    kept = [(name, value) for name, value in headers if name not in ABOUT_UPGRADES]
    if b"close" in tokens:
        kept.append((b"connection", b"close"))
    lines = b"".join(b"%b: %b\r\n" % header for header in kept)
    return b"%b %b HTTP/%b\r\n%b\r\n" % (method, url, version.encode(), lines)


# -- what is said ------------------------------------------------------------------------------------------------------


def tell_where(settings: ServerSettings, auth_mode: str, addresses: Iterable[Any]) -> None:
    """One line for each address, and a warning where strangers may come."""
    if settings.unix_socket:
        named = (settings.unix_socket, settings.unix_socket_mode)
        log.info("listening on the unix socket %s (mode %s); server.host and server.port are not used", *named)
        return
    for host, port, *_ in addresses:
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if auth_mode == "none" and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            log.warning("auth.mode is 'none': whoever reaches %s sees and changes everything", host)
