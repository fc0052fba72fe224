"""GET /docs: the OpenAPI document as one static page without scripts, for offline use and a strict CSP."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

STYLE = """
:root{color-scheme:light dark}
body{--line:color-mix(in srgb,currentColor 18%,transparent);--soft:color-mix(in srgb,currentColor 70%,transparent)}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
code,pre{font:13px/1.45 ui-monospace,monospace}
h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}
details{border:1px solid var(--line);border-radius:6px;margin:.5rem 0;padding:.4rem .8rem}
summary{cursor:pointer}summary b{display:inline-block;min-width:4.2rem}
table{border-collapse:collapse;width:100%;margin:.5rem 0}
td,th{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;border-bottom:1px solid var(--line)}
.soft{color:var(--soft)}pre{overflow-x:auto;padding:.6rem;border:1px solid var(--line);border-radius:6px}
"""
POLICY = "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def page(openapi: Mapping[str, Any]) -> str:
    """The whole page."""
    title = html.escape(openapi["info"]["title"])
    groups: dict[str, list[str]] = {}
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            tag = (operation.get("tags") or ["server"])[0]
            groups.setdefault(tag, []).append(_operation(openapi, path, method, operation))
    sections = "".join(f"<h2>{html.escape(tag)}</h2>{''.join(items)}" for tag, items in groups.items())
    about = html.escape(openapi["info"].get("description", ""))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/docs.css">'
        f'<h1>{title}</h1><p>{about}</p><p>Machine-readable: <a href="/openapi.json">openapi.json</a>. '
        f'Errors have one shape: <code>{{"error": {{"message", "type", "param", "code", "request_id"}}}}</code>; '
        f'under /api, as Ollama\'s clients read it, <code>{{"error": "message"}}</code> with the rest beside it.</p>'
        f"{sections}</html>"
    )


def _operation(openapi: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    parts = [f"<p>{html.escape(operation.get('description') or operation.get('summary', ''))}</p>"]
    if operation.get("parameters"):
        rows = ((p["name"], p.get("schema", {}), p.get("required", False)) for p in operation["parameters"])
        parts.append(_table(openapi, rows))
    if body is not None:
        schema = _follow(openapi, body)
        required = schema.get("required", [])
        fields = ((name, field, name in required) for name, field in schema.get("properties", {}).items())
        parts.append(_table(openapi, fields))
    answers = ", ".join(f"<code>{status}</code>" for status in operation.get("responses", {}))
    parts.append(f'<p class="soft">Answers: {answers}</p>')
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{html.escape(path)}</code> "
        f'<span class="soft">{html.escape(operation.get("summary", ""))}</span></summary>{"".join(parts)}</details>'
    )


def _table(openapi: Mapping[str, Any], rows: Iterator[tuple[str, Any, bool]]) -> str:
    lines = []
    for name, field, required in rows:
        if required:
            default = "required"
        else:
            default = html.escape(json.dumps(field.get("default"))) if "default" in field else ""
        lines.append(
            f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(kind(openapi, field))}</td>"
            f"<td><code>{default}</code></td><td>{html.escape(field.get('description', ''))}</td></tr>"
        )
    head = "<tr><th>Field</th><th>Values</th><th>Default</th><th>Meaning</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def _follow(openapi: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" in schema:
        found: Mapping[str, Any] = openapi["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        return found
    return schema


def kind(openapi: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    """The values a field takes, in words."""
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[1]
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(kind(openapi, option) for option in field["anyOf"]))
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        return f"list of {kind(openapi, field.get('items', {}))}"
    bounds = [("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")]
    limits = " ".join(f"{sign} {field[name]:.15g}" for name, sign in bounds if name in field)
    return f"{field.get('type', 'any')} {limits}".strip()
