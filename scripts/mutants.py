"""Plant one-line faults in a copy of the package, one at a time, and say which no test notices: `make mutants`.

    python scripts/mutants.py [WORD ...]     only those whose file or fault holds one of the words

A fault is a line of FAULTS: file, what is there, what stands in its place, and the tests that must turn red. It takes
about half an hour in all. Exit code 1 where one survives, or where a line of the table is no longer in the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("tempo_mlx", "tests", "docs", "scripts", "pyproject.toml", "README.md")

# ruff: noqa: E501 (a table)
# fmt: off
FAULTS: tuple[tuple[str, str, str, str], ...] = (
    ("decode/decoder.py", "if length < self.config.min_steps", "if length <= self.config.min_steps", "distributions"),
    ("decode/control.py", "np.where(seen < 0, seen * penalty, seen / penalty)", "seen / penalty", "control"),
    ("decode/control.py", "tokens[-window:]", "tokens", "control"),
    ("decode/control.py", '"top_p": top_p, "top_k": top_k,', '"top_k": top_k, "top_p": top_p,', "control"),
    ("decode/control.py", "row[~kept] = -np.inf\n", "row[~kept] = -np.inf\n                continue\n", "control"),
    ("decode/leaves.py", "if self.by_doubt else place.log_prob", "if self.by_doubt else 0.0", "enumeration"),
    ("decode/leaves.py", "before = place.doubt - float(place.log_probs[0])", "before = place.doubt", "enumeration"),
    ("decode/leaves.py", "child.doubt = place.doubt + log_prob -", "child.doubt = log_prob -", "enumeration"),
    ("report/verify/enumeration.py", "return start.doubt if self.by_doubt else start.log_prob", "return start.log_prob", "enumeration"),
    ("report/verify/enumeration.py", "(node.doubt - node.best if self.by_doubt", "(node.log_prob if self.by_doubt", "enumeration"),
    ("decode/leaves.py", "(place.log_prob - start.log_prob) / self.window", "place.log_prob / self.window", "enumeration"),
    ("decode/leaves.py", "here * place.gone", "place.gone", "enumeration"),
    ("decode/leaves.py", "self.found += math.exp(best.tip.log_prob)", "self.found += math.exp(best.tip.log_prob) / 2",
     "enumeration"),
    ("decode/beam.py", "default_rng([config.seed, number])", "default_rng(config.seed + number)", "distributions"),
    ("decode/beam.py", "probabilities = np.exp(frontier.tempered[row])", "probabilities = np.exp(frontier.log_probs[row])",
     "distributions"),
    ("decode/beam.py", "for child in best[: self.width] if child.ends", "for child in best if child.ends", "beam"),
    ("decode/beam.py", "sorted(means)[-self.width]", "sorted(means)[0]", "beam"),
    ("decode/beam.py", "penalty[token] += self.strength", "penalty[token] = self.strength", "beam"),
    ("decode/branches.py", "scores = frontier.tempered[row, tokens].astype", "scores = frontier.log_probs[row, tokens].astype",
     "distributions"),
    ("decode/branches.py", "frontier.tempered[row] >= self.floor", "frontier.tempered[row] > self.floor + 1", "tree"),
    ("decode/branches.py", "own.sort(key=lambda child: -child.log_prob)", "own.sort(key=lambda child: child.log_prob)", "tree"),
    ("decode/branches.py", "tail(self.merge_length - 1)", "tail(self.merge_length)", "tree"),
    ("decode/tree.py", "array[:, excluded] = -np.inf", "array[:, excluded] = 0.0", "distributions cold"),
    ("decode/tree.py", "/ max(len(parents), 1)", "", "tree"),
    ("decode/tree.py", "log_prob = node.log_prob + float(self.log_probs[row, token])",
     "log_prob = node.log_prob + float(self.tempered[row, token])", "beam tree"),
    ("decode/tree.py", "key=lambda node: -node.log_prob / node.length", "key=lambda node: -node.log_prob", "beam tree"),
    ("decode/combine.py", "result -= np.log(np.exp(result).sum(axis=1, keepdims=True))",
     "result -= np.log(np.exp(result).max(axis=1, keepdims=True))", "combine"),
    ("decode/combine.py", "np.asarray(weights, np.float32) @ np.exp(log_probs)", "np.exp(log_probs).mean(axis=0)", "combine"),
    ("decode/combine.py", "result = np.exp(pooled - pooled.max())\n        result /= result.sum()",
     "result = np.exp(pooled)", "combine"),
    ("decode/combine.py", "joint = forward + np.log(np.asarray(weights, np.float64))[:, None]", "joint = forward", "combine"),
    ("decode/combine.py", "left -= left.max()", "left -= 0.0", "cold"),
    ("decode/combine.py", "return mass / total if total > 0", "return mass / total if total > 0.5", "tempo cold"),
    ("decode/selection.py", "probabilities[list(excluded)] = -1.0", "probabilities[list(excluded)] = 0.5", "selection"),
    ("decode/selection.py", '"min-p": value * top', '"min-p": value', "selection"),
    ("decode/selection.py", "kept = kept[before < value]", "kept = kept[before <= value - 0.05]", "selection"),
    ("decode/selection.py", 'side="right"', 'side="left"', "selection pruning"),
    ("decode/selection.py", "np.lexsort((candidates, -probabilities[candidates]))", "np.argsort(-probabilities[candidates])",
     "selection"),
    ("decode/tempo.py", "if record is not records[-1] and known is not None", "if known is not None", "editable"),
    ("decode/tempo.py", "if entry.slot not in self.pinned", "", "editable server_sessions"),
    ("decode/tempo.py", "kept = [column for column in reversed(named) if named[column] not in self.eos_ids]",
     "kept = [column for column in named if named[column] not in self.eos_ids]", "tempo"),
    ("decode/tempo.py", "return bool(self.steps) and self.steps[-1].tokens[0].id in self.eos_ids",
     "return bool(self.steps) and self.steps[-1].tokens[-1].id in self.eos_ids", "tempo"),
    ("decode/tempo.py", "residual_probability=1.0 - sum(m.probability for m in members)",
     "residual_probability=1.0 - sum(m.weight or 0 for m in members)", "tempo"),
    ("decode/paths.py", "scores = np.take_along_axis(reached, order, axis=1)", "scores = reached[:, :count]", "paths"),
    ("decode/paths.py", "onward = layers[index + 1].edges[:, choices[-1]] / temperature",
     "onward = layers[index + 1].edges[:, choices[-1]]", "paths"),
    ("decode/paths.py", "distance * max(len(here)", "distance * min(len(here)", "paths"),
    ("decode/paths.py", "token.slot is not None and is_usable(token)", "is_usable(token)", "paths text run"),
    ("decode/pruning.py", "SINKS = ", "SINKS = 1 + ", "pruning strategies"),
    ("decode/score.py", "path.append(rows[key])", "path.append(path[0])", "score"),
    ("decode/score.py", "bias[:, :shared] = 0.0", "bias[:, 1:shared] = 0.0", "score"),
    ("decode/mcts.py", "explored = math.sqrt(tries + 1)", "explored = math.sqrt(tries)", "mcts"),
    ("decode/mcts.py", "node.pending -= 1", "node.pending -= 0", "mcts"),
    ("decode/settled.py", "return self._settle(index, int(alive[0]))", "return self._settle(newest, int(alive[0]))",
     "readings stops terminal"),
    ("decode/thinking.py", "place = len(token_ids) - self.steps", "place = len(token_ids) - self.steps - 1", "thinking"),
    ("lattice.py", "gamma /= np.repeat(np.where(mass == 0.0, 1.0, mass), widths, axis=1)", "", "lattice"),
    ("lattice.py", "best = posterior.argmax(axis=0)", "best = posterior.argmin(axis=0)", "lattice"),
    ("lattice.py", "gamma[:] = np.where(lost, self._shares(), gamma)", "gamma[:] = gamma", "lattice"),
    ("lattice.py", "np.fill_diagonal(own, 0.0)", "own[:] = 0.0", "lattice"),
    ("lattice.py", "self.weights[-len(self.newest) :] @ self.gamma", "self.gamma.mean(axis=0)", "lattice"),
    ("lattice.py", "bias[rows, seen] = 0.0\n        seen = above[seen]", "seen = above[seen]\n        bias[rows, seen] = 0.0",
     "lattice score"),
    ("exits/early_exit.py", "if (found.confidence >= item.least).all():", "if (found.confidence >= item.least).any():",
     "early_exit"),
    ("exits/early_exit.py", "asked = 1 + agreeing(found.choices, guessed)", "asked = 2 + agreeing(found.choices, guessed)",
     "early_exit"),
    ("model/cache.py", "self.positions = self.positions[indices]", "self.positions = self.positions[: len(indices)]",
     "cache families"),
    ("model/visibility.py", "slot_positions < window, dense", "slot_positions <= window, dense", "families"),
    ("model/rotation.py", "given = (cos, sin), (-sin, cos)", "given = (cos, sin), (sin, cos)", "model"),
    ("model/rope.py", "rope.dynamic_factor * length / original", "rope.dynamic_factor * (length - 1) / original",
     "model families"),
    ("model/experts.py", "return (up + 1) * gate", "return up * gate", "families"),
    ("model/lineage.py", "(left / left.sum()).astype", "left.astype", "recurrent"),
    ("model/recurrent.py", "((value - known) * beta[..., None])", "(value * beta[..., None])", "recurrent families"),
    ("model/recurrent.py", "left = key * between[:, -1, :, None]", "left = key", "recurrent families"),
    ("report/verify/book.py", "way = 4.0 * self.base", "way = 400.0 * self.base", "verify"),
    ("report/verify/book.py", ">= target if agreed", ">= 0.0 if agreed", "verify verify_forgeries"),
    ("report/verify/arithmetic.py", "slots, sorted(slots, reverse=True))", "slots, slots)", "verify verify_forgeries"),
    ("report/verify/texts.py", 'book.same("final_text", run.final_text, again.final_text)', "", "verify_forgeries"),
    ("report/verify/texts.py", 'elif reason == "length" and not at_length:', "elif False:", "verify_forgeries"),
    ("report/verify/lattice.py", "if slot in self.kept_by_hand or self.is_close(why):", "if True:",
     "verify verify_forgeries"),
    ("report/verify/lattice.py", '("posterior", FROM_FILE),', '("posterior", 1.0),', "verify verify_forgeries"),
    ("token_ids.py", "if not 0 <= token < vocabulary:", "if not 0 <= token <= vocabulary:", "token_ids"),
    ("batch.py", "None if of_model(run.model) == of_model(self.make.info)", "None if run.model", "batch"),
)
# fmt: on


def plant(package: Path, file: str, old: str, new: str) -> str:
    """Put the fault in, and return what to put back."""
    text = (package / file).read_text("utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"{file} has {old!r} {text.count(old)} times; mend scripts/mutants.py.")
    (package / file).write_text(text.replace(old, new), "utf-8")
    return text


def survives(copy: Path, tests: str) -> bool:
    """Whether the tests pass all the same."""
    files = [f"tests/test_{name}.py" for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environ = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=environ, capture_output=True, timeout=900).returncode == 0


def main(words: list[str]) -> int:
    survivors = []
    wanted = [fault for fault in FAULTS if not words or any(word in part for word in words for part in fault)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        for name in KEPT:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for number, (file, old, new, tests) in enumerate(wanted, 1):
            before = plant(copy / "tempo_mlx", file, old, new)
            alive = survives(copy, tests)
            (copy / "tempo_mlx" / file).write_text(before, "utf-8")
            survivors += [f"{file}: {old!r} -> {new!r}"] if alive else []
            print(
                f"{number}/{len(wanted)} {'SURVIVES' if alive else 'caught'} {file}: {new.strip() or old}",
                flush=True,
            )
    print(f"{len(survivors)} survivors of {len(wanted)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
