"""What the probabilities that a lattice records are worth, beside those of the model itself.

    python -m benchmarks.superposition [--model NAME] [--prompts N] [--minutes M]     measure
    python -m benchmarks.superposition report                     docs/superposition.md, from the results kept

Three things are measured on the test prompts of benchmarks/quality, in runs of a fixed length (the end of the text is
put off). Results are kept, a line a prompt and case; the same command goes on where it stopped.

- `rows`: up to every set, texts are drawn along the edges of the lattice so far. The row of a text's newest token is
  held against the exact distribution after that text alone: KL(exact || row), and total variation.
- In the same lines, calibration. After such a text the next set has members, and the run records two probabilities of
  each: the edge P(j|i) from the text's newest token to it, and the set's own, a mixture over all rows before it. Both
  are held against the exact probability of that member after that text, which stands for the share of draws that would
  have it. No text is drawn with regard to the edges it is then asked about: that would favour those that are too high.
- `plain`: the control. Tokens of plain sampling, recorded beside a fresh score of the text.
- `texts`: the exact probability of all texts that a lattice spells, beside that of those which an exact tree finds with
  as many rows: `enumerate`, best first, one row a pass. What follows its last rows is known, and counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from numpy.typing import ArrayLike

import tempo_mlx
from benchmarks.quality.divergence import divergence, rows_of, run_trie
from benchmarks.quality.prompts import Prompt, read_prompts
from benchmarks.studies import Record, append_record, read_records, versions
from tempo_mlx.api import Prompt as Given
from tempo_mlx.arrays import Float32s, Floats
from tempo_mlx.decode.enumeration import Enumeration
from tempo_mlx.decode.paths import Layer, best_paths, layers_of, sample_paths, token_ids
from tempo_mlx.decode.score import score_sequences

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 24
DRAWN = 4  # pasts a set
BINS = 10  # of recorded probability, equally wide
MOST_TEXTS = 2048  # of a lattice that are scored: its best, where there are more
ALL_LEAVES = 1_000_000


@dataclass(frozen=True)
class Case:
    """What lattices are made with; `tokens`: their length. The defaults are those of the settings."""

    attend: str = "lineage"
    threshold: float = 0.1
    max_parallel_tokens: int = 8
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        return f"{self.attend} {self.threshold:g} {self.max_parallel_tokens} {self.tokens}"

    @property
    def settings(self) -> dict[str, Any]:
        rest = {key: value for key, value in asdict(self).items() if key != "tokens"}
        return {**rest, "max_tokens": self.tokens, "min_steps": self.tokens}


def named(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


LATTICES = named(
    Case(),
    *(Case(threshold=0.03, max_parallel_tokens=cap) for cap in (2, 4, 8)),
    Case(attend="all"),
    Case(attend="all", threshold=0.03),
)
SPELLED = named(*(Case(threshold=threshold, tokens=tokens) for threshold in (0.1, 0.03) for tokens in (6, 8)))


# Rows, and what is recorded of what follows them


def measure_rows(loaded: tempo_mlx.LoadedModel, prompt: Given, case: Case, seed: int = 0) -> Record:
    """`kl` and `tv` of the rows of each set but the last, means over pasts; `edges` and `sets`: see `binned`."""
    decoding = tempo_mlx.stream(loaded, prompt, **case.settings)
    rows = rows_of(decoding)
    layers = layers_of(decoding.steps)
    pasts = [sample_paths(layers[: t + 1], DRAWN, [seed, t]) for t in range(len(rows))]
    exact = exact_after(
        loaded.model,
        decoding.prompt.token_ids,
        [token_ids(layers[: t + 1], past) for t, drawn in enumerate(pasts) for past in drawn],
    ).reshape(len(rows), DRAWN, -1)
    kl, tv = [], []
    edges, sets = np.zeros((2, BINS, 4))
    for t, superposed in enumerate(rows):
        newest = [past.choice[-1] for past in pasts[t]]
        log_p, log_q = exact[t], superposed[newest]
        kl.append(float(divergence(log_p, log_q).mean()))
        tv.append(float(total_variation(log_p, log_q).mean()))
        following = layers[t + 1]
        said = np.exp(log_p[:, [member.id for member in following.members]].astype(np.float64))
        recorded = np.broadcast_to([member.probability for member in following.members], said.shape)
        edges += binned(np.exp(following.edges)[newest], said, case.threshold)
        sets += binned(recorded, said, case.threshold)
    return {
        "widths": [len(layer.members) for layer in layers],
        "kl": rounded(kl),
        "tv": rounded(tv),
        "edges": rounded(edges),
        "sets": rounded(sets),
    }


def exact_after(model: Any, prompt_ids: Sequence[int], texts: Sequence[Sequence[int]]) -> Float32s:
    """The model's log-probabilities after each text: (texts, V)."""
    log_probs, row_of = run_trie(model, prompt_ids, [[*text, 0] for text in texts])  # any token may follow
    return log_probs[[rows[-1] for rows in row_of]]


def total_variation(log_p: Float32s, log_q: Float32s) -> Any:
    """Half the sum of the differences, along the last axis: what would have to move to make one the other."""
    return np.abs(np.exp(log_p) - np.exp(log_q)).sum(axis=-1, dtype=np.float64) / 2


def binned(recorded: ArrayLike, exact: ArrayLike, least: float = 0.0) -> Floats:
    """Of pairs with at least so much recorded, by bins of it: how many, and the sums of what is recorded, of what is
    exact, and of how far apart they are: (BINS, 4).
    """
    recorded, exact = np.ravel(recorded), np.ravel(exact)
    kept = recorded >= least
    recorded, exact = recorded[kept], exact[kept]
    at = np.minimum((recorded * BINS).astype(np.int64), BINS - 1)
    columns = (np.ones(len(at)), recorded, exact, np.abs(recorded - exact))
    return np.stack([np.bincount(at, column, BINS) for column in columns], axis=1)


def measure_plain(loaded: tempo_mlx.LoadedModel, prompt: Given, case: Case, seed: int = 0) -> Record:
    """Plain sampling: `sets` as of a lattice, and the `worst` difference of a probability."""
    run = tempo_mlx.generate(
        loaded, prompt, decoder="plain", seed=seed, max_tokens=case.tokens, min_steps=case.tokens
    )
    chosen = [step.tokens[0] for step in run.steps]
    (log_probs,) = score_sequences(loaded.model, run.prompt.token_ids, [[token.id for token in chosen]])
    recorded, exact = np.array([token.probability for token in chosen]), np.exp(log_probs)
    worst = float(np.abs(recorded - exact).max())
    return {"sets": rounded(binned(recorded, exact)), "worst": worst}


# Texts


def measure_texts(loaded: tempo_mlx.LoadedModel, prompt: Given, case: Case, seed: int = 0) -> Record:
    """Of the texts a lattice spells: how many, what they are worth by its edges (`said`) and exactly (`mass`), which is
    that of the best only where there are more than are scored (`scored`: share of `said`). And the tree's.
    """
    decoding = tempo_mlx.stream(loaded, prompt, **case.settings)
    for _ in decoding:
        pass
    layers = layers_of(decoding.steps)
    paths = best_paths(layers, MOST_TEXTS)
    ids = [token_ids(layers, path) for path in paths]
    log_probs = score_sequences(loaded.model, decoding.prompt.token_ids, ids)
    widths = [len(layer.members) for layer in layers]
    said = mass_said(layers)
    rows = sum(widths[:-1])  # the last set is not run
    return {
        "widths": widths,
        "texts": math.prod(widths),
        "rows": rows,
        "said": said,
        "scored": min(sum(math.exp(path.score) for path in paths) / said, 1.0),
        "mass": sum(math.exp(each.sum()) for each in log_probs),
        "tree": measure_tree(loaded, prompt, case, rows),
    }


def mass_said(layers: Sequence[Layer[Any]]) -> float:
    """The probability of all paths together, by their edges."""
    reached = np.ones(1)
    for layer in layers:
        reached = reached @ np.exp(layer.edges)
    return float(reached.sum())


def measure_tree(loaded: tempo_mlx.LoadedModel, prompt: Given, case: Case, rows: int) -> Record:
    """What is known of texts of tokens over the threshold after so many rows: how many, their exact mass, the rows run,
    and the mass of the first, which is greedy's.
    """
    decoding = tempo_mlx.stream(
        loaded, prompt, decoder="enumerate", threshold=case.threshold, leaves=ALL_LEAVES, merge_length=0, rows=1,
        max_passes=rows, max_tokens=case.tokens, min_steps=case.tokens,
    )  # fmt: skip
    for _ in decoding:
        pass
    decoder = decoding.decoder
    assert isinstance(decoder, Enumeration)
    agenda = decoder.agenda
    known = [path.tip.log_prob for path in agenda.outcome() if path.ended == "leaf"]
    for _, place, index in agenda.waiting:  # not begun, and yet known where no row is wanted any more
        if place.length == case.tokens - 1:
            known += (place.log_prob + place.log_probs[index:]).tolist()
    masses = np.exp(known)
    return {
        "texts": len(masses), "mass": float(masses.sum()), "rows": decoder.rows_run, "greedy": float(masses[0])
    }  # fmt: skip


# Many prompts

Measure = Callable[[tempo_mlx.LoadedModel, Given, Case, int], Record]
STUDIES: Mapping[str, tuple[Measure, Mapping[str, Case]]] = {
    "rows": (measure_rows, LATTICES),
    "plain": (measure_plain, {"plain": Case()}),
    "texts": (measure_texts, SPELLED),
}


def run_study(
    loaded: tempo_mlx.LoadedModel, study: str, prompts: Sequence[Prompt], folder: Path
) -> Iterator[Record]:
    """Append a line to folder/study.jsonl for every prompt and case that has none there, yielding it."""
    measure, cases = STUDIES[study]
    path = folder / f"{study}.jsonl"
    done = {(line["prompt"], line["case"]) for line in read_records(path)}
    for prompt in prompts:
        for name, case in cases.items():
            if (prompt.id, name) in done:
                continue
            seed = zlib.crc32(prompt.id.encode())  # other draws for every prompt
            line = {"prompt": prompt.id, "case": name, **measure(loaded, prompt.text, case, seed)}
            append_record(path, line)
            yield line


def rounded(values: Any) -> Any:
    return np.round(values, 6).tolist()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.superposition", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("stage", nargs="?", choices=("measure", "report"), default="measure")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=24, help="so many of the test prompts")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop measuring after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "superposition")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "superposition.md")
    options = parser.parse_args(arguments)
    if options.stage == "report":
        from benchmarks.superposition_page import write_page

        write_page(options.out, options.page)
        print(f"wrote {options.page}")
        return
    end = time.monotonic() + 60 * options.minutes
    loaded = tempo_mlx.load(options.model)
    about = versions(loaded.model.info)
    about["id"] = Path(about["id"]).name
    folder = options.out / about["id"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").write_text(json.dumps(about) + "\n")
    for study in STUDIES:
        for line in run_study(loaded, study, read_prompts("test")[: options.prompts], folder):
            print(f"{study}: {line['prompt']}: {line['case']}", flush=True)
            if time.monotonic() > end:
                print(f"{options.minutes:g} minutes are over; the same command goes on from here.")
                return


if __name__ == "__main__":
    main()
