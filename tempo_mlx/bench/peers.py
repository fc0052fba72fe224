"""Suites beside llama.cpp, which reads .gguf files: texts, llama.cpp, models. It serves in a process of its own, and
its own clock times steps and prompts, so that what HTTP takes is not counted; whole texts are timed from here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tempo_mlx.api import stream
from tempo_mlx.bench import contenders
from tempo_mlx.bench.contenders import STORED, Field, MlxLm, Transformers, line_up
from tempo_mlx.bench.generation import Decoding, mlx_lm_batch, transformers_texts
from tempo_mlx.bench.llama import Process, dequantised
from tempo_mlx.bench.processes import process_to_first_token, told
from tempo_mlx.bench.results import Measurement, Result
from tempo_mlx.bench.steps import PROMPT, Effort, one_row, tokens
from tempo_mlx.bench.timing import Timing, interleaved, stopwatch
from tempo_mlx.errors import ModelError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import LoadedModel
from tempo_mlx.resolution import resolve
from tempo_mlx.weights import open_checkpoint

Cases = dict[str, Callable[[], float]]
LLAMA_CPP = "llama.cpp"
AS_STORED = "llama.cpp, file as it is"
TEXTS = (1, 2, 4, 8)
FIVE = 5
LENGTH = 48  # tokens of a text
START = 32  # tokens before it
LONG = 512  # tokens of a long prompt


def _missing(field: Field) -> str | None:
    """Why llama.cpp takes no part."""
    if find_spec("xllamacpp") is None:
        return "llama.cpp is left out: it is not installed (pip install 'tempo-mlx[bench]')."
    if open_checkpoint(field.loaded.config.model).path.suffix != ".gguf":
        return "llama.cpp is left out: it reads .gguf files."
    return None


@contextmanager
def _served(field: Field, result: Result, texts: int) -> Iterator[dict[str, Process]]:
    """By name: with the weights that tempo-mlx computes with, and with the file as it is. None where it has no part."""
    if (reason := _missing(field)) is not None:
        result.notes.append(reason)
        yield {}
        return
    file = open_checkpoint(field.loaded.config.model).path
    with tempfile.TemporaryDirectory(prefix="tempo-mlx-bench-") as folder, ExitStack() as stack:
        served = {}
        for name, path in ((LLAMA_CPP, dequantised(file, Path(folder))), (AS_STORED, file)):
            served[name] = stack.enter_context(Process(path, texts))
        check_equal(field, served[LLAMA_CPP])
        yield served


def check_equal(field: Field, process: Process) -> None:
    """Raise ModelError where the greedy text with the same weights is another, near ties left out."""
    ids = tokens(field, START)
    theirs = process.server.greedy(ids, 16)
    text = list(ids)
    for token in theirs:
        logits = field.ours.start(text)[1]
        if logits.max() - logits[token] > 0.02:
            raise ModelError(
                f"llama.cpp goes on with token {token}, which is {logits.max() - logits[token]:.2g} of a logit behind "
                "ours; they do not do the same work, so nothing was timed."
            )
        text.append(token)


def texts(field: Field, effort: Effort) -> Result:
    """Several texts at once, over how many."""
    length = 12 if effort.quick else LENGTH
    result = Result(
        "texts",
        f"Texts of {length} tokens each, continuations of one prompt of {START} tokens, prompt included. tempo-mlx: "
        "branches on one cache; mlx-lm and transformers: a batch; llama.cpp: requests at once to its server.",
    )
    ids = tokens(field, START)
    with _served(field, result, max(TEXTS)) as served:
        for count in TEXTS[:: 3 if effort.quick else 1]:
            cases: dict[str, Callable[[], object]] = {
                name: _texts(own, ids, length, count) for name, own in field.own.items()
            }
            if isinstance(peer := field.named("mlx-lm"), MlxLm):
                cases["mlx-lm"] = partial(mlx_lm_batch, peer, ids, length, count)
            if isinstance(other := field.named("transformers"), Transformers):
                drawn = {"do_sample": True, "top_k": 0, "num_return_sequences": count}
                cases["transformers"] = partial(transformers_texts, other, ids, length, drawn)
            for name, process in served.items():
                cases[name] = partial(process.server.texts, ids, length, count)
            timed = {name: partial(stopwatch, case) for name, case in cases.items()}
            timings = interleaved(timed, effort.rounds(6), warm_up=False)
            result.add(f"{count} text{'' if count == 1 else 's'}", timings, field.ours.name)
    return result


def llama_cpp(field: Field, effort: Effort) -> Result:
    """One row, five texts, a long prompt, memory and start."""
    length = 12 if effort.quick else LENGTH
    most = min(LONG, field.loaded.model.architecture.max_position_embeddings // 2)
    ids, start, long = (tokens(field, count) for count in (PROMPT, START, most))
    result = Result(
        "llama.cpp",
        f"One row: a step of a greedy text of {length} tokens after {PROMPT}. {FIVE} texts: as in texts. "
        f"{most} tokens: of a prompt. Start: from no process to one token, of our command line and of a server. "
        "Memory: its peak in the end, after all this; ours after loading, a prompt of 512 tokens and 32 steps.",
    )
    ours, own = field.ours.name, field.own
    default = list(own)[-1]  # what the command line runs: the file as it is, where it can
    with _served(field, result, FIVE) as served:
        if not served:
            return result
        step: Cases = {name: partial(_own_step, each, ids, length) for name, each in own.items()}
        several: Cases = {
            name: partial(stopwatch, _texts(each, start, length, FIVE)) for name, each in own.items()
        }
        prompt: Cases = {name: partial(stopwatch, partial(field.named(name).start, long)) for name in own}
        for name, process in served.items():
            step[name] = partial(_step_seconds, process, ids, length)
            prompt[name] = partial(_prompt_seconds, process, long)
            several[name] = partial(stopwatch, partial(process.server.texts, start, length, FIVE))
        cases = {"1 row": step, f"{FIVE} texts": several, f"{most} tokens": prompt}
        timings = {case: interleaved(each, effort.rounds(8), warm_up=False) for case, each in cases.items()}
        for case, each in timings.items():
            result.add(case, each, LLAMA_CPP)
        begun = {name: Timing((process.seconds,)) for name, process in served.items()}
        begun[default] = Timing((process_to_first_token(field.loaded.config.model),))
        result.add("start", begun, LLAMA_CPP)
        sizes = {name: process.end() for name, process in served.items()}
    sizes[default] = int(told(field, "memory", ours)["peak"])
    for name, size in sizes.items():
        megabytes = size / 1e6
        ratio = None if name == LLAMA_CPP else size / sizes[LLAMA_CPP]
        beside = None if name == LLAMA_CPP else LLAMA_CPP
        result.rows.append(Measurement("memory", name, "MB", megabytes, megabytes, 0.0, 1, ratio, beside))
    for case, bound in (("1 row", 1.3), (f"{FIVE} texts", 1.0), (f"{most} tokens", 1.0)):
        quartiles = {name: timing.quartile for name, timing in timings[case].items()}
        result.goal(f"{case}, times llama.cpp's", quartiles[ours] / quartiles[LLAMA_CPP], bound)
        if STORED in own:
            times = quartiles[STORED] / quartiles[AS_STORED]
            result.goal(f"{case}, times llama.cpp's, both from the file as it is", times, 1.5)
    return result


def models(names: Sequence[str], field: Field, effort: Effort) -> Result:
    """The same of other models, each loaded when its turn comes. `field`: of the model that the other suites run."""
    result = Result(
        "models",
        f"Other models. One row: a pass on top of {PROMPT} slots, beside mlx-lm. The rest as in llama.cpp.",
    )
    for name in names:
        peers = [each.name for each in field.contenders if isinstance(each, MlxLm) or each.name == STORED]
        load = LoadConfig(model=name, dtype=field.loaded.config.dtype)
        with line_up(load, peers, result.notes.append) as other:
            said = Path(str(other.loaded.model.info["id"])).name
            contenders.check_equal(other, tokens(other, 24))
            result.add(f"{said}: a pass of one row", one_row(other, tokens(other, PROMPT), effort.rounds(8)))
            beside = llama_cpp(other, effort)
        result.rows += [replace(row, case=f"{said}: {row.case}") for row in beside.rows]
        result.goals += [replace(goal, what=f"{said}: {goal.what}") for goal in beside.goals]
        result.notes += [note for note in beside.notes if note not in result.notes]
    return result


def _own_step(loaded: LoadedModel, ids: list[int], length: int) -> float:
    decoding = Decoding(loaded, length, [ids], decoder="plain", temperature=0.0)
    return decoding() / decoding.steps


def _texts(loaded: LoadedModel, ids: Sequence[int], length: int, count: int) -> Callable[[], object]:
    settings = (
        {"branches": count, "merge_length": 0} if count > 1 else {"decoder": "plain", "temperature": 0.0}
    )
    config = resolve({"max_tokens": length, "min_steps": length, **settings})
    return lambda: list(stream(loaded, list(ids), config))


def _step_seconds(process: Process, ids: Sequence[int], length: int) -> float:
    answer = process.server.complete(ids, length, ignore_eos=True)
    return float(answer["timings"]["predicted_per_token_ms"]) / 1e3


def _prompt_seconds(process: Process, ids: Sequence[int]) -> float:
    return float(process.server.complete(ids, 1)["timings"]["prompt_ms"]) / 1e3
