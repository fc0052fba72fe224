"""The full counts behind what we claim about exactness, on the real default model. `make acceptance` runs it.

    python -m benchmarks.acceptance [--prompts 20] [--only NAME ...]

Each check prints one line and becomes a row of docs/acceptance.md. What --only leaves out keeps the rows, and the
date, of its last run. A check compares with something that shares no code with what it checks: transformers, mlx-lm's
model, or one dense pass per run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from benchmarks.studies import prompts, versions
from tempo_mlx import generate, load, stream
from tempo_mlx.bench.exits import same_beginning
from tempo_mlx.exits.ahead import Payoff
from tempo_mlx.exits.samples import PROMPTS
from tempo_mlx.report.run import Run
from tempo_mlx.report.verify import verify
from tempo_mlx.weights.checkpoint import open_checkpoint

MODEL = "smollm2-135m"
REPORT = Path(__file__).resolve().parent.parent / "docs" / "acceptance.md"
KEPT = Path(__file__).resolve().parent / "results" / "acceptance.json"
PICTURE = REPORT.parent / "images" / "acceptance.svg"
NEAR_TIE = 1e-3  # of a logit: two tokens this close may swap


@dataclass(frozen=True)
class Row:
    """One line of the report. `worst` is what was measured, to be at most `bound`."""

    check: str
    counted: str
    worst: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.worst <= self.bound


class Bench:
    """The models, loaded once."""

    def __init__(self, count: int) -> None:
        self.prompts = prompts(count)

    @cached_property
    def mlx(self) -> Any:
        return load(MODEL)

    @cached_property
    def torch(self) -> Any:
        return load(MODEL, backend="torch", device="cpu")

    @cached_property
    def transformers(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        path = open_checkpoint(MODEL).path
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval()

    @cached_property
    def mlx_lm(self) -> Any:
        """mlx-lm's own Llama with the same weights."""
        from mlx.utils import tree_flatten
        from mlx_lm.models.llama import Model, ModelArgs

        from tempo_mlx.mlx import mx

        config = self.transformers.config
        rope = config.rope_parameters["rope_theta"]
        model = Model(ModelArgs.from_dict({**config.to_dict(), "rope_theta": rope}))
        weights = self.transformers.state_dict()
        model.load_weights(
            [(name, mx.array(weights[name].numpy())) for name, _ in tree_flatten(model.parameters())]
        )
        return model

    def logits(self, ids: list[int]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.transformers(torch.tensor([ids])).logits[0].numpy()


def parity(bench: Bench) -> Iterator[Row]:
    """Logits, probabilities and attention mass of whole prompts."""
    import torch

    worst: dict[tuple[str, str], float] = {}

    def note(pair: str, quantity: str, size: float) -> None:
        worst[pair, quantity] = max(worst.get((pair, quantity), 0.0), size)

    def probabilities(logits: np.ndarray) -> np.ndarray:
        return torch.softmax(torch.from_numpy(logits).double(), dim=-1).numpy()

    for prompt in bench.prompts:
        ids = bench.mlx.tokenizer.encode(prompt)
        outs = {
            name: m.model.forward(ids, range(len(ids)), None, m.model.new_cache(), attention=True)
            for name, m in (("MLX", bench.mlx), ("torch", bench.torch))
        }
        wanted = bench.logits(ids)
        for pair, one, other in (
            ("torch, transformers", outs["torch"].logits, wanted),
            ("MLX, torch", outs["MLX"].logits, outs["torch"].logits),
        ):
            note(pair, "logits", abs(one - other).max())
            note(pair, "probabilities", abs(probabilities(one) - probabilities(other)).max())
        note(
            "MLX, torch",
            "attention mass",
            abs(outs["MLX"].attention_mass - outs["torch"].attention_mass).max(),
        )
    bounds = {"logits": 5e-4, "probabilities": 1e-4, "attention mass": 1e-5}
    for (pair, quantity), size in worst.items():
        yield Row(
            f"parity: {quantity} ({pair})", f"{len(bench.prompts)} prompts", float(size), bounds[quantity]
        )


def greedy(bench: Bench, tokens: int = 64) -> Iterator[Row]:
    """Greedy text equal to transformers' and mlx-lm's: after every prefix of it, theirs is the same argmax.

    A step at which their two best logits nearly tie ends the comparison of that prompt, and is reported.
    """
    from tempo_mlx.mlx import mx

    def by_mlx_lm(ids: list[int]) -> np.ndarray:
        return np.array(bench.mlx_lm(mx.array([ids])))[0]

    runs = [
        generate(bench.mlx, prompt, decoder="plain", temperature=0.0, max_tokens=tokens)
        for prompt in bench.prompts
    ]
    for name, logits_of in (("transformers", bench.logits), ("mlx-lm", by_mlx_lm)):
        different, ties = 0, 0
        for run in runs:
            chosen = [step.tokens[0].id for step in run.steps]
            ids = [*run.prompt.token_ids, *chosen]
            logits = logits_of(ids)[run.prompt_length - 1 : -1]  # (tokens, V)
            wrong = np.flatnonzero(logits.argmax(axis=1) != chosen)
            if len(wrong):
                at = int(wrong[0])
                near = logits[at].max() - logits[at, chosen[at]] < NEAR_TIE
                ties, different = ties + bool(near), different + (not near)
        counted = f"{len(runs)} prompts x {tokens} tokens"
        yield Row(f"greedy text: prompts that differ from {name}", counted, different, 0, f"{ties} near-ties")


EXACTNESS: dict[str, dict[str, Any]] = {
    f"{attend}, {name}": {"attend": attend, **settings}
    for attend in ("lineage", "all", "weighted", "best")
    for name, settings in (("nothing removed", {}), ("posterior removals", {"use_retroactive_pruning": True}))
}


REMOVALS: dict[str, dict[str, Any]] = {
    f"{signal}, {mode}": {
        "use_retroactive_pruning": True,
        "pruning_signal": signal,
        "complete_removal_mode": mode,
        **threshold,
    }
    for signal, threshold in (
        ("posterior", {"posterior_threshold": 0.3}),
        ("attention", {"attention_threshold": 0.02}),
        ("probability", {"posterior_threshold": 0.3}),
        ("random", {"posterior_threshold": 0.4}),
    )
    for mode in ("keep_token", "keep_unattended", "remove_position")
}


def exactness(bench: Bench) -> Iterator[Row]:
    """Runs recomputed from their file alone: by `verify` on both backends, and by transformers."""
    for name, settings in EXACTNESS.items():
        yield from replays(bench, name, settings, bench.prompts)


def removals(bench: Bench) -> Iterator[Row]:
    """The same for every signal and every way to remove, strict enough that whole sets go, on a few prompts each."""
    for name, settings in REMOVALS.items():
        yield from replays(bench, name, settings, bench.prompts[:5])


def replays(
    bench: Bench, name: str, settings: dict[str, Any], prompts: list[str], tokens: int = 40
) -> Iterator[Row]:
    from tests.replay import differences

    worst = {"MLX": 0.0, "torch": 0.0, "transformers": 0.0}
    removed = 0
    for prompt in prompts:
        run = generate(bench.mlx, prompt, max_tokens=tokens, **settings)
        run = Run.from_json(run.to_json())
        removed += sum(t.removed_after is not None for s in run.steps for t in s.tokens)
        worst["MLX"] = max(worst["MLX"], verify(run, bench.mlx).max_difference)
        worst["torch"] = max(worst["torch"], verify(run, bench.torch).max_difference)
        dense = differences(json.loads(run.to_json()), bench.transformers)
        worst["transformers"] = max(worst["transformers"], *dense.values())
    for backend, size in worst.items():
        counted = f"{len(prompts)} runs x {tokens} steps"
        yield Row(f"replay: {name} (by {backend})", counted, size, 1e-4, f"{removed} members removed")


DRAFTING = {"exit_layers": (27,), "confidence_thresholds": (0.9,)}  # often sure, and sometimes wrong


class Eager(Payoff):
    """Always runs ahead, whether it pays or not."""

    def allows(self, source: str) -> bool:
        return True


LOSSLESS: dict[str, tuple[int, dict[str, Any]]] = {  # prompts, settings
    "greedy": (100, {"decoder": "plain", "temperature": 0.0}),
    "superposed, posterior removals": (20, {"use_retroactive_pruning": True}),
    "5 branches": (10, {"branches": 5}),
}


def lossless(bench: Bench, tokens: int = 64) -> Iterator[Row]:
    """Lossless early exit against full decoding, with what the text suggests and else what an exit drafts wherever that
    is possible; texts may end inside a draft.

    A step at which the two best logits of the full model nearly tie ends the comparison of that prompt.
    """
    for name, (count, settings) in LOSSLESS.items():
        different, ties, drafted, accepted = 0, 0, 0, 0
        texts = (prompts() + PROMPTS.read_text("utf-8").splitlines())[
            : count if len(bench.prompts) >= 20 else 3
        ]
        for text in texts:
            full = generate(bench.mlx, text, max_tokens=tokens, **settings)
            decoding = stream(
                bench.mlx, text, max_tokens=tokens, early_exit=True, lossless=True, **DRAFTING, **settings
            )
            decoding.exits.payoff = Eager()
            for _ in decoding:
                pass
            run = decoding.run()
            drafted += decoding.exits.account.drafted
            accepted += decoding.exits.account.accepted
            same = same_beginning(full, run)
            if same < len(full.steps) or len(run.steps) != len(full.steps):
                both = [[token.probability for token in r.steps[same].tokens] for r in (full, run)]
                chosen = {r.steps[same].tokens[0].id for r in (full, run)}
                near = len(chosen) > 1 and abs(math.log(both[0][0] / both[1][0])) < NEAR_TIE
                ties, different = ties + near, different + (not near)
        note = f"{ties} near-ties; {accepted} of {drafted} drafted rows were right"
        counted = f"{len(texts)} prompts x {tokens} tokens"
        yield Row(
            f"lossless early exit, {name}: runs that differ from full decoding", counted, different, 0, note
        )


CHECKS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "parity": parity,
    "greedy": greedy,
    "exactness": exactness,
    "removals": removals,
    "lossless": lossless,
}


NEWCOMERS = (
    "Are the numbers right? What the program computes was computed a second time by other means: by the torch "
    "reference, by Hugging Face transformers, by mlx-lm, or from the file of a whole run alone; this page has the "
    "largest difference that was found, and what is allowed. In the picture each dot is a check, and the red line is "
    "what is allowed; all of it is of one small model in float32 on a Linux CPU."
)
LANES = ("logits, probabilities, attention", "(by MLX)", "(by torch)", "(by transformers)")


def picture(rows: list[Row]) -> str:
    """The checks that have a difference, by what they compare, on a logarithmic scale of shares of what is allowed."""
    replays = [row for row in rows if row.check.startswith("replay")]
    lanes = [[row for row in rows if row.check.startswith("parity") and row.worst]]
    lanes += [[row for row in replays if lane in row.check] for lane in LANES[1:]]
    names = (LANES[0], *(f"a run from its file, {lane[1:-1]}" for lane in LANES[1:]))
    left, wide, high = 270, 540, 40
    style = 'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="14"'
    height = high * (len(lanes) + 1) + 20
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 60} {height}" {style}>',
             f'<rect width="{left + wide + 60}" height="{height}" fill="#fff"/>']  # fmt: skip
    for power in (-3, -2, -1, 0):
        x, ink = left + wide * (power + 3) / 3, "#b13a1e" if power == 0 else "#d0d7de"
        parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="10" y2="{height - 40}" stroke="{ink}"/>')
        share = "what is allowed" if power == 0 else f"{10**power:g} of it"
        parts.append(
            f'<text x="{x:.0f}" y="{height - 20}" text-anchor="middle" fill="#6e7781">{share}</text>'
        )
    for lane, (name, checks) in enumerate(zip(names, lanes, strict=True)):
        y = high * (lane + 0.75)
        parts.append(f'<text x="{left - 12}" y="{y + 5:.0f}" text-anchor="end" fill="#1f2328">{name}</text>')
        for row in checks:
            x = left + wide * (math.log10(row.worst / row.bound) + 3) / 3
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.0f}" r="5" fill="#0a7f8c" fill-opacity="0.5"/>')
    return "\n".join([*parts, "</svg>\n"])


def rows_of(kept: dict[str, Any]) -> list[Row]:
    return [Row(**row) for name in CHECKS if name in kept for row in kept[name]["rows"]]


def report(kept: dict[str, Any]) -> str:
    """The page. kept: by check, in the order of CHECKS."""
    checks = [(name, kept[name]) for name in CHECKS if name in kept]
    rows = rows_of(kept)
    dates = "; ".join(f"{name} on {check['date']}" for name, check in checks)
    lines = [
        "# Acceptance report",
        "",
        NEWCOMERS,
        "",
        "![How far each check is from what is allowed](images/acceptance.svg)",
        "",
        f"Written by `make acceptance`: {dates}. {sum(row.ok for row in rows)} of {len(rows)} hold.",
        "",
        "| check | over | worst | bound | holds | note |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r.check} | {r.counted} | {r.worst:.3g} | {r.bound:.3g} | {'yes' if r.ok else '**no**'} | {r.note} |"
            for r in rows
        ),
        "",
        "```json",
        *dict.fromkeys(json.dumps(check["versions"]) for _, check in checks),
        "```",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    options = parser.parse_args()
    bench, good = Bench(options.prompts), True
    for name in options.only:
        rows = []
        for row in CHECKS[name](bench):
            rows.append(row)
            good &= row.ok
            verdict = "ok  " if row.ok else "FAIL"
            print(
                f"{verdict} {row.worst:9.2e} <= {row.bound:.0e}  {row.check}  ({row.counted}) {row.note}",
                flush=True,
            )
        if options.prompts >= 20:
            kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
            kept[name] = {
                "date": str(datetime.date.today()),
                "versions": {**versions(bench.mlx.model.info), "id": MODEL, "processor": platform.machine()},
                "rows": [asdict(each) for each in rows],
            }
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
            REPORT.write_text(report(kept))
            PICTURE.write_text(picture(rows_of(kept)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
