"""Token ids and greedy texts against llama.cpp, which reads the same .gguf files and shares no code with us.

    python -m benchmarks.llama_cpp [MODEL.gguf or name ...] [--strings 2000] [--prompts 10] [--tokens 48] [--as-is]
                                   [--packed]
    python -m benchmarks.llama_cpp --cuts

For each model: how many of the strings have other token ids, and at how many of the positions of llama.cpp's greedy
texts our most probable token is another, with how near a tie that was. llama.cpp multiplies by quantised weights with
activations of eight bits, which moves its logits by up to some tenths; so it is given the same weights dequantised to
float32, and a rival within NEAR_TIE is no difference between the two. --as-is gives it the file itself. --packed: ours
is also the model with its quantised weights packed, as this machine's CPU and as a GPU would hold it: the latter's
weights and 16-bit activations, multiplied as a GPU does, with sums in float32. --cuts: a small vocabulary under each
name of a pre-tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies import prompts
from tempo_mlx import load
from tempo_mlx.bench.llama import LlamaCpp, dequantised, llama_cpp
from tempo_mlx.mlx import mx
from tempo_mlx.model.linear import Embedding, QuantizedLinear
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.weights import Tokenizer, open_checkpoint
from tempo_mlx.weights.pre_tokenizers import SPLITS
from tempo_mlx.weights.precision import choose

NEAR_TIE = 0.01  # of a logit
NEAR_TIE_AS_IS = 0.5
NEAR_TIE_PACKED = 0.25  # scales in 16 bits, and Q6_K requantised
# Their patterns tell capitals from small letters by \p{Lu}, which llama.cpp reads as any letter.
_BY_CASE = ("tiny_aya", "cohere2moe", "youtu")
_SOURCES = Path(__file__).resolve().parent.parent


def strings(count: int, seed: int = 0) -> Iterator[str]:
    """Words, numbers, source lines, blanks, punctuation and other scripts, mixed.

    Without blanks beyond U+0800, which DeepSeek's patterns take for letters or punctuation: llama.cpp makes a tab of
    them before it cuts.
    """
    draw = random.Random(seed)
    files = sorted(_SOURCES.glob("tempo_mlx/**/*.py"))
    lines = [line for file in files for line in file.read_text("utf-8").splitlines() if "</s>" not in line]
    words = (_SOURCES / "README.md").read_text("utf-8").split()
    scripts = [range(0x20, 0x7F), range(0xA1, 0x250), range(0x370, 0x500), range(0x5D0, 0x5EB), range(0x620, 0x64B),
               range(0x904, 0x940), range(0xE01, 0xE3B), range(0x3041, 0x3097), range(0x4E00, 0x9FA5),
               range(0xAC00, 0xD7A4), range(0x1F600, 0x1F650), range(0x300, 0x370)]  # fmt: skip
    kinds = (
        lambda: draw.choice(words),
        lambda: draw.choice(lines),
        lambda: str(draw.randrange(10 ** draw.randrange(1, 12))),
        lambda: f"{draw.uniform(-1e6, 1e6):.{draw.randrange(8)}f}",
        lambda: draw.choice((" ", "  ", "\n", "\n\n", "\t", " \n ", "\r\n", "    ", "\u00a0")),
        lambda: draw.choice("!?.,;:'\"()[]{}<>/\\|@#$%^&*-_=+`~…—“”‘’") * draw.randrange(1, 4),
        lambda: draw.choice(
            ("I'm", "WE'LL", "don't", "it’s", "camelCase", "snake_case", "x2y", "3rd", "é", "ﬁ", "İ")
        ),
        lambda: "".join(chr(draw.choice(draw.choice(scripts))) for _ in range(draw.randrange(1, 6))),
    )
    for _ in range(count):
        pieces = [draw.choice(kinds)() for _ in range(draw.randrange(1, 9))]
        yield draw.choice(("", " ")).join(pieces)


def other_ids(tokenizer: Tokenizer, theirs: LlamaCpp, texts: Sequence[str]) -> list[str]:
    """The strings whose token ids differ; composed first where ours does that (Qwen's), which llama.cpp never does."""
    composes = tokenizer.encode("e\u0301", add_special=False) == tokenizer.encode("é", add_special=False)
    texts = [unicodedata.normalize("NFC", text) for text in texts] if composes else texts
    return [text for text in texts if tokenizer.encode(text, add_special=False) != theirs.tokenize(text)]


def rivals(model: Any, prompt: Sequence[int], theirs: Sequence[int]) -> list[float]:
    """By how much our best logit exceeds that of llama.cpp's token, wherever it is another."""
    ids = np.array([*prompt, *theirs])
    out = model.forward(ids, np.arange(len(ids)), None, model.new_cache())
    logits = np.array(out.logits)[len(prompt) - 1 : -1]
    return [
        float(row.max() - row[token])
        for row, token in zip(logits, theirs, strict=True)
        if row.argmax() != token
    ]


@dataclass(frozen=True)
class Answers:
    """Of llama.cpp: token ids of each string, and of each prompt with the tokens that follow it."""

    strings: list[list[int]]
    prompts: list[tuple[list[int], list[int]]]


def asked(path: Path, texts: Sequence[str], starts: Sequence[str], count: int) -> Answers:
    with llama_cpp(path, exact=True) as theirs:
        prompts = [theirs.tokenize(start, add_special=True) for start in starts]
        return Answers(
            [theirs.tokenize(text) for text in texts], [(ids, theirs.greedy(ids, count)) for ids in prompts]
        )


def check(name: str, args: argparse.Namespace) -> bool:
    """llama.cpp first, so that one model at a time is in memory."""
    checkpoint = open_checkpoint(name)
    texts, starts = list(strings(args.strings)), prompts(args.prompts)
    with tempfile.TemporaryDirectory() as directory:
        path = checkpoint.path if args.as_is else dequantised(checkpoint.path, Path(directory))
        theirs = asked(path, texts, starts, args.tokens)
    tokenizer = checkpoint.tokenizer()
    pairs = zip(texts, theirs.strings, strict=True)
    wrong = [text for text, ids in pairs if tokenizer.encode(text, add_special=False) != ids]
    wrong += [
        text for text, (ids, _) in zip(starts, theirs.prompts, strict=True) if tokenizer.encode(text) != ids
    ]
    print(
        f"{checkpoint.path.name}: token ids of {len(texts) + len(starts)} strings, {len(wrong)} differ",
        flush=True,
    )
    for text in wrong[:5]:
        print(f"  {text!r}")
    near = NEAR_TIE_AS_IS if args.as_is else NEAR_TIE
    good = agrees("greedy, unpacked", load(name, dequantize=True).model, theirs, near)
    if args.packed:
        good &= agrees("greedy, packed as here", load(name).model, theirs, near)
        chosen = choose("gpu", checkpoint.stored, cpu_packs=False)
        model = widened(build(checkpoint, "cpu", chosen.dtype, packed=True))
        good &= agrees(f"greedy, packed as on a GPU, {chosen.dtype}", model, theirs, NEAR_TIE_PACKED)
    return good and not wrong


class Widened(QuantizedLinear):
    """Products of packed weights and 16-bit activations by their float32 values, rounded to 16 bits at the end. MLX's
    own take twelve seconds on a CPU for one row of a model of 0.6 billion numbers.
    """

    def __init__(self, of: QuantizedLinear) -> None:
        super().__init__(of.packed, of.scales, of.biases, of.layout, of.bias)
        affine = of.biases is not None
        scales = of.scales.astype(mx.float32) if affine else of.scales
        biases = of.biases.astype(mx.float32) if affine else None
        self.wide = mx.dequantize(of.packed, scales, biases, dtype=mx.float32, **self._options).T

    def __call__(self, x: mx.array) -> mx.array:
        y = (x.astype(mx.float32) @ self.wide).astype(x.dtype)
        return y if self.bias is None else y + self.bias


def widened(part: Any) -> Any:
    """A part of a dense model in which every packed weight but the embedding multiplies so."""
    if type(part) is QuantizedLinear:
        return Widened(part)
    if isinstance(part, list):
        part[:] = [widened(each) for each in part]
    elif type(part).__module__.startswith("tempo_mlx.model.") and not isinstance(part, Embedding):
        for name, value in list(vars(part).items()):
            if (other := widened(value)) is not value:
                setattr(part, name, other)
    return part


def agrees(what: str, model: Any, theirs: Answers, near_tie: float) -> bool:
    """Whether our most probable tokens are theirs but where they nearly tie, which is reported."""
    found = [rivals(model, ids, answer) for ids, answer in theirs.prompts]
    gaps = sorted(gap for each in found for gap in each)
    print(
        f"  {what}: {sum(not each for each in found)} of {len(found)} texts equal; {len(gaps)} of "
        f"{sum(len(answer) for _, answer in theirs.prompts)} tokens are another"
        + (f", by {', '.join(f'{gap:.4f}' for gap in gaps)} of a logit" if gaps else ""),
        flush=True,
    )
    return all(gap < near_tie for gap in gaps)


def vocabulary_file(directory: Path, pre: str) -> Path:
    """A model too small to say anything whose merges reach over every cut, so that token ids show the cuts."""
    import gguf
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(strings(4000, seed=1), trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), "<|end|>"]
    writer = gguf.GGUFWriter(directory / f"{pre}.gguf", "llama")
    sizes = {"block_count": 1, "context_length": 1024, "embedding_length": 32, "feed_forward_length": 32,
             "attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 16}  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
    }
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name, shape in {**shapes, **{f"blk.0.{part}": (32, 32) for part in parts}}.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / f"{pre}.gguf"


def check_cuts(count: int) -> bool:
    texts, good = list(strings(count, seed=2)), True
    with tempfile.TemporaryDirectory() as directory:
        for pre in (name for name in SPLITS if name not in _BY_CASE):
            path = vocabulary_file(Path(directory), pre)
            with llama_cpp(path, exact=True) as theirs:
                tokenizer = open_checkpoint(str(path)).tokenizer()
                wrong = other_ids(tokenizer, theirs, texts)
            good &= not wrong
            print(
                f"{pre}: {len(wrong)} of {count} strings differ{f', first {wrong[0]!r}' if wrong else ''}",
                flush=True,
            )
            path.unlink()
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["smollm2-135m"])
    parser.add_argument("--strings", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--as-is", action="store_true")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--cuts", action="store_true")
    args = parser.parse_args()
    good = [check_cuts(min(args.strings, 500))] if args.cuts else [check(name, args) for name in args.models]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
