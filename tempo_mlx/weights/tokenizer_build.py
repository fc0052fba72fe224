"""Build a `tokenizers` tokenizer from a bare vocabulary: byte-level BPE, or SentencePiece."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tempo_mlx.errors import ModelError
from tempo_mlx.weights.library_errors import tokenizer_errors

_GAP = "\ufdd0gap"  # begins the names of ids that no token has: no text can hold a noncharacter
_MAX_GAP = 1 << 16
# sentencepiece's and llama.cpp's token types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Tokens that end a turn, or a text; which of them a model uses, its chat template says.
TURN_ENDS = frozenset(
    {
        "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|eom_id|>", "<|endoftext|>",
        "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<turn|>", "<|tool_response>", "<EOT>", "_<EOT>", "[EOT]",
        "<|eot|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "[|endofturn|]", "[e~[",
        "<｜end▁of▁sentence｜>", "<seed:eos>", "<|role_end|>",
    }
)  # fmt: skip
_MAX_PIECE = 256  # characters of a piece that merges lead to; the longest in use have 48


def byte_level_bpe(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    splits: Sequence[str],
    *,
    ignore_merges: bool,
    composes: bool = False,
) -> Tokenizer:
    """GPT-2's kind of tokenizer: `splits` cut the text, merges join bytes within the pieces. composes: NFC first."""
    with tokenizer_errors("The model's tokenizer"):
        model = models.BPE(vocab=_numbered(tokens), merges=list(merges), ignore_merges=ignore_merges)
    tokenizer = Tokenizer(model)
    if composes:
        tokenizer.normalizer = normalizers.NFC()
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
    chosen = {
        token: kind
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and token.strip("▁")
    }
    add_tokens(
        tokenizer, {token: kind != USER_DEFINED or token in TURN_ENDS for token, kind in chosen.items()}
    )


def add_tokens(tokenizer: Tokenizer, special: Mapping[str, bool]) -> None:
    """Match these tokens as a whole; those whose value is true are special."""
    for wanted in (True, False):
        chosen = [
            AddedToken(token, normalized=False, special=wanted)
            for token, kind in special.items()
            if kind is wanted
        ]
        (tokenizer.add_special_tokens if wanted else tokenizer.add_tokens)(chosen)


def add_later_tokens(tokenizer: Tokenizer, later: Mapping[int, AddedToken], path: Path) -> None:
    """Add tokens under the ids they were given after the vocabulary was made, or change how one is matched.

    A token that the vocabulary has keeps its id there. Raises: ModelError if an id is another token's.
    """
    known = {token.content: token.__getstate__() for token in tokenizer.get_added_tokens_decoder().values()}
    free = tokenizer.get_vocab_size()
    added: dict[str, AddedToken] = {}
    for index in sorted(later):
        token = later[index]
        if tokenizer.token_to_id(token.content) is None and token.content not in added:
            if index < free or index - free > _MAX_GAP:
                raise ModelError(
                    f"The tokenizer in {path} gives {token.content[:40]!r} the id {index}, which is not free."
                )
            for each in range(free, index):
                added[f"{_GAP}{each}"] = AddedToken(f"{_GAP}{each}", normalized=False, special=True)
            free = index + 1
        if known.get(token.content) != token.__getstate__():
            added.setdefault(token.content, token)
    tokenizer.add_tokens(list(added.values()))  # at once: each call looks at all there are


def add_named_tokens(
    tokenizer: Tokenizer, named: Sequence[AddedToken], roles: Collection[str], vocab_size: int
) -> None:
    """Add those that the files name and no list of theirs holds: words of the vocabulary, or, as transformers does,
    new ones under the next ids, as far as the model has rows for them. Those with a role are special whatever the list
    says."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    added: dict[str, AddedToken] = {}
    free = vocab_size - tokenizer.get_vocab_size()
    for token in named:
        if (listed := known.get(token.content)) is not None:
            if token.content in roles and not listed.special:
                added[token.content] = AddedToken(**{**listed.__getstate__(), "special": True})
            continue
        if token.content in added:
            continue
        new = tokenizer.token_to_id(token.content) is None
        if not new or free > 0:
            added[token.content] = token
            free -= new
    tokenizer.add_tokens(list(added.values()))


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
    """Token -> id; of a token that stands there twice, as padding does, the first is found."""
    return {token: len(tokens) - 1 - place for place, token in enumerate(reversed(tokens))}
