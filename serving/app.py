"""Which address does what."""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from serving.batching import Batcher, ClosedError, QueueFullError
from serving.gate import Gate
from serving.metrics import Metrics
from serving.requests import BODY, ItemsBody, Limits, RecommendBody, RequestError, field_name
from serving.service import Content, RecommendService

PAGE = Path(__file__).parent / "page.html"


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        limits: of a request.
        max_batch: histories per batch.
        max_wait: seconds that a request waits for others to share a batch with.
        max_queue: histories that may wait; more are told to come back.
        token: that requests must carry; None lets everybody in.
        loopback_only: the server listens on a loopback address.
    """

    limits: Limits = field(default_factory=Limits)
    max_batch: int = 64
    max_wait: float = 0.002
    max_queue: int = 256
    token: str | None = None
    loopback_only: bool = True


class Handlers:
    """One method per address.

    Args:
        service: what answers.
        settings: how.
    """

    def __init__(self, service: RecommendService, settings: Settings) -> None:
        self._service = service
        self._limits = settings.limits
        self.metrics = Metrics(lambda: self.batcher.waiting, lambda: service.num_items)
        self.batcher: Batcher[RecommendBody, Content] = Batcher(
            service.answer,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait,
            max_queue=settings.max_queue,
            observe=self.metrics.count_batch,
        )
        self._page, self._page_headers = _page()

    async def recommend(self, body: RecommendBody) -> JSONResponse:
        """Ranked items for one or several histories."""
        body.check(self._limits)
        future = self.batcher.submit(body, len(body.rows()))
        return JSONResponse(await self._in_time(future))

    async def change_items(self, body: ItemsBody) -> JSONResponse:
        """Add or remove items; answered when it is done, however long that takes."""
        body.check(self._limits)
        change = await asyncio.to_thread(self._service.change, body)
        return JSONResponse(await asyncio.wrap_future(self.batcher.call(change)))

    def search_items(
        self, query: str = Query("", max_length=200), limit: int = Query(20, ge=1, le=100)
    ) -> JSONResponse:
        """Items by key and title."""
        return JSONResponse(self._service.search(query, limit))

    async def health(self) -> JSONResponse:
        """Whether the server answers; 503 once it is stopping."""
        alive = self.batcher.alive
        content = {
            "status": "ok" if alive else "stopping",
            "mode": self._service.mode,
            "num_items": self._service.num_items,
            "catalogue_version": self._service.catalogue_version,
        }
        return JSONResponse(content, 200 if alive else 503)

    async def show_metrics(self) -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def show_page(self) -> HTMLResponse:
        """For people."""
        return HTMLResponse(self._page, headers=self._page_headers)

    async def _in_time(self, future: "Future[Content]") -> Content:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._limits.timeout)
        except TimeoutError:
            message = f"no answer within {self._limits.timeout:g} seconds: the server is busy."
            raise RequestError(504, None, message) from None


def create_app(service: RecommendService, settings: Settings | None = None) -> FastAPI:
    """The web application; its model's thread runs from now on until the application is shut down."""
    settings = settings or Settings()
    handlers = Handlers(service, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(handlers.batcher.close)

    # The interactive documentation would load scripts from elsewhere; /openapi.json remains.
    app = FastAPI(title="Recommender", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_api_route("/recommend", handlers.recommend, methods=["POST"])
    app.add_api_route("/items", handlers.change_items, methods=["POST"])
    app.add_api_route("/items", handlers.search_items, methods=["GET"])
    app.add_api_route("/healthz", handlers.health, methods=["GET"])
    app.add_api_route("/metrics", handlers.show_metrics, methods=["GET"])
    app.add_api_route("/", handlers.show_page, methods=["GET"], include_in_schema=False)
    for kind, to_error in _ERRORS.items():
        app.add_exception_handler(kind, _responder(to_error))
    app.add_middleware(
        Gate,
        limits=settings.limits,
        token=settings.token,
        loopback_only=settings.loopback_only,
        count=handlers.metrics.count_request,
    )
    return app


def _responder(to_error: Callable[[Any], RequestError]) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    async def respond(_: Request, exception: Exception) -> JSONResponse:
        error = to_error(exception)
        return JSONResponse(error.content(), error.status, error.headers)

    return respond


def _invalid(exception: RequestValidationError) -> RequestError:
    """The first thing that is wrong with a body or a query."""
    first = exception.errors()[0]
    if first["type"] == "json_invalid":
        return RequestError(400, BODY, f"not JSON: {first['ctx']['error']}.")
    return RequestError(422, field_name(first["loc"][1:]), first["msg"])


def _refused(exception: HTTPException) -> RequestError:
    unreadable = exception.status_code == 400  # deeper nested or longer numbers than Python reads
    field = BODY if unreadable else None
    return RequestError(exception.status_code, field, str(exception.detail), **(exception.headers or {}))


_ERRORS: dict[type[Exception], Callable[[Any], RequestError]] = {
    RequestError: lambda error: error,
    RequestValidationError: _invalid,
    HTTPException: _refused,
    QueueFullError: lambda _: RequestError(429, None, "the queue is full; try again soon.", **{"Retry-After": "1"}),
    ClosedError: lambda _: RequestError(503, None, "the server is stopping."),
    Exception: lambda _: RequestError(500, None, "a fault in the server; its log says more."),
}


def _page() -> tuple[str, dict[str, str]]:
    """The page, and headers that let the browser load and run nothing but what the page itself holds."""
    html = PAGE.read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        f"style-src {_hash_of('style', html)}",
        f"script-src {_hash_of('script', html)}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return html, {"Content-Security-Policy": "; ".join(policy), "X-Content-Type-Options": "nosniff"}


def _hash_of(tag: str, html: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
