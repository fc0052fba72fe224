"""What the server refuses before any route is reached, and the headers of everything it sends. No worker is needed."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from tempo_mlx.errors import ConfigError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.server import app as app_module
from tempo_mlx.server import security
from tempo_mlx.server.app import create_app
from tempo_mlx.server.settings import ServerConfig, model_name
from tests.patience import patient

OWN = "http://127.0.0.1:8000"
BODY = {"prompt": "Hello"}


class Client:
    """Requests to an application whose worker was never started: what gets through is answered 503, loading."""

    def __init__(self, **config: Any) -> None:
        self.app = create_app([LoadConfig()], ServerConfig(**config))

    def __call__(self, method: str, path: str, base: str = OWN, **rest: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                return await client.request(method, path, **rest)

        return asyncio.run(ask())


def code(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/json"
    return response.status_code, response.json()["error"]["code"]


LET_IN = (503, "loading")


def test_without_keys_everyone_is_let_in() -> None:
    assert code(Client()("POST", "/generate", json=BODY)) == LET_IN


@pytest.mark.parametrize("path", ["/generate", "/generate/stream", "/sessions", "/v1/completions"])
def test_a_key_is_needed(path: str) -> None:
    ask = Client(api_keys=("alpha", "beta"))
    body = {"prompt": "Hello", **({"model": "smollm2-135m"} if path.startswith("/v1") else {})}
    for headers in ({}, {"Authorization": "Bearer gamma"}, {"Authorization": "Basic alpha"}, {"X-API-Key": "alph"},
                    {"Authorization": "Bearer " + "\u00fc"}, {"Authorization": "alpha"}):  # fmt: skip
        encoded = {name: value.encode("utf-8") for name, value in headers.items()}
        refused = ask("POST", path, json=body, headers=encoded)
        assert code(refused) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
    for headers in (
        {"Authorization": "Bearer alpha"},
        {"authorization": "bearer beta"},
        {"X-API-Key": "beta"},
    ):
        assert code(ask("POST", path, json=body, headers=headers)) == LET_IN


def test_what_needs_no_key() -> None:
    ask = Client(api_keys=("alpha",))
    for path in ("/", "/docs", "/openapi.json"):
        assert ask("GET", path).status_code == 200
    assert ask("GET", "/health").json()["status"] == "loading"
    for path in ("/settings", "/metrics", "/v1/models", "/sessions"):
        assert code(ask("GET", path)) == (401, "invalid_api_key")


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha\n\nbeta\n")
    ask = Client(api_key_file=str(file))
    assert code(ask("POST", "/generate", json=BODY)) == (401, "invalid_api_key")
    assert code(ask("POST", "/generate", json=BODY, headers={"X-API-Key": "beta"})) == LET_IN
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        ServerConfig(api_key_file=str(file))


def test_blanks_around_a_key_are_no_part_of_it() -> None:
    """No header could carry them."""
    ask = Client(api_keys=(" alpha ",))
    for headers in ({"Authorization": "Bearer alpha"}, {"X-API-Key": "alpha"}):
        assert code(ask("POST", "/generate", json=BODY, headers=headers)) == LET_IN


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    Client(api_keys=("alpha", "beta", "gamma"))("GET", "/settings", headers={"X-API-Key": "alpha"})
    assert len(compared) == 3, "all keys, also after one that matched"
    assert {len(a) for pair in compared for a in pair} == {32}, "digests: nothing depends on a key's length"


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("localhost:8000", True), ("127.0.0.1", True), ("[::1]:8000", True), ("192.168.1.20:8000", True),
        ("LOCALHOST", True), ("tempo.example", True), ("evil.example", False), ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False), ("", False), ("tempo.example.", True), ("tempo.example@evil.example", False),
        ("[::1]evil.example", False), ("localhost:8000:evil.example", False), ("[::1", False),
        ("localhost:port", False),
    ],
)  # fmt: skip
def test_host_names(host: str, accepted: bool) -> None:
    response = Client(allowed_hosts=("tempo.example",))("GET", "/settings", headers={"Host": host})
    assert (response.status_code == 200) == accepted
    if not accepted:
        assert code(response) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    ("origin", "accepted"),
    [
        (OWN, True), ("http://localhost:5173", True), ("http://127.0.0.1:5173", True), ("https://app.example", True),
        ("http://localhost:3000", False), ("http://app.example", False), ("https://app.example.evil.example", False),
        ("null", False), ("http://evil.example:5173", False), ("http://[", False), ("ftp://localhost:5173", False),
    ],
)  # fmt: skip
def test_web_origins(origin: str, accepted: bool) -> None:
    ask = Client(cors_origins=("https://app.example",))
    response = ask("POST", "/generate", json=BODY, headers={"Origin": origin})
    assert code(response) == (LET_IN if accepted else (403, "origin_not_allowed"))
    allowed = response.headers.get("access-control-allow-origin")
    assert allowed == ("https://app.example" if origin == "https://app.example" else None)


def test_every_origin_is_looked_at() -> None:
    both = [("Origin", OWN), ("Origin", "https://evil.example")]
    assert code(Client()("POST", "/generate", json=BODY, headers=both)) == (403, "origin_not_allowed")


def test_cors_is_off_unless_configured() -> None:
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "content-type,authorization"}  # fmt: skip
    assert code(Client()("OPTIONS", "/generate", headers=preflight)) == (403, "origin_not_allowed")
    ask = Client(cors_origins=("https://app.example",), api_keys=("alpha",))
    granted = ask("OPTIONS", "/generate", headers=preflight)
    assert granted.status_code == 200
    assert granted.headers["access-control-allow-origin"] == "https://app.example"
    for client in ("x-stainless-lang", "anthropic-version,x-api-key"):  # what their own clients send
        asked = {**preflight, "Access-Control-Request-Headers": client}
        assert ask("OPTIONS", "/v1/messages", headers=asked).status_code == 200
    refused = ask("POST", "/generate", json=BODY, headers={"Origin": "https://app.example"})
    assert code(refused) == (401, "invalid_api_key")
    assert refused.headers["access-control-allow-origin"] == "https://app.example", "the page can read why"


def test_rates_are_limited_by_key_or_address() -> None:
    ask = Client(rate_limit="3/minute", api_keys=("alpha", "beta"))
    for _ in range(3):
        assert code(ask("POST", "/generate", json=BODY, headers={"X-API-Key": "alpha"})) == LET_IN
    refused = ask("POST", "/generate", json=BODY, headers={"X-API-Key": "alpha"})
    assert code(refused) == (429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert code(ask("POST", "/generate", json=BODY, headers={"X-API-Key": "beta"})) == LET_IN
    for _ in range(5):
        assert ask("GET", "/health").status_code == 503
    by_address = Client(rate_limit="1/hour")
    for _ in range(3):  # the page and its files do not count
        assert by_address("GET", "/").status_code == by_address("GET", "/docs").status_code == 200
    assert code(by_address("POST", "/generate", json=BODY)) == LET_IN
    assert code(by_address("POST", "/generate", json=BODY)) == (429, "rate_limited")


def test_guesses_at_keys_are_limited_too() -> None:
    ask = Client(rate_limit="3/minute", api_keys=("alpha",))
    codes = [code(ask("GET", "/settings", headers={"X-API-Key": str(guess)})) for guess in range(5)]
    assert codes == [(401, "invalid_api_key")] * 3 + [(429, "rate_limited")] * 2


def test_safe_headers_on_everything() -> None:
    ask = Client(api_keys=("alpha",))
    for method, path in (
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/nothing/here"),
        ("POST", "/generate"),
        ("PUT", "/"),
    ):
        headers = ask(method, path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-request-id"].startswith("req-")
        assert "strict-transport-security" not in headers
        assert "server" not in headers
    assert "strict-transport-security" in ask("GET", "/", base="https://127.0.0.1").headers


def test_request_ids_are_taken_only_where_they_are_harmless() -> None:
    ask = Client()
    assert (
        ask("GET", "/settings", headers={"X-Request-ID": "my-own-id_1"}).headers["x-request-id"]
        == "my-own-id_1"
    )
    for id in ("short", "x" * 65, "with space in it", 'quote"quote"'):
        assert (
            ask("GET", "/settings", headers={"X-Request-ID": id}).headers["x-request-id"].startswith("req-")
        )


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", (400, "bad_request")),
        (b'{"prompt": "\xff"}', (400, "bad_request")),
        (b"[" * 100_000, (400, "bad_request")),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", (400, "bad_request")),
        (b"", (422, "invalid_value")),
        (b"null", (422, "invalid_value")),
        (b"[]", (422, "invalid_value")),
        (b'{"prompt": "\\ud800"}', (422, "invalid_value")),
        (b'{"prompt": "a", "\\udfff": 1}', (422, "invalid_value")),
        (b'{"prompt": "a", "threshold": NaN}', (422, "invalid_value")),
        (b'{"prompt": "a", "threshold": -Infinity}', (422, "invalid_value")),
        (b'{"prompt": "a", "threshold": 1e999}', (422, "invalid_value")),
        (b'{"prompt": "a", "threshold": ' + b"9" * 400 + b"}", (422, "invalid_value")),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 40 + b"}", (422, "invalid_value")),
        (b'{"prompt": "a", "max_tokens": -1}', (422, "invalid_value")),
        (b'{"prompt": "a", "max_tokens": 1.5}', (422, "invalid_value")),
        (b'{"prompt": "a", "max_tokens": true}', (422, "invalid_value")),
        (b'{"prompt": "a", "seed": 9223372036854775808}', (422, "invalid_value")),
        (b'{"prompt": 7}', (422, "invalid_value")),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', (422, "invalid_value")),
        (b'{"prompt": "a", "stop": {}}', (422, "invalid_value")),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', (413, "body_too_large")),
    ],
)  # fmt: skip
def test_hostile_bodies(content: bytes, expected: tuple[int, str]) -> None:
    ask = Client()
    for path in ("/generate", "/generate/stream", "/sessions"):
        response = ask("POST", path, content=content, headers=JSON)
        assert code(response) == expected
        assert len(response.content) < 1000, "what was sent is not sent back"


def test_openai_routes_answer_400_for_wrong_values() -> None:
    ask = Client()
    for body in ({}, {"model": "smollm2-135m", "prompt": "a", "temperature": "hot"}):
        response = ask("POST", "/v1/completions", json=body)
        assert code(response) == (400, "invalid_value")
        assert set(response.json()["error"]) == {"message", "type", "param", "code", "request_id"}


def test_the_size_counts_as_it_arrives() -> None:
    """A body without a declared length is cut off where it passes the limit."""
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while True:
            sent += 100_000
            yield b"a" * 100_000

    assert code(Client(max_body_mb=1)("POST", "/generate", content=endless(), headers=JSON)) == (
        413,
        "body_too_large",
    )
    assert sent <= 1_200_000


def test_only_json_is_read() -> None:
    ask = Client()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = ask("POST", "/generate", content=b'{"prompt": "a"}', headers={"Content-Type": kind})
        assert code(response) == (415, "unsupported_media_type")
    with_charset = {"Content-Type": "application/json; charset=utf-8"}
    assert code(ask("POST", "/generate", content=b'{"prompt": "a"}', headers=with_charset)) == LET_IN


def test_a_body_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "BODY_SECONDS", 0.2)

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(300)

    begun = time.monotonic()
    assert code(Client()("POST", "/generate", content=slow(), headers=JSON)) == (408, "body_timeout")
    assert time.monotonic() - begun < patient(5)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/nothing", (404, "not_found")),
        ("GET", "/generate", (405, "method_not_allowed")),
        ("PUT", "/generate", (405, "method_not_allowed")),
        ("DELETE", "/settings", (405, "method_not_allowed")),
        ("POST", "/", (405, "method_not_allowed")),
        ("DELETE", "/requests/none-such", (404, "request_not_found")),
        ("GET", "/v1/models/another", (404, "model_not_found")),
    ],
)  # fmt: skip
def test_unknown_routes_and_methods(method: str, path: str, expected: tuple[int, str]) -> None:
    assert code(Client()(method, path)) == expected


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built page, with a secret beside it."""
    (tmp_path / "dist" / "assets").mkdir(parents=True)
    (tmp_path / "dist" / "index.html").write_text("<!doctype html>page")
    (tmp_path / "dist" / "assets" / "app.js").write_text("run()")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "dist" / "assets" / "link.txt").symlink_to(tmp_path / "secret.txt")
    monkeypatch.setattr(app_module, "PAGE", tmp_path / "dist")
    return tmp_path


def test_the_page_is_served(page: Path) -> None:
    ask = Client(api_keys=("alpha",))
    assert ask("GET", "/").text == "<!doctype html>page"
    assert ask("GET", "/assets/app.js").text == "run()"
    assert "javascript" in ask("GET", "/assets/app.js").headers["content-type"]


@pytest.mark.parametrize(
    "path",
    [
        "/assets/../../secret.txt", "/assets/%2e%2e/%2e%2e/secret.txt", "/assets/..%2f..%2fsecret.txt",
        "/../secret.txt",
        "/assets/..%5c..%5csecret.txt", "/assets//../../secret.txt", "/assets/%252e%252e/%252e%252e/secret.txt",
        "/assets/link.txt", "/assets/%00", "/secret.txt", "//secret.txt", "/assets/" + "a" * 5000,
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_page(page: Path, path: str) -> None:
    """Sent as it stands: httpx would tidy the path up."""
    client = Client()
    answers: list[Any] = []

    async def ask() -> None:
        raw, _, _ = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
            "path": httpx.URL("http://x" + raw).path if "%" in raw else raw, "raw_path": raw.encode(),
            "query_string": b"", "root_path": "", "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            answers.append(message)

        await client.app(scope, receive, send)

    asyncio.run(ask())
    assert answers[0]["status"] == 404
    assert json.loads(b"".join(m.get("body", b"") for m in answers))["error"]["code"] == "not_found"


def test_the_models_path_is_not_told(tmp_path: Path) -> None:
    path = tmp_path / "private" / "model.gguf"
    assert model_name(LoadConfig(model=str(path)), ServerConfig()) == "model.gguf"
    assert model_name(LoadConfig(model=str(tmp_path)), ServerConfig()) == tmp_path.name
    assert model_name(LoadConfig(model="org/model"), ServerConfig()) == "org/model"
    assert model_name(LoadConfig(model=str(path)), ServerConfig(model_alias="mine")) == "mine"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"port": -1}, "port"), ({"port": 70_000}, "port"), ({"concurrency": 0}, "concurrency"),
        ({"rate_limit": "often"}, "rate_limit"), ({"cors_origins": ("*",)}, "cors_origins"),
        ({"cors_origins": ("https://a.example/path",)}, "cors_origins"), ({"allowed_hosts": ("*",)}, "allowed_hosts"),
        ({"allowed_hosts": ("http://a",)}, "allowed_hosts"), ({"api_keys": ("",)}, "api_keys"),
        ({"api_keys": ("\u00fc",)}, "api_keys"), ({"log_level": "loud"}, "log_level"),
        ({"max_body_mb": 0}, "max_body_mb"),
    ],
)  # fmt: skip
def test_settings_are_validated_at_start(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServerConfig(**settings)


def test_it_listens_on_this_machine_only_unless_told() -> None:
    from tempo_mlx.server.serve import bind

    with bind(ServerConfig().host, 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        assert listening.family == socket.AF_INET


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("::", "http://localhost:80"),
        ("fe80::1", "http://[fe80::1]:80"),
        ("10.0.0.1", "http://10.0.0.1:80"),
    ],
)
def test_the_address_that_is_told_can_be_opened(address: str, url: str) -> None:
    from tempo_mlx.server.serve import url_of

    assert url_of(address, 80) == url


def test_logs_name_requests_and_hide_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from tempo_mlx.server.logs import Formatter

    record = logging.makeLogRecord(
        {"msg": "one\nline", "levelname": "INFO", "name": "x", "path": "/a\nb", "status": 200}
    )
    text = Formatter("text").format(record)
    assert "\n" not in text and 'path="/a\\nb"' in text and "status=200" in text
    assert json.loads(Formatter("json").format(record))["path"] == "/a\nb"
