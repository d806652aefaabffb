"""What is refused before a request is parsed, and the count of what was answered."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

from serving.requests import BODY, Limits, RequestError

PATHS = ("/", "/healthz", "/items", "/metrics", "/recommend")
OPEN_PATHS = ("/", "/healthz")
"""Need no token: the page holds no data, and who watches over servers has none."""

Scope = Mapping[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """ASGI middleware in front of everything: token, host name, content type, size and time of a body.

    Without a token a server on the loopback address answers requests to loopback names alone, so that no web page can
    reach it under a name of its own (DNS rebinding); the content type keeps out forms of other sites.

    Args:
        app: what is behind it.
        limits: of bodies.
        token: that requests must carry as `Authorization: Bearer ...`; None lets everybody in.
        loopback_only: the server listens on a loopback address.
        count: called with path, status and seconds of every request.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        limits: Limits,
        token: str | None,
        loopback_only: bool,
        count: Callable[[str, int, float], None],
    ) -> None:
        self._app = app
        self._limits = limits
        self._token = token
        self._check_host = loopback_only and token is None
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse, one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = perf_counter(), 500

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass_or_refuse(scope, receive, send_counted)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._count(path, status, perf_counter() - began)

    async def _pass_or_refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_head(scope)
            body = await _read_body(receive, self._limits)
        except RequestError as error:
            await JSONResponse(error.content(), error.status, error.headers)(scope, receive, send)  # type: ignore[arg-type]
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, receive_again, send)

    def _check_head(self, scope: Scope) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._check_host and not is_loopback_host(headers.get("host", "")):
            message = "without a token this server answers under loopback names alone; start it with --token-env."
            raise RequestError(403, "Host", message)
        if self._token is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self._token.encode("latin-1"))
            if not right or scheme.lower() != "bearer":
                message = "expected the header 'Authorization: Bearer TOKEN' with this server's token."
                raise RequestError(401, "Authorization", message, **{"WWW-Authenticate": "Bearer"})
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and media_type != "application/json":
            raise RequestError(415, "Content-Type", f"expected application/json, got {media_type or 'nothing'}.")
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self._limits.max_body_bytes:
            raise _too_large(self._limits.max_body_bytes)


def is_loopback_host(header: str) -> bool:
    """Whether a Host header names the machine itself: localhost, 127.0.0.1:8000, [::1]."""
    try:
        name = urlsplit(f"//{header}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


async def _read_body(receive: Receive, limits: Limits) -> bytes:
    """The whole body.

    Raises:
        RequestError: if it is too large or too slow, or the client has gone.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(limits.timeout):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestError(499, BODY, "the client has gone.")  # is counted, and read by nobody
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > limits.max_body_bytes:
                    raise _too_large(limits.max_body_bytes)
    except TimeoutError:
        reason = f"the body did not arrive within {limits.timeout:g} seconds."
        raise RequestError(408, BODY, reason, Connection="close") from None
    return bytes(body)


def _too_large(limit: int) -> RequestError:
    return RequestError(413, BODY, f"expected at most {limit:,} bytes; send fewer histories or items at once.")
