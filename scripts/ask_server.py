"""Whether a server answers: starts one on the default model, and asks each of its ways to generate once."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.serving import named, serving, stream  # noqa: E402

BODY = {"prompt": "The capital of France is", "max_tokens": 6}
MESSAGES = [{"role": "user", "content": "What is a lattice?"}]

with serving("smollm2-135m") as served:
    run = served.post("/generate", BODY).raise_for_status().json()
    steps = named(stream(served, "/generate/stream", BODY), "step")
    chat = served.post(
        "/v1/chat/completions", {"model": "smollm2-135m", "messages": MESSAGES, "max_tokens": 6}
    )
    assert len(run["steps"]) == len(steps) == 6, (len(run["steps"]), len(steps))
    assert chat.raise_for_status().json()["choices"][0]["message"]["content"]
    assert served.metric("tempo_requests_total") == 3
    served.get("/openapi.json").raise_for_status()
print("The server answers.")
