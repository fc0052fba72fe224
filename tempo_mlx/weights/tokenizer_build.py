"""Build a `tokenizers` tokenizer from a bare vocabulary: byte-level BPE, or SentencePiece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tempo_mlx.errors import ModelError
from tempo_mlx.weights.library_errors import tokenizer_errors

# sentencepiece's and llama.cpp's token types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_MAX_PIECE = 256  # characters of a piece that merges lead to; the longest in use have 48

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = (r"\p{N}", _GPT2)
# tokenizer.ggml.pre -> patterns that cut the text one after the other (llama.cpp, src/llama-vocab.cpp)
SPLITS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,), "olmo": (_GPT2,), "mpt": (_GPT2,), "phi-2": (_GPT2,), "granite-docling": (_GPT2,),
    "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS, "codeshell": _DIGITS,
    "llama3": (_LLAMA3,), "llama-v3": (_LLAMA3,), "llama-bpe": (_LLAMA3,), "falcon3": (_LLAMA3,),
    "dbrx": (_LLAMA3,), "smaug-bpe": (_LLAMA3,), "pixtral": (_LLAMA3,),
    "qwen2": (_QWEN2,), "deepseek-r1-qwen": (_QWEN2,), "stablelm2": (_QWEN2,), "megrez": (_QWEN2,),
    "tekken": (_TEKKEN,), "gpt-4o": (_GPT4O,), "llama4": (_GPT4O,),
}  # fmt: skip


def byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], splits: Sequence[str], *, ignore_merges: bool
) -> Tokenizer:
    """GPT-2's kind of tokenizer: `splits` cut the text, merges join bytes within the pieces."""
    with tokenizer_errors("The model's tokenizer"):
        model = models.BPE(vocab=_numbered(tokens), merges=list(merges), ignore_merges=ignore_merges)
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], *, unknown: str | None, space_prefix: bool
) -> Tokenizer:
    """SentencePiece's BPE with byte fallback; `space_prefix`: a text starts with a space of its own."""
    with tokenizer_errors("The model's tokenizer"):
        model = models.BPE(
            vocab=_numbered(tokens), merges=list(merges), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    return _sentencepiece(model, space_prefix)


def sentencepiece_unigram(
    tokens: Sequence[str],
    scores: Sequence[float],
    *,
    unknown: int | None,
    space_prefix: bool,
    byte_fallback: bool,
) -> Tokenizer:
    """SentencePiece's unigram language model."""
    pieces = list(zip(tokens, scores, strict=True))
    with tokenizer_errors("The model's tokenizer"):
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=byte_fallback)
    return _sentencepiece(model, space_prefix)


def _sentencepiece(model: models.Model, space_prefix: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges_from_ranks(
    tokens: Sequence[str], ranks: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges a SentencePiece vocabulary implies: every way to make a piece out of two, best rank first.

    ranks: higher is merged earlier. Ties go to the longer left part, as in transformers.
    """
    mergeable = {
        token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED, UNUSED)
    }
    found = []
    for token, rank in zip(tokens, ranks, strict=True):
        if token not in mergeable:
            continue
        if len(token) > _MAX_PIECE:
            raise ModelError(f"The tokenizer has a piece of {len(token)} characters; the model is refused.")
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in mergeable and token[cut:] in mergeable:
                found.append((-rank, -cut, left, token[cut:]))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Match control tokens (special) and user-defined ones as a whole wherever they stand in a text."""
    for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        chosen = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(tokens, types, strict=True)
            if kind in kinds and token.strip("▁")
        ]
        if special:
            tokenizer.add_special_tokens(chosen)
        else:
            tokenizer.add_tokens(chosen)


def set_affixes(tokenizer: Tokenizer, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> None:
    """Put BOS before, or EOS after, what is encoded with special tokens."""
    affixes = [each for each in (bos, eos) if each is not None]
    if any(not token or set(token) & set(" :$") for token, _ in affixes):
        raise ModelError(f"The tokenizer's BOS or EOS token {affixes[0][0][:40]!r} is not supported.")
    if affixes:
        before = [bos[0]] if bos else []
        after = [eos[0]] if eos else []
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]), special_tokens=affixes
        )


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError("The tokenizer's vocabulary holds a token twice; fetch the model again.")
    return vocabulary
