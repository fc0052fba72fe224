"""Which signal should decide what retroactive pruning removes?

    python -m benchmarks.pruning_ablation [--quick] [--attend lineage all] [--page docs/pruning-ablation.md]

One lattice per prompt is decoded without pruning, while every signal scores the members of its sets by what
the following sets show. Three questions:

1. Concordance: does a signal rank the members of a set as exact hindsight does, the full model's probability of
   12 tokens with that member before them? 0.5 is chance. Of which tokens, that matters:
   - those that follow on the lattice's best path. The best path's own member wrote them, and the signals look at the
     sets they come from, so much of this is a circle. Beside all pairs of members stand those without the best
     path's member, and what it gives to know nothing but which member that is ("on the best path");
   - those that the model goes on with, greedily, after the likeliest token that is not in the set: a continuation that
     none of its members wrote. It asks which member could stand in that token's place, so a good one that means
     something else ranks low;
   - member and next tokens of the best path together.
2. At an equal share removed (of the members that could go, since one stays in each set; lowest scores first),
   what is the perplexity, under the full model, of random paths (a member of each set, drawn uniformly) and
   of the best path (Viterbi)?
3. Online: the same perplexities when each rule really removes members while decoding.

Results are kept, a line a prompt, in --out and are not computed again; how long they take stands on the page.
Intervals: 95%, bootstrap over prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tempo_mlx
from benchmarks.pruning_page import summarise, write_page
from benchmarks.studies import describe, prompts, studied, versions
from tempo_mlx.decode.paths import Layer, best_paths, is_usable, layers_of, token_ids
from tempo_mlx.decode.pruning import (
    PruneContext,
    PruneRule,
    at_random,
    by_attention,
    by_posterior,
    by_probability,
)
from tempo_mlx.decode.score import score_sequences

HORIZON = 12  # tokens of hindsight
WINDOW = 8  # sets a signal looks ahead, unless it says otherwise
SHARES = (0.3, 0.6, 0.9)
BASELINE = "on the best path"  # no signal: 1 for the best path's member, 0 for the others
REMOVING = ("posterior", "probability", "random", "attention", "attention, last third")
# name -> rule, how many following sets it has seen
SIGNALS: dict[str, tuple[Any, int]] = {
    "posterior": (by_posterior(), WINDOW),
    "posterior, 4 sets": (by_posterior(), 4),
    "posterior, 1 set": (by_posterior(), 1),
    "probability": (by_probability(), WINDOW),
    "random": (None, WINDOW),  # a rule for each seed
    "attention": (by_attention(steepness=None), WINDOW),
    "attention, plain mean": (by_attention(steepness=None, multi_scale=False), WINDOW),
    "attention, last third": (by_attention(steepness=None, num_layers=10), WINDOW),
    "attention, 1 set": (by_attention(steepness=None), 1),
}
ONLINE: dict[str, dict[str, Any]] = {
    "none": {},
    "posterior 0.1": {"use_retroactive_pruning": True},
    "posterior 0.1, relative": {"use_retroactive_pruning": True, "relative_posterior": True},
    "attention, defaults": {"attention_threshold": 0.01},
    "attention, relative 0.5": {"attention_threshold": 0.0},
    "attention, absolute 0.01": {"attention_threshold": 0.01, "relative_attention": False},
    **{
        f"{signal} {threshold}": {
            "use_retroactive_pruning": True,
            "pruning_signal": signal,
            "posterior_threshold": threshold,
        }
        for signal, threshold in (
            ("probability", 0.2),
            ("probability", 0.3),
            ("random", 0.3),
            ("random", 0.6),
        )
    },
}
Scores = dict[int, np.ndarray]  # set -> one score for each member, in slot order
Measured = dict[str, list[list[float]]]  # "random" and "best": [log-probability, tokens] of paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--paths", type=int, default=1, help="random paths for each lattice and seed")
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument(
        "--attend", nargs="+", default=["lineage"], choices=["lineage", "all", "weighted", "best"]
    )
    parser.add_argument("--page", type=Path, help="write tables and plots as a page of Markdown")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pruning_ablation"))
    parser.add_argument("--quick", action="store_true", help="4 prompts, 24 tokens, one seed")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.tokens, options.seeds = 4, 24, 1
        options.out /= "quick"
    loaded = tempo_mlx.load(options.model)
    texts = prompts(options.prompts)
    keys = [f"{index:03d}" for index in range(len(texts))]
    folder = options.out / Path(loaded.model.info["id"]).name
    given = ("prompts", "seeds", "tokens", "paths", "threshold")
    describe(folder, {**{name: getattr(options, name) for name in given}, **versions(loaded.model.info)})
    for attend in options.attend:
        path = folder / f"{attend}.jsonl"
        results = studied(path, keys, lambda key, a=attend: study(loaded, texts[int(key)], a, options))
        show(attend, summarise(results))
    if options.page:
        write_page(options.page, folder)


# One prompt


def study(
    loaded: tempo_mlx.LoadedModel, prompt: str, attend: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Everything about one prompt, as plain numbers."""
    base = {
        "max_tokens": options.tokens,
        "min_steps": options.tokens,
        "threshold": options.threshold,
        "attend": attend,
    }
    contexts: dict[int, PruneContext] = {}

    def watch(context: PruneContext) -> list[Any]:
        contexts[context.step] = context
        return []

    decoding = tempo_mlx.stream(loaded, prompt, prune=PruneRule(watch, needs_attention=True), **base)
    # in slot order, as the contexts list them: the reverse of best first
    layers = [Layer(layer.members[::-1], layer.edges[::-1, ::-1]) for layer in layers_of(list(decoding))]
    prompt_ids = decoding.prompt.token_ids
    paths = PathScores(loaded.model, prompt_ids)
    seeds = range(options.seeds)
    scores = {
        name: [signal_scores(rule or at_random(seed), contexts, delay) for seed in seeds]
        for name, (rule, delay) in SIGNALS.items()
    }
    best = best_paths(layers)[0]
    on_path = {t: np.arange(len(layer.members)) == best.choice[t] for t, layer in enumerate(layers)}
    hindsight = exact_hindsight(loaded, prompt_ids, layers, token_ids(layers, best))
    hindsight["other pairs"] = {
        t: np.where(on_path[t], np.nan, values) for t, values in hindsight["continuation"].items()
    }
    ordering = {name: values[0] for name, values in scores.items()} | {BASELINE: on_path}

    def thinned(share: float, by_seed: Sequence[Scores]) -> Measured:
        parts = [
            measure(paths, layers, remove_share(layers, values, share), seed, options.paths)
            for seed, values in zip(seeds, by_seed, strict=True)
        ]
        return {kind: [pair for part in parts for pair in part[kind]] for kind in ("random", "best")}

    return {
        "prompt": prompt,
        "widths": [len(layer.members) for layer in layers],
        "concordance": {
            kind: {name: concordance(values, exact) for name, values in ordering.items()}
            for kind, exact in hindsight.items()
        },
        "removed": {
            "none": {"0": thinned(0.0, scores["posterior"])},
            **{name: {str(share): thinned(share, scores[name]) for share in SHARES} for name in REMOVING},
        },
        "online": {
            name: online(tempo_mlx.stream(loaded, prompt, **base, **settings), paths, options)
            for name, settings in ONLINE.items()
        },
    }


def online(decoding: Any, paths: PathScores, options: argparse.Namespace) -> dict[str, Any]:
    """What is left of a run that removes members as it goes."""
    steps = list(decoding)
    layers = layers_of(steps)
    alive = [range(len(layer.members)) for layer in layers]
    parts = [measure(paths, layers, alive, seed, options.paths) for seed in range(options.seeds)]
    return {
        **{kind: [pair for part in parts for pair in part[kind]] for kind in ("random", "best")},
        "members": sum(len(step.tokens) for step in steps),
        "removed": sum(not is_usable(member) for step in steps for member in step.tokens),
        "sets": len(steps),
    }


def signal_scores(rule: PruneRule, contexts: dict[int, PruneContext], delay: int) -> Scores:
    """Each wide set's scores after `delay` further sets (fewer at the end of the run), on one scale:
    attention counts relative to its set's mean.
    """
    scores: Scores = {}
    for context in (contexts[step] for step in sorted(contexts)):
        views = tuple(view for view in context.sets if context.step <= view.step + delay)
        everything = rule(PruneContext(context.step, np.inf, views))  # all are under infinity
        by_slot = {entry.slot: entry.why.score for entry in everything}
        for view in views:
            values = np.array([by_slot[slot] for slot in view.slots.tolist()])
            scores[view.step] = values / values.mean() if everything[0].why.signal == "attention" else values
    return scores


def remove_share(layers: Sequence[Layer[Any]], scores: Scores, share: float) -> list[list[int]]:
    """Which members of each layer stay when this share of those that can go is removed, lowest scores
    first.
    """
    kept = [list(range(len(layer.members))) for layer in layers]
    ranked = sorted((value, step, i) for step, values in scores.items() for i, value in enumerate(values))
    quota = round(share * sum(len(values) - 1 for values in scores.values()))
    for _, step, index in ranked:
        if quota and len(kept[step]) > 1:
            kept[step].remove(index)
            quota -= 1
    return kept


class PathScores:
    """The full model's log-probability of paths, each scored once."""

    def __init__(self, model: Any, prompt_ids: Sequence[int]) -> None:
        self.model, self.prompt_ids = model, prompt_ids
        self.known: dict[tuple[int, ...], float] = {}

    def __call__(self, paths: Sequence[Sequence[int]]) -> list[float]:
        keys = [tuple(path) for path in paths]
        new = list(dict.fromkeys(key for key in keys if key not in self.known))
        for key, scores in zip(new, score_sequences(self.model, self.prompt_ids, new), strict=True):
            self.known[key] = float(scores.sum())
        return [self.known[key] for key in keys]


def measure(
    paths: PathScores, layers: Sequence[Layer[Any]], kept: Sequence[Sequence[int]], seed: int, count: int
) -> Measured:
    """[log-probability, tokens] of `count` random paths and of the best path over the kept members."""
    thinned = []
    before: Sequence[int] = [0]
    for layer, here in zip(layers, kept, strict=True):
        edges = layer.edges[np.ix_(before, here)]
        thinned.append(Layer(tuple(layer.members[i] for i in here), edges))
        before = here
    best = token_ids(thinned, best_paths(thinned)[0])
    random = np.random.default_rng([seed, 7])
    drawn = [
        [layer.members[random.integers(len(layer.members))].id for layer in thinned if layer.printed]
        for _ in range(count)
    ]
    scores = paths([best, *drawn])
    return {
        "best": [[scores[0], len(best)]],
        "random": [[score, len(path)] for score, path in zip(scores[1:], drawn, strict=True)],
    }


def exact_hindsight(
    loaded: tempo_mlx.LoadedModel,
    prompt_ids: Sequence[int],
    layers: Sequence[Layer[Any]],
    best: Sequence[int],
) -> dict[str, Scores]:
    """The full model's log-probability, with each member in its place after the best path's earlier tokens, of the best
    path's next HORIZON tokens ("continuation"), of the member and these ("both"), and of what follows an outsider.
    """
    steps = [t for t, layer in enumerate(layers) if len(layer.members) > 1 and t + HORIZON < len(layers)]
    after = outsiders(loaded, prompt_ids, best, {t: [m.id for m in layers[t].members] for t in steps})

    def scores(follow: Mapping[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """Of a member and what follows it: step -> (members, 1 + HORIZON)."""
        texts = [[*best[:t], member.id, *follow[t]] for t in steps for member in layers[t].members]
        log_probs = iter(score_sequences(loaded.model, prompt_ids, texts))
        return {t: np.array([next(log_probs)[t:] for _ in layers[t].members]) for t in steps}

    own, other = scores({t: best[t + 1 : t + 1 + HORIZON] for t in steps}), scores(after)
    return {
        "continuation": {t: values[:, 1:].sum(axis=1) for t, values in own.items()},
        "outsider": {t: values[:, 1:].sum(axis=1) for t, values in other.items()},
        "both": {t: values.sum(axis=1) for t, values in own.items()},
    }


def outsiders(
    loaded: tempo_mlx.LoadedModel,
    prompt_ids: Sequence[int],
    best: Sequence[int],
    members: Mapping[int, Sequence[int]],
) -> dict[int, list[int]]:
    """For each step of `members` the HORIZON tokens the model goes on with after the best path's earlier tokens and the
    likeliest token that is none of the members and does not end the text.
    """
    cache = loaded.model.new_cache()
    ids = [*prompt_ids, *best]
    logits = loaded.model.forward(ids, np.arange(len(ids)), None, cache).logits
    settings = {"decoder": "plain", "temperature": 0.0, "max_tokens": HORIZON, "min_steps": HORIZON}
    found = {}
    for t, known in members.items():
        row = np.array(logits[len(prompt_ids) + t - 1], float)
        row[[*known, *loaded.tokenizer.eos_ids]] = -np.inf
        run = tempo_mlx.generate(loaded, [*ids[: len(prompt_ids) + t], int(row.argmax())], **settings)
        found[t] = [member.id for step in run.steps for member in step.tokens]
    return found


def concordance(scores: Scores, hindsight: Scores) -> list[float]:
    """[pairs of one set ranked as hindsight ranks them (ties: half), all pairs]. What is not a number is in no pair."""
    agreed = pairs = 0.0
    for step, exact in hindsight.items():
        there = np.flatnonzero(~np.isnan(exact))
        for at, i in enumerate(there):
            for j in there[:at]:
                product = np.sign(exact[i] - exact[j]) * np.sign(
                    float(scores[step][i]) - float(scores[step][j])
                )
                agreed += (product + 1) / 2
                pairs += 1
    return [agreed, pairs]


def show(attend: str, summary: dict[str, Any]) -> None:
    def cell(values: Sequence[float]) -> str:
        return f"{values[0]:8.2f} [{values[1]:.2f}, {values[2]:.2f}]"

    print(
        f"--attend {attend}: {summary['prompts']} prompts, mean width {summary['mean_width']}, pairs of members "
        f"{summary['pairs']}\n"
    )
    print(f"concordance with exact hindsight (0.5 is chance): {', '.join(summary['concordance'])}")
    for name in (*SIGNALS, BASELINE):
        print(
            f"  {name:26}" + "".join(cell(by_signal[name]) for by_signal in summary["concordance"].values())
        )
    for kind in ("random", "best"):
        print(f"\nperplexity of {kind} paths under the full model, by share of the removable members removed")
        print(f"  0    {'none':26}{cell(summary['removed']['none']['0'][kind])}")
        for share in map(str, SHARES):
            for name in REMOVING:
                print(f"  {share:4} {name:26}{cell(summary['removed'][name][share][kind])}")
    ratio = summary["posterior_to_probability_at_0.6"]
    print(f"\nrandom paths, 60% removed, posterior / probability: {cell(ratio)} (target: at most 0.5)")
    print("\nonline: share of members removed, width left, perplexity of random paths, of the best path")
    for name, row in summary["online"].items():
        numbers = f"{row['removed']:6.2f}{row['width']:6.2f}"
        print(f"  {name:26}{numbers} {cell(row['random'])} {cell(row['best'])}")


if __name__ == "__main__":
    main()
