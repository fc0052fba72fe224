"""What early exit gains and what it costs: full decoding beside lossy exits at three targets, and lossless.

    python -m benchmarks.early_exit [--prompts 24] [--timed 12] [--tokens 64] [--rounds 1]
    python -m benchmarks.early_exit --page docs/early-exit-figures.md     # the page again, from the results kept

The prompts are those of benchmarks/quality, six kinds, none of them the calibration's. First, on all of them: how often
choices made early agree, and whether they do as often as promised when prompts are drawn again. Then `--prompts` of
them are decoded with every arm, for what does not depend on the machine: audited agreement, the beginning shared with
full decoding, perplexity under the whole model, repetition, layers for a step. Then the first `--timed` prompts again,
the arms in turn, for speed; let nothing else run meanwhile. Greedy decoding of exactly `--tokens` tokens. Prints a
table; what every prompt gave is kept in benchmarks/results/early-exit/, with a plot of speed against agreement: what is
there is not computed again, but timed again. How long it takes stands on the page. Energy is read from RAPL where that
may be read.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from benchmarks.quality.prompts import read_prompts
from benchmarks.studies import bootstrap, read_records, runtime, studied, versions
from tempo_mlx import load
from tempo_mlx.api import generate
from tempo_mlx.bench.exits import FULL, ids_of, perplexity, repetition, same_beginning, settings_of_arm
from tempo_mlx.bench.machine import load_average
from tempo_mlx.bench.results import markdown_table, text_table
from tempo_mlx.config import GenerateConfig
from tempo_mlx.exits.calibration import SHIPPED, find_calibration, place_of, read_calibration
from tempo_mlx.exits.calibration import TARGETS as CALIBRATED
from tempo_mlx.exits.fit import judge
from tempo_mlx.exits.samples import HiddenStates, sample_texts
from tempo_mlx.resolution import resolve
from tempo_mlx.weights.registry import PACKAGED

MODEL = "smollm2-135m"
RESULTS = Path(__file__).with_name("results") / "early-exit"
TARGETS = (0.90, 0.95, 0.98)
RESAMPLES = 10_000
SAVED = ("layers", "head", "lookup")


def arms(tokens: int) -> dict[str, GenerateConfig]:
    base: dict[str, Any] = {"decoder": "plain", "temperature": 0, "max_tokens": tokens, "min_steps": tokens}
    lossy = {
        f"lossy {target:.2f}": {**base, "early_exit": True, "exit_target_agreement": target}
        for target in TARGETS
    }
    lossy["lossy 0.95, no lookup"] = {**lossy["lossy 0.95"], "exit_lookup": False}
    lossless = {**base, "early_exit": True, "lossless": True}
    chosen = {
        FULL: base,
        **lossy,
        "lossless": lossless,
        "lossless, no lookup": {**lossless, "exit_lookup": False},
    }
    return {name: resolve(settings) for name, settings in chosen.items()}


def judged(loaded: Any, prompt: str, configs: Mapping[str, GenerateConfig]) -> dict[str, Any]:
    """What one prompt says of every arm, apart from time."""
    runs = {name: generate(loaded, prompt, config=config) for name, config in configs.items()}
    found = {}
    for name, run in runs.items():
        early = run.early_exit or {}
        found[name] = {
            "audited": sum(item["audited"] for item in early.get("exits", ()) if "audited" in item),
            "agreed": sum(item["agreed"] for item in early.get("exits", ()) if "agreed" in item),
            "exits": early.get("exits", []),
            "accepted": early.get("accepted", run.timing.get("early_exit_accepted", 0)),
            "layers": early.get("mean_layers") or loaded.model.architecture.num_hidden_layers,
            "same": same_beginning(runs[FULL], run) / len(runs[FULL].steps),
            "perplexity": perplexity(loaded, run),
            "repetition": repetition(ids_of(run)),
        }
    return found


def held_out(loaded: Any, texts: list[str], tokens: int) -> dict[float, dict[str, Any]]:
    """For each target, how the choices made early on the model's own greedy texts agree with its own, by text.

    None of the prompts is the calibration's. Looked at in one go, many texts together, so that there can be many.
    """
    model, calibration = loaded.model, find_calibration(loaded.model.info)
    layers = sorted({item.layer for item in calibration.exits if item.pays})
    ids = [loaded.tokenizer.encode(text) for text in texts]
    eos = frozenset(loaded.tokenizer.eos_ids)
    samples = HiddenStates.join(
        [sample_texts(model, ids[at : at + 16], layers, tokens, eos, 0.0, 0) for at in range(0, len(ids), 16)]
    )
    found = {}
    for target in TARGETS:
        left = np.zeros(len(samples.choices), bool)
        right = np.zeros(len(samples.choices), bool)
        for item in calibration.exits:
            if target not in item.pays:
                continue
            translator = (
                None
                if item.weight is None
                else (item.weight.astype(np.float32), item.offset.astype(np.float32))
            )
            outcome = judge(
                model,
                calibration.shortlist[: item.width],
                samples,
                dict(enumerate(ids)),
                layers.index(item.layer),
                translator,
            )
            leaves = ~left & (outcome.margins >= item.pays[target])
            right |= leaves & outcome.right
            left |= leaves
        by_text = [np.bincount(samples.texts, weights=flags, minlength=len(ids)) for flags in (left, right)]
        found[target] = {**resampled(*by_text, target), "left": float(left.mean()), "tokens": len(left)}
    return found


def resampled(audited: Any, agreed: Any, target: float) -> dict[str, Any]:
    """Agreement, its 95% interval and how often it is at the target, when whole prompts are drawn again."""
    drawn = np.random.default_rng(0).integers(0, len(audited), (RESAMPLES, len(audited)))
    shares = agreed[drawn].sum(axis=1) / audited[drawn].sum(axis=1)
    return {
        "agreement": float(agreed.sum() / audited.sum()),
        "interval": np.percentile(shares, [2.5, 97.5]).tolist(),
        "resamples_at_target": float((shares >= target).mean()),
    }


def timed(
    loaded: Any, texts: Iterable[str], configs: Mapping[str, GenerateConfig], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Decoding seconds, joules and shares saved of every arm, by prompt and round; the arms take turns."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "joules": [], **{part: [] for part in SAVED}} for name in configs
    }
    names = list(configs)
    for at, text in enumerate(texts):
        for number in range(rounds):
            first = (at + number) % len(names)  # who comes first is at a disadvantage of some per cent
            for name in names[first:] + names[:first]:
                before = joules()
                timing = generate(loaded, text, config=configs[name]).timing
                after = joules()
                found[name]["seconds"].append(timing["decode_seconds"])
                for part in SAVED:
                    found[name][part].append(timing.get(f"early_exit_saved_by_{part}", 0.0))
                if before is not None and after is not None:
                    found[name]["joules"].append(after - before)
    return found


def joules() -> float | None:
    """What the processor packages have used so far, where the kernel lets one read it (RAPL)."""
    counters = sorted(Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj"))
    try:
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    except OSError:
        return None


def summary(
    name: str, about: list[dict[str, Any]], taken: Mapping[str, Mapping[str, list[float]]], tokens: int
) -> dict[str, Any]:
    """One arm's row."""
    audited, agreed = (np.array([item[name][key] for item in about]) for key in ("audited", "agreed"))
    row: dict[str, Any] = {
        "arm": name,
        "prompts": len(about),
        "tokens": tokens,
        "agreement": float(agreed.sum() / audited.sum()) if audited.sum() else None,
        "left_early": float(
            np.mean([sum(e["left"] for e in item[name]["exits"] if "left" in e) for item in about])
        )
        / (tokens - 1),
        "run_ahead": float(np.mean([item[name]["accepted"] for item in about])) / (tokens - 1),
        "same_start": float(np.mean([item[name]["same"] for item in about])),
        "same_throughout": sum(item[name]["same"] == 1 for item in about),
        "perplexity": float(np.exp(np.mean(np.log([item[name]["perplexity"] for item in about])))),
        "repetition": float(np.mean([item[name]["repetition"] for item in about])),
        "layers": float(np.mean([item[name]["layers"] for item in about])),
    }
    if taken:
        ratios = np.array(taken[FULL]["seconds"]) / np.array(taken[name]["seconds"])
        row |= {
            "speedup": float(sum(taken[FULL]["seconds"]) / sum(taken[name]["seconds"])),
            "speedup_quartiles": np.percentile(ratios, [25, 50, 75]).tolist(),
            "tokens_per_second": tokens * len(ratios) / sum(taken[name]["seconds"]),
            **{f"saved_by_{part}": float(np.mean(taken[name][part])) for part in SAVED},
            "joules_per_token": sum(taken[name]["joules"]) / (tokens * len(ratios))
            if taken[name]["joules"]
            else None,
        }
    return row


COLUMNS = (
    ("arm", "arm", "{}"), ("x full", "speedup", "{:.2f}"), ("tokens/s", "tokens_per_second", "{:.1f}"),
    ("agreement", "agreement", "{:.1%}"),
    ("left early", "left_early", "{:.0%}"), ("run ahead", "run_ahead", "{:.0%}"),
    ("same start", "same_start", "{:.0%}"),
    ("perplexity", "perplexity", "{:.2f}"), ("repetition", "repetition", "{:.0%}"), ("layers", "layers", "{:.1f}"),
    *((f"by {part}", f"saved_by_{part}", "{:.1%}") for part in SAVED),
)  # fmt: skip


def records_file(part: str, tokens: int) -> Path:
    return RESULTS / f"{part}-{tokens}.jsonl"


def cells(row: Mapping[str, Any]) -> list[str]:
    return ["" if row.get(key) is None else form.format(row[key]) for _, key, form in COLUMNS]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed against agreement."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tempo-mlx"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for row in rows:
        exact = row["agreement"] is None
        x = 100.0 if exact else 100 * row["agreement"]
        axes.plot(x, row["speedup"], "o", color="#c1554d" if exact else "#0b6e4f")
        beside = (6, -10) if row["arm"].endswith("no lookup") else (6, 5)  # such a point may lie on another
        axes.annotate(row["arm"], (x, row["speedup"]), textcoords="offset points", xytext=beside, fontsize=8)
    axes.axhline(1.0, color="#555555", linewidth=1, linestyle=":")
    axes.set(xlabel="agreement of choices made early, %", ylabel="speed, x full decoding")
    axes.margins(0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=160)


def page() -> str:
    """The figures as a page of Markdown, from the results that are kept alone."""
    kept = json.loads((RESULTS / "timed.json").read_text("utf-8"))
    facts, tokens, taken = kept["about"], kept["tokens"], kept["arms"]
    (held,), about = (read_records(records_file(part, tokens)) for part in ("held-out", "prompts"))
    rows = [summary(name, about, taken, tokens) for name in taken]
    shares = [
        [row["arm"], *(f"{row[f'saved_by_{part}'] + 0.0:.1%}".replace("-0.0%", "0.0%") for part in SAVED)]
        for row in rows
        if row["agreement"] is not None
    ]
    return "\n\n".join(
        [
            "# Early exit: the figures",
            f"Written by `python -m benchmarks.early_exit`, {runtime([held, *about])} and "
            f"{kept['seconds'] / 60:.0f} minutes alone for what is timed; not edited. {facts['id']}, "
            f"{facts['dtype']}, {facts['cores']} cores; what they mean is in [early-exit.md](early-exit.md). Brackets: "
            "95%, bootstrap over prompts.",
            "## Looked at afterwards, without running ahead",
            "The model's own greedy texts on 120 prompts that nothing was chosen on: what the exits of each target "
            "would have chosen, beside the whole model's choice. No run left early here.",
            markdown_table(
                ("target", "choices made early", "agreement", "resamples at the target"),
                [
                    (f"{target:.2f}", f"{found['left']:.0%}", with_interval(found["agreement"], found["interval"]),
                     f"{found['resamples_at_target']:.0%}")
                    for target, found in held["targets"]
                ],
            ),
            f"## Live, {len(about)} prompts",
            "What the audit of real runs found. A layer exit skips layers; the last layer's exit runs them all and "
            "skips the full vocabulary only, choosing with a short head.",
            markdown_table(
                ("arm", "audited agreement", "of layer exits", "of the short head", "texts equal to full decoding"),
                [audit_row(row["arm"], about) for row in rows if row["agreement"] is not None],
            ),
            "## Speed",
            f"Times full decoding, {tokens} greedy tokens, {len(taken[FULL]['seconds'])} runs of every arm together; "
            "brackets: quartiles over runs.",
            markdown_table(
                ("arm", "speed", "left early", "run ahead", "same beginning", "perplexity", "repetition", "layers"),
                [speed_row(row) for row in rows],
            ),
            "## What the calibration allows",
            "Of the model's own text on prompts left out of the fitting: the share of choices that may leave after a "
            "layer (counted from 0) while agreement stays at the target, choosing among so many tokens. Bold: an exit "
            "that is open at that target. From the calibration that comes with the package.",
            markdown_table(("layer", "tokens", *(f"at {target:.0%}" for target in CALIBRATED)), shares_allowed()),
            "## What each part saves",
            "Share of the time that going all the way with every step would have taken, as the run counts it (lossless "
            "runs do not).",
            markdown_table(("arm", "skipped layers", "the short head", "running ahead"), shares),
        ]
    ) + "\n"  # fmt: skip


def shares_allowed() -> list[list[str]]:
    """By exit: the share of choices that may leave there at each target."""
    key = PACKAGED[MODEL].sha256
    found = read_calibration(SHIPPED / place_of(key).name, key)
    return [
        [
            str(item.layer),
            str(item.width),
            *(
                "never" if item.margin(target) is None
                else ("**{:.0%}**" if target in item.pays else "{:.0%}").format(item.share(target))
                for target in CALIBRATED
            ),
        ]
        for item in found.exits
    ]  # fmt: skip


def with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"


def audit_row(arm: str, about: Sequence[Mapping[str, Any]]) -> list[str]:
    """Audited agreement with its interval, and by where rows left."""
    audited, agreed = (np.array([item[arm][key] for item in about]) for key in ("audited", "agreed"))
    value, low, high = bootstrap(lambda index: agreed[index].sum() / audited[index].sum(), len(about))
    last = max(exit["layer"] for item in about for exit in item[arm]["exits"])
    counts = [
        [sum(exit[key] for item in about for exit in item[arm]["exits"] if (exit["layer"] == last) == is_last)
         for key in ("agreed", "audited")]
        for is_last in (False, True)
    ]  # fmt: skip
    same = sum(item[arm]["same"] == 1 for item in about)
    parts = ["none left" if not total else f"{right} of {total}" for right, total in counts]
    return [arm, with_interval(value, (low, high)), *parts, f"{same} of {len(about)}"]


def speed_row(row: Mapping[str, Any]) -> list[str]:
    low, _, high = row["speedup_quartiles"]
    return [
        row["arm"],
        f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['left_early']:.0%}",
        f"{row['run_ahead']:.0%}",
        f"{row['same_start']:.0%}",
        f"{row['perplexity']:.2f}",
        f"{row['repetition']:.0%}",
        f"{row['layers']:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--timed", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--page", type=Path, help="write the page of figures from the results kept, and end")
    options = parser.parse_args()
    if options.page:
        options.page.write_text(page())
        return
    loaded, configs = load(MODEL), arms(options.tokens)
    texts = [prompt.text for prompt in read_prompts()]
    (held,) = studied(
        records_file("held-out", options.tokens), ["all"],
        lambda _: {"targets": list(held_out(loaded, texts, options.tokens).items())},
    )  # fmt: skip
    for target, share in held["targets"]:
        print(f"held-out prompts, target {target}: {json.dumps(share)}", flush=True)
    texts = texts[: options.prompts]
    about = studied(
        records_file("prompts", options.tokens), map(str, range(len(texts))),
        lambda key: judged(loaded, texts[int(key)], configs),
    )  # fmt: skip
    taken = {}
    busy, start = load_average(), time.monotonic()
    if options.timed:
        timed(loaded, texts[:1], configs, 1)  # warms up
        taken = timed(loaded, texts[: options.timed], configs, options.rounds)
    rows = [summary(name, about, taken, options.tokens) for name in configs]
    print(text_table([heading for heading, _, _ in COLUMNS], [cells(row) for row in rows]))
    if taken:
        facts = {**versions(loaded.model.info), "load": [busy, load_average()], "cores": os.cpu_count()}
        kept = {
            "about": facts,
            "settings": {name: settings_of_arm(config) for name, config in configs.items()},
            "tokens": options.tokens,
            "seconds": round(time.monotonic() - start, 1),
            "arms": taken,
        }
        (RESULTS / "timed.json").write_text(json.dumps(kept) + "\n")
        draw(rows, RESULTS / "early-exit.svg")


if __name__ == "__main__":
    main()
