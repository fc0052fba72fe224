"""JSON by schema: whether every finished answer is valid, and what a step under a grammar costs.

    python -m benchmarks.schemas [--model MODEL ...] [--schemas 60] [--tokens 192] [--rounds 5]

60 schemas of growing difficulty (benchmarks/schemas.json: plain values, arrays, nesting, patterns, unions, $ref), each
answered by the plain decoder and by five branches; jsonschema, which shares no code with what made the text, is the
judge. The cost is that of a step of one row: the same tokens decoded with and without a grammar, in turns within one
process, CPU time, ratios within a round. Prints a table, then one JSON line. Needs the extra `schema`, and jsonschema.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jsonschema
import numpy as np

from benchmarks.studies import versions
from tempo_mlx import generate, load, stream
from tempo_mlx.loading import LoadedModel

SCHEMAS = Path(__file__).with_name("schemas.json")
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"decoder": "plain", "temperature": 0.0},
    "branches": {"branches": 5, "threshold": 0.02, "merge_length": 0},
}
FREE = (
    '{"type": "string", "minLength": 4000}'  # a grammar under which a text goes on for as long as is measured
)


def cases() -> list[dict[str, Any]]:
    """`ask` and `schema` of each."""
    found: list[dict[str, Any]] = json.loads(SCHEMAS.read_text("utf-8"))
    return found


def answers(
    loaded: LoadedModel, case: dict[str, Any], tokens: int, arm: dict[str, Any]
) -> Iterator[str | None]:
    """Every text that the decoder gives; None for one that was not finished."""
    messages = [{"role": "user", "content": f"{case['ask']} Answer in JSON."}]
    run = generate(loaded, messages, json_schema=case["schema"], max_tokens=tokens, **arm)
    if run.is_lattice:
        yield run.final_text if run.finish_reason == "stop" else None
        return
    for path in run.paths:
        yield path.text if path.token_ids[-1] in loaded.tokenizer.eos_ids else None


def is_valid(text: str, schema: Any) -> bool:
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def validity(loaded: LoadedModel, count: int, tokens: int) -> dict[str, dict[str, int]]:
    """By arm: texts in all, finished ones, valid ones."""
    found = {name: {"texts": 0, "finished": 0, "valid": 0} for name in ARMS}
    for number, case in enumerate(cases()[:count], 1):
        print(f"{number}: {case['ask']}", file=sys.stderr)
        for name, arm in ARMS.items():
            texts = list(answers(loaded, case, tokens, arm))
            whole = [text for text in texts if text is not None]
            valid = [is_valid(text, case["schema"]) for text in whole]
            for text, fine in zip(whole, valid, strict=True):
                if not fine:
                    print(f"NOT valid ({name}): {case['ask']} {text!r}")
            for key, value in (("texts", len(texts)), ("finished", len(whole)), ("valid", sum(valid))):
                found[name][key] += value
    return found


def seconds_a_step(loaded: LoadedModel, prompt: str, tokens: int, **settings: Any) -> float:
    """Of a plain run, in CPU time, which other processes take nothing of; what runs beside the model counts in full."""
    decoding = stream(loaded, prompt, decoder="plain", temperature=0.0, max_tokens=tokens, **settings)
    next(decoding)
    begun = time.process_time()
    steps = sum(1 for _ in decoding)
    return (time.process_time() - begun) / steps


def cost(loaded: LoadedModel, tokens: int, rounds: int) -> dict[str, Any]:
    """What the grammar adds to a step: ratio - 1, of each round."""
    prompt = "A letter to a friend, as a JSON string: "
    for settings in ({}, {"json_schema": FREE}):
        seconds_a_step(loaded, prompt, 16, **settings)
    plain, constrained = [], []
    for _ in range(rounds):
        plain.append(seconds_a_step(loaded, prompt, tokens))
        constrained.append(seconds_a_step(loaded, prompt, tokens, json_schema=FREE))
    added = np.array(constrained) / np.array(plain) - 1.0
    return {
        "plain_ms": 1e3 * float(np.median(plain)),
        "constrained_ms": 1e3 * float(np.median(constrained)),
        "added": float(np.median(added)),
        "added_from_to": [float(added.min()), float(added.max())],
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--schemas", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    results = {}
    for name in arguments.model:
        loaded = load(name)
        found = validity(loaded, arguments.schemas, arguments.tokens)
        measured = cost(loaded, 64, arguments.rounds) if arguments.rounds else {}
        results[Path(name).name] = {**found, "cost": measured, **versions(loaded.model.info)}
        for arm, numbers in found.items():
            print(f"{Path(name).name:40} {arm:9} {numbers['texts']:4} texts, {numbers['finished']:4} finished, "
                  f"{numbers['valid']:4} of them valid")  # fmt: skip
        if measured:
            print(f"{'':40} a step   {measured['plain_ms']:.1f} ms of CPU, {measured['constrained_ms']:.1f} under a "
                  f"grammar: {measured['added']:+.1%} (load {measured['load']:.1f})")  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
