"""The application: engine, guard, routes, errors, page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from tempo_mlx._version import __version__
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.server import anthropic, docs_page, ollama, openai, responses, routes, session_routes
from tempo_mlx.server.context import Context
from tempo_mlx.server.errors import ApiError, nested_too_deeply
from tempo_mlx.server.metrics import Metrics
from tempo_mlx.server.models import Models
from tempo_mlx.server.security import Guard
from tempo_mlx.server.settings import Pace, ServerConfig
from tempo_mlx.server.streaming import Gone

PAGE = Path(__file__).parent / "web" / "dist"
SENTENCES = {
    400: "The body is not valid JSON.",
    404: "There is nothing at this address.",
    405: "This address does not take that method.",
}
CODES = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}


def create_app(
    loads: Sequence[LoadConfig],
    config: ServerConfig,
    ambient: Mapping[str, Any] | None = None,
    pace: Pace | None = None,
) -> FastAPI:
    """The server as an ASGI application; its workers live no longer than its lifespan. Raises ConfigError."""
    metrics = Metrics()
    context = Context(config, ambient or {}, metrics, Models(loads, config, metrics, pace or Pace()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await context.models.start()
        yield
        await context.models.stop()

    app = FastAPI(
        title="tempo-mlx",
        version=__version__,
        description="Text generation that keeps every probable token at each step, and processes them together.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.context = context
    for router in (
        routes.router,
        session_routes.router,
        session_routes.reading,
        openai.router,
        responses.router,
        anthropic.router,
        ollama.router,
    ):
        app.include_router(router)
    _add_pages(app)
    _add_errors(app)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # clients send many of their own; what a page may read is said by its origin
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_middleware(Guard, config=config, metrics=metrics)
    return app


def _add_pages(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(
            docs_page.page(app.openapi()), headers={"Content-Security-Policy": docs_page.POLICY}
        )

    @app.get("/docs.css", include_in_schema=False)
    async def style() -> Response:
        return Response(docs_page.STYLE, media_type="text/css")

    def serve_file(path: str, file: Path) -> None:
        @app.get(path, include_in_schema=False)
        async def page_file() -> FileResponse:
            return FileResponse(file)

    if (PAGE / "index.html").is_file():
        serve_file("/", PAGE / "index.html")
        for entry in PAGE.iterdir():  # fixed at startup: no request can reach any other file
            if entry.is_dir():
                app.mount(f"/{entry.name}", StaticFiles(directory=entry))
            else:
                serve_file(f"/{entry.name}", entry)
        return

    @app.get("/", include_in_schema=False)
    async def no_page() -> HTMLResponse:
        return HTMLResponse(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>tempo-mlx</title><p>The server runs. '
            'The web page has not been built: <code>make web</code>. See <a href="/docs">/docs</a>.'
        )


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, error: ApiError) -> Response:
        id = request.scope.get("state", {}).get("request_id")
        return Response(
            error.encoded(id, request.url.path), error.status, error.headers, media_type="application/json"
        )

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        if error.status == 422 and request.url.path.startswith("/v1/"):
            error.status = 400  # as OpenAI does
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, explain(error, 400 if request.url.path.startswith("/v1/") else 422))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = CODES.get(error.status_code, "bad_request")
        sentence = SENTENCES.get(error.status_code, str(error.detail))
        return answer(request, ApiError(error.status_code, code, sentence, headers=dict(error.headers or {})))

    @app.exception_handler(RecursionError)
    async def nested(request: Request, error: RecursionError) -> Response:
        return answer(request, nested_too_deeply())

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)  # the client has disconnected

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(
            request, ApiError(500, "internal_error", "The server failed on this request; see its log.")
        )


def explain(error: RequestValidationError, status: int) -> ApiError:
    """The first problem, by field name; the value is not repeated, as it may be private or unprintable."""
    first = min(error.errors(), key=lambda e: len(e["loc"]) if e["type"] == "extra_forbidden" else 0)
    if first["type"] == "json_invalid":
        return ApiError(400, "bad_request", SENTENCES[400])
    places = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
    param = ".".join(p for p in places if p.isidentifier())[:200] or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "is not a field of this request"
    elif first["type"] == "missing":
        message = "is missing"
    sentence = f"{param or 'The body'}: {message}."
    return ApiError(status, "invalid_value", sentence.encode("ascii", "replace").decode("ascii"), param)
