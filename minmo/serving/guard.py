"""Who may connect: API keys, the Host and Origin of a browser, and the limits of what one client may take."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

KEY_PROTOCOL = "openai-insecure-api-key."
"""A browser cannot set a WebSocket's headers: there the key is a subprotocol, next to `realtime`."""


class Denied(Exception):
    """A request is refused before anything is done for it."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Limits:
    """message_bytes: of one message; unread_s, unread_bytes: that a client may leave unread, how long and how much;
    session_s: of a session; idle_s: without a message; sessions_per_key: at once; resume_s: how long a session waits
    for its client to come back."""

    message_bytes: int = 4 << 20
    unread_s: float = 15.0
    unread_bytes: int = 16 << 20
    session_s: float = 3600.0
    idle_s: float = 300.0
    sessions_per_key: int = 8
    resume_s: float = 60.0


class Guard:
    """keys: any of them opens; none are needed where there are none. origins: of other sites' pages that may connect.
    local: whether the server is bound to this machine alone: then its Host must be this machine's, or an origin's."""

    def __init__(self, keys: Iterable[str] = (), origins: Iterable[str] = (), *, local: bool = True) -> None:
        self._keys = [key.encode() for key in keys]
        self._origins = set(origins)
        self._hosts = {urlsplit(origin).netloc for origin in self._origins}
        self._local = local

    def admit(self, connection: HTTPConnection) -> str:
        """Whose request it is: the number of its key. Raises Denied."""
        host, origin = connection.headers.get("host", ""), connection.headers.get("origin")
        if self._local and host not in self._hosts and not is_local(_name(host)):
            # A name that a stranger's page has pointed at this machine would have the page's own origin.
            raise Denied(403, "wrong_host", f"this server is {host!r:.100} to nobody; use 127.0.0.1 or localhost")
        own = {f"{scheme}://{host}" for scheme in ("http", "https")}
        if origin is not None and origin not in own | self._origins:
            raise Denied(403, "wrong_origin", "pages of other sites may not connect; see minmo serve --origin")
        if not self._keys:
            return "0"
        given = _key(connection).encode()
        # Every key is compared, each in constant time.
        found = [number for number, key in enumerate(self._keys) if hmac.compare_digest(key, given)]
        if not found:
            raise Denied(401, "invalid_api_key", "give an API key: Authorization: Bearer KEY")
        return str(found[0])


def is_local(host: str) -> bool:
    """Whether a host's name or address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # brackets that hold no address
        return ""


def _key(connection: HTTPConnection) -> str:
    kind, _, key = connection.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return key.strip()
    offered = connection.headers.get("sec-websocket-protocol", "")
    names = [name.strip() for name in offered.split(",")]
    return next((name[len(KEY_PROTOCOL) :] for name in names if name.startswith(KEY_PROTOCOL)), "")
