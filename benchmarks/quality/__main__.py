"""How good and how different are the texts of every decoder, beside each other, on prompts of six kinds?

    python -m benchmarks.quality [--quick] [--model NAME] [STAGE ...]

Stages, all of them unless named: `test` (what docs/quality.md reports), `long` (texts that the model ends itself),
`divergence` (superposed rows beside exact ones), `tuning` (what was tried, on prompts of their own), `prices` (seconds
of a pass by its rows; wants an idle machine), `judge` (what the model named by --judge thinks of the texts of --model),
`report` (tables, plots, the page, over all models that have results).

Results are kept in --out, a line a prompt and arm: what is there is not computed again, so an interrupted run goes
on where it stopped, and --minutes ends one part of a long run. Seeds are fixed.

With `--together 8` the default model takes one core about 25 minutes for `test`, 20 for `tuning`, 7 for a further seed,
and a judge of 0.5 billion parameters 14; as a writer that takes 3 times as long, one of 1.5 billion 8 times.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import tempo_mlx
from benchmarks.quality import arms as table
from benchmarks.quality.answers import JUDGED
from benchmarks.quality.arms import Arm
from benchmarks.quality.divergence import run_divergence
from benchmarks.quality.judge import run_judge
from benchmarks.quality.page import write_page
from benchmarks.quality.prices import measure_prices
from benchmarks.quality.prompts import Prompt, read_prompts
from benchmarks.quality.results import Results, folder_name, read_results
from benchmarks.quality.running import Plan, file_of, run_arm
from benchmarks.studies import versions

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("test", "long", "divergence", "tuning", "prices", "judge", "report")
TOKENS = {"test": 32, "long": 128, "tuning": 40, "divergence": 24}
PROMPTS = {"divergence": 8}
ARMS = {"test": (*table.MAIN, *table.STUDIES), "long": table.LONG, "tuning": table.TUNING}
QUICK = {"tokens": 6, "prompts": 2}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--judge", metavar="MODEL", help="another model, which rates the texts")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 6 tokens: does everything work?")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms")
    parser.add_argument("--prompts", type=int, help="at most so many prompts of a split, for now")
    parser.add_argument("--together", type=int, default=1, help="prompts that are decoded at once; not timed")
    parser.add_argument(
        "--seed", type=int, default=0, help="of arms that draw; another than 0 has files of its own"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="stop decoding after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality")
    parser.add_argument(
        "--page", type=Path, help="the page to write (docs/quality.md; under --quick in --out)"
    )
    options = parser.parse_args(arguments)
    stages = options.stages or [s for s in STAGES if s != "judge" or options.judge]
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    if "judge" in stages and not options.judge:
        parser.error("the judge stage needs --judge MODEL")
    if options.judge and folder_name(options.judge) == folder_name(options.model):
        parser.error("a model does not judge its own texts; give another to --judge")
    kind = "quick" if options.quick else "full"
    folder = options.out / folder_name(options.model) / kind
    load = cache(lambda: tempo_mlx.load(options.model))
    end = time.monotonic() + 60 * options.minutes
    for stage in stages:
        if stage == "prices":
            prices = measure_prices(load().model, 1 if options.quick else 5)
            source = f"measured by the stage `prices` at a load average of {os.getloadavg()[0]:.1f}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "prices.json").write_text(json.dumps({"seconds": prices, "source": source}) + "\n")
        elif stage == "report":
            if not read_results(options.out, kind):
                parser.error(f"{options.out} holds no results; the stage test brings some")
            page = options.page or (folder / "quality.md" if options.quick else ROOT / "docs" / "quality.md")
            write_page(options.out, kind, page)
            print(f"wrote {page}")
        else:
            for line in decode(stage, load, options, folder):
                print(f"{stage}: {line}", flush=True)
                if time.monotonic() > end:
                    print(f"{options.minutes:g} minutes are over; the same command goes on from here.")
                    return


def decode(
    stage: str, load: Callable[[], tempo_mlx.LoadedModel], options: argparse.Namespace, folder: Path
) -> Iterator[str]:
    """Do what a stage has left to do; a line for each prompt done."""
    prompts: list[Prompt] = read_prompts("tuning" if stage == "tuning" else "test")
    if stage == "judge":
        names = {name.partition(":")[0] for pair in JUDGED for name in pair}
        arms = [arm for arm in chosen("test", options) if arm.name in names]
        judge, judged = tempo_mlx.load(options.judge), folder / "judge" / folder_name(options.judge)
        tokenizer = Results(folder).tokenizer
        yield from run_judge(judge, arms, prompts[: options.prompts], folder / "test", judged, tokenizer)
        return
    write_about(folder, versions(load().model.info))
    tokens = QUICK["tokens"] if options.quick else TOKENS[stage]
    prompts = prompts[: QUICK["prompts"] if options.quick else PROMPTS.get(stage)][: options.prompts]
    if stage == "divergence":
        for line in run_divergence(load(), prompts, tokens, folder / "divergence.jsonl"):
            yield f"{line['attend']}, at most {line['cap']}: {line['prompt']}"
        return
    plan = Plan(tokens, ends=stage == "long", seed=options.seed, together=options.together)
    for arm in chosen(stage, options):
        for record in run_arm(load(), arm, prompts, plan, file_of(folder / stage, arm, plan.seed)):
            took = "" if record["seconds"] is None else f" in {record['seconds']} s"
            yield f"{arm.label}: {record['prompt']}{took}"


def chosen(stage: str, options: argparse.Namespace) -> list[Arm]:
    arms = [arm for arm in ARMS[stage] if not options.seed or arm in table.DRAWING]
    if options.only:
        arms = [arm for arm in arms if arm.name in options.only]
    return [replace(arm, prompts=None) for arm in arms] if options.quick else arms


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Where results of several versions come together, all of them are said."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "about.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    about["id"] = folder_name(about["id"])
    for key, value in before.items():
        said = [] if value is None else str(value).split(", ")
        about[key] = ", ".join(dict.fromkeys([*said, str(about[key])])) if about.get(key) else value
    path.write_text(json.dumps(about))


if __name__ == "__main__":
    main()
