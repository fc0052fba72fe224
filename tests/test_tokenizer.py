"""Tokenizers of every make against the libraries they come from, and text that streams without broken characters."""

from __future__ import annotations

import json
import os
import shutil
import string
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_mlx.errors import ModelError, PromptError
from tempo_mlx.weights import Tokenizer, open_checkpoint
from tempo_mlx.weights.gguf_file import read_gguf
from tempo_mlx.weights.pre_tokenizers import COMPOSING, SPLITS
from tempo_mlx.weights.tokenizer_files import from_directory
from tempo_mlx.weights.tokenizer_gguf import from_gguf
from tests.ggufs import add_sentencepiece_tokenizer, pieces, sentencepiece_model, write
from tests.twins import twin

transformers = pytest.importorskip("transformers")

TEXTS = [
    "", " ", "  ", "\n", "\t\n  x", "Hello world", " Hello  world ", "The capital of France is",
    "I'm you're WE'LL don't",
    "naïve café déjà-vu", "日本語のテキスト", "한국어 🇰🇷", "👨‍👩‍👧‍👦 family 😀😀", "e\u0301 \u200b\u200d\ufeff",
    "مرحبا", "def f(x):\n    return x ** 2  # ok\n", "a\u0000b\u0001c", "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|><|im_end|>", "x<|im_start|>y <|endoftext|> z", "!!??...;:'\"", "camelCaseWORDS", "\r\n\r\n",
    "\U0010ffff\ue000",
]  # fmt: skip
# All of Unicode but what SmolLM2's vocabulary has no bytes for (its tokenizer leaves those out, as transformers'), and
# SentencePiece's mark for a space, which comes back as one.
UNICODE = st.text(
    st.characters(
        exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d▁", max_codepoint=0x3FFFF
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return open_checkpoint("smollm2-135m").tokenizer()


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return open_checkpoint(str(twin("llama"))).tokenizer()


def spm_gguf(directory: Path, *, space_prefix: bool = True, **metadata: Any) -> Path:
    path = directory / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add_sentencepiece_tokenizer(writer, space_prefix=space_prefix)
    for key, value in metadata.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_string)(f"tokenizer.{key}", value)
    writer.add_tensor("none", np.zeros(8, np.float32))
    write(writer)
    return path


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return from_gguf(read_gguf(spm_gguf(tmp_path_factory.mktemp("spm"))), 420)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece", "smollm2"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# ---- SmolLM2, the embedded model


def test_smollm2_encodes_as_transformers(smollm2: Tokenizer) -> None:
    path = open_checkpoint("smollm2-135m").path
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    random = np.random.default_rng(0)
    letters = string.ascii_letters + " ,.'\n-éß漢😀"
    texts = TEXTS + ["".join(random.choice(list(letters), size=60)) for _ in range(200)]
    for text in texts:
        ids = smollm2.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert smollm2.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    messages = [{"role": "user", "content": "hi"}]
    assert smollm2.chat(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert (smollm2.bos_id, smollm2.eos_ids) == (1, {2})


def test_smollm2_cuts_numbers_into_digits(smollm2: Tokenizer) -> None:
    """As its tokenizer.json on the hub does; transformers forgets this when it reads the GGUF file."""
    for text, count in (("12345", 5), ("in 1999 or ½", 9), ("٣٤", 4)):
        assert len(smollm2.encode(text)) == count, text
        assert smollm2.decode(smollm2.encode(text)) == text


# ---- decoding


@settings(max_examples=150, deadline=None)
@given(text=UNICODE)
def test_text_comes_back(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text, add_special=False)
    assert any_tokenizer.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(text=UNICODE, first=st.booleans())
def test_streaming_adds_up_and_never_splits_a_character(
    any_tokenizer: Tokenizer, text: str, first: bool
) -> None:
    ids = any_tokenizer.encode(text, add_special=False)
    detokenizer = any_tokenizer.detokenizer(continues=not first)
    shown = [detokenizer.add(index) for index in ids]
    assert "\ufffd" not in "".join(shown).replace("\ufffd", "", text.count("\ufffd"))
    assert "".join(shown) + detokenizer.finish() == any_tokenizer.decode(ids, continues=not first)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans(), continues=st.booleans())
def test_any_ids_stream_to_what_they_decode_to(
    any_tokenizer: Tokenizer, data: st.DataObject, skip: bool, continues: bool
) -> None:
    """Broken UTF-8 included: half a character, then a special token, then the end."""
    ids = data.draw(st.lists(st.integers(0, min(any_tokenizer.vocab_size, 500) - 1), max_size=30))
    detokenizer = any_tokenizer.detokenizer(continues=continues, skip_special=skip)
    shown = "".join([detokenizer.add(index) for index in ids])
    assert shown + detokenizer.finish() == any_tokenizer.decode(ids, continues=continues, skip_special=skip)
    raw = b"".join(
        any_tokenizer.token_bytes(i) for i in ids if not skip or i not in any_tokenizer.special_ids
    )
    whole = raw.decode("utf-8", "replace")
    if any_tokenizer.strips_first_space and not continues:
        whole = whole.removeprefix(" ")
    assert shown + any_tokenizer.decode([]) == whole[: len(shown)]


def test_an_emoji_shows_when_it_is_whole(byte_level: Tokenizer) -> None:
    detokenizer = byte_level.detokenizer()
    ids = byte_level.encode("a😀b")
    assert [detokenizer.add(index) for index in ids] == ["a", "", "", "", "😀", "b"]
    assert byte_level.token_text(ids[1]) == "\ufffd"


def test_ids_without_a_token_add_nothing(byte_level: Tokenizer) -> None:
    assert byte_level.decode([319, 10**9, -1]) == ""
    assert byte_level.token_id("<|eos|>") == 257
    assert byte_level.token_id("no such token") is None


def test_special_tokens_can_be_left_out(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<|im_start|>the<|im_end|>")
    assert byte_level.decode(ids) == "<|im_start|>the<|im_end|>"
    assert byte_level.decode(ids, skip_special=True) == "the"


# ---- SentencePiece


def test_sentencepiece_vocabularies_cut_as_the_original(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    original = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=sentencepiece_model())
    bare = from_gguf(read_gguf(spm_gguf(tmp_path, space_prefix=False)), 420)
    random = np.random.default_rng(1)
    texts = ["".join(random.choice(list("the catsond .,é漢😀\n"), size=40)) for _ in range(200)]
    for text in [text for text in TEXTS if "\0" not in text and text] + texts:
        ids = sentencepiece.encode(text, add_special=False)
        assert ids == original.encode(text), text
        assert bare.encode(" " + text, add_special=False) == ids, text
        assert sentencepiece.decode(ids) == text


def test_a_space_follows_other_text_and_only_starts_none(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the cat", add_special=False)
    assert sentencepiece.decode(ids) == "the cat"
    assert sentencepiece.decode(ids, continues=True) == " the cat"
    assert sentencepiece.token_text(ids[0]) == " the"


def test_bos_and_eos_follow_the_files_word(tmp_path: Path) -> None:
    default = from_gguf(read_gguf(spm_gguf(tmp_path)), 420)
    assert default.encode("the")[0] == 1 == default.bos_id
    assert default.encode("the", add_special=False)[0] != 1
    without = from_gguf(read_gguf(spm_gguf(tmp_path, **{"ggml.add_bos_token": False})), 420)
    assert without.encode("the") == default.encode("the", add_special=False)
    ending = from_gguf(read_gguf(spm_gguf(tmp_path, **{"ggml.add_eos_token": True})), 420)
    assert ending.encode("the") == [*default.encode("the"), 2]


def test_a_turns_end_ends_the_text_where_the_template_writes_it(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}<end_of_turn>"
    tokenizer = from_gguf(read_gguf(spm_gguf(tmp_path, chat_template=template)), 420)
    assert tokenizer.eos_ids == {2, tokenizer.token_id("<end_of_turn>")}
    assert from_gguf(read_gguf(spm_gguf(tmp_path)), 420).eos_ids == {2}
    assert tokenizer.chat([{"content": "x"}]) == "x<end_of_turn>"


def sentencepiece_directory(path: Path, model: bytes, **settings_: Any) -> Path:
    (path / "tokenizer.model").write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(settings_))
    return path


def test_a_sentencepiece_model_file_reads_as_the_same_vocabulary_in_gguf(
    sentencepiece: Tokenizer, tmp_path: Path
) -> None:
    added = {"420": {"content": "<pad>", "special": True}}
    settings_ = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "added_tokens_decoder": added}
    ours = from_directory(sentencepiece_directory(tmp_path, sentencepiece_model(), **settings_), {}, 421)
    for text in TEXTS:
        assert ours.encode(text) == sentencepiece.encode(text), text
    assert ours.encode("<pad>", add_special=False) == [420]
    assert (ours.bos_id, ours.eos_ids) == (1, {2})


def test_a_unigram_model_file(tmp_path: Path) -> None:
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat, and how are you doing today? fine! 123"] * 20),
        model_writer=model, vocab_size=300, model_type="unigram", byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = from_directory(sentencepiece_directory(tmp_path, model.getvalue()), {}, 400)
    for text in ("the cat", "  spaces  and  more ", "today 42 naïve 😀", "x"):
        assert ours.encode(text, add_special=False) == original.encode(text), text
        assert ours.decode(ours.encode(text, add_special=False)) == text


@pytest.mark.parametrize(
    "model",
    [
        b"", b"\x0a", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\xff" * 40,
        b"\x0a\x05\x0a\x03abc" + b"\x12\x02\x18\x09", b"\x0b", bytes(range(256)),
        b"\x0a\x09\x0a\x03abc\x15\0\0", b"garbage" * 100, b"\x0a\x05\x0a\x03ab\xff",
    ],
)  # fmt: skip
def test_a_broken_sentencepiece_model_is_an_error(model: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        from_directory(sentencepiece_directory(tmp_path, model), {}, 400)


def test_a_protobuf_too_old_for_the_installed_sentencepiece_is_named(tmp_path: Path) -> None:
    package = tmp_path / "sentencepiece"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sentencepiece_model_pb2.py").write_text(
        "from google.protobuf import runtime_version\n"
        "runtime_version.ValidateProtobufRuntimeVersion(runtime_version.Domain.PUBLIC, 99, 1, 0, '', 'x.proto')\n"
    )
    model = sentencepiece_directory(tmp_path, sentencepiece_model())
    code = (
        "import sys, pathlib; from tempo_mlx.weights.tokenizer_files import from_directory\n"
        "from_directory(pathlib.Path(sys.argv[1]), {}, 421)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", code, str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs a newer protobuf" in done.stderr and "pip install --upgrade protobuf" in done.stderr


def test_a_model_with_rewriting_rules_is_refused(tmp_path: Path) -> None:
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 9), model_writer=model, vocab_size=30, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        from_directory(sentencepiece_directory(tmp_path, model.getvalue()), {}, 400)


# ---- tokenizer.json


def test_the_end_of_a_text_may_have_several_tokens(byte_level: Tokenizer) -> None:
    assert byte_level.eos_ids == {257, 259}
    assert byte_level.bos_id == 256


def test_templates_of_every_place(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(twin("llama") / name, tmp_path)
    assert "im_start" in from_directory(tmp_path, {}, 320).chat_templates["default"]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert from_directory(tmp_path, {}, 320).chat_templates == {"tool_use": "T", "default": "D"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert from_directory(tmp_path, {}, 320).chat_templates == {"default": "J"}
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    assert from_directory(tmp_path, {}, 320).chat([]) == "<|bos|>"


def test_without_a_template_chat_says_what_to_do(tmp_path: Path) -> None:
    shutil.copy(twin("llama") / "tokenizer.json", tmp_path)
    tokenizer = from_directory(tmp_path, {"eos_token_id": 7, "bos_token_id": 3}, 320)
    assert not tokenizer.has_chat_template
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (3, {7})
    with pytest.raises(ModelError, match="--raw"):
        tokenizer.chat([])


def test_a_token_that_the_embedding_lacks_is_refused_in_a_prompt(byte_level: Tokenizer) -> None:
    small = Tokenizer(byte_level.backend, vocab_size=200, eos_ids=[257])
    assert small.eos_ids == frozenset()
    with pytest.raises(PromptError, match="im_start"):
        small.encode("<|im_start|>")
    with pytest.raises(PromptError, match="surrogate"):
        small.encode("\ud800")


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    table = json.loads((twin("llama") / "tokenizer.json").read_text())
    table["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    table["padding"] = {"strategy": {"Fixed": 50}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    assert len(from_directory(tmp_path, {}, 320).encode("qwxyz")) == 5


def _normalizer(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(parts)}}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "changes",
    [
        _normalizer(*[_replace({"String": "a"}, "aa")] * 40),
        _normalizer(_replace({"Regex": "."}, "x" * 100_000)),
        _normalizer(*[{"type": "Prepend", "prepend": "ab"}] * 64),
        _normalizer(*[_normalizer(_replace({"String": ""}, "ab"))["normalizer"]] * 30),
        {"decoder": None},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {
            "decoder": {
                "type": "Sequence",
                "decoders": [_replace({"String": "a"}, "b" * 1000), {"type": "Fuse"}],
            }
        },
        {"model": None},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"model": {"type": "Nothing"}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {"added_tokens": [{"id": 2**40, "content": "x"}]},
        {"version": "9.0"},
    ],
)
def test_a_tokenizer_that_is_a_bomb_or_broken_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    table = json.loads((twin("llama") / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**table, **changes}))
    with pytest.raises(ModelError):
        from_directory(tmp_path, {}, 320)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"{}", b"\xff\xfe\0", b'{"a":' * 5000]
)
def test_a_tokenizer_file_that_is_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ModelError):
        from_directory(tmp_path, {}, 320)


def test_a_regular_expression_bomb_ends_in_an_error_or_an_answer(tmp_path: Path) -> None:
    table = json.loads((twin("llama") / "tokenizer.json").read_text())
    bomb = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [bomb, table["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    tokenizer = from_directory(tmp_path, {}, 320)
    try:
        assert tokenizer.decode(tokenizer.encode("x" * 40)) == "x" * 40
    except ModelError as error:
        assert "tokenizer" in str(error)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        from_directory(tmp_path, {}, 320)


# ---- GGUF metadata


def _gguf(directory: Path, **changes: Any) -> Path:
    """A GPT-2 kind of vocabulary in GGUF; changes: metadata keys (None leaves one out)."""
    tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "<|end|>"]
    values: dict[str, Any] = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": ["t h"],
        "token_type": [1] * 257 + [3], "eos_token_id": 257, **changes,
    }  # fmt: skip
    writer = gguf.GGUFWriter(directory / "t.gguf", "llama")
    for key, value in values.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    write(writer)
    return directory / "t.gguf"


@pytest.mark.parametrize("pre", SPLITS)
def test_every_pre_tokenizer_keeps_every_byte(pre: str, tmp_path: Path) -> None:
    tokenizer = from_gguf(read_gguf(_gguf(tmp_path, pre=pre)), 258)
    for text in TEXTS:
        kept = unicodedata.normalize("NFC", text) if pre in COMPOSING else text
        assert tokenizer.decode(tokenizer.encode(text)) == kept
    assert tokenizer.encode("the<|end|>")[-1] == 257


# Pieces as the patterns of each tokenizer's tokenizer.json cut them.
@pytest.mark.parametrize(
    ("pre", "text", "cut"),
    [
        ("gpt-2", "I'll pay 1234!", ["I", "'ll", " pay", " 1234", "!"]),
        ("smollm", "I'll pay 1234!", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "!"]),
        ("llama-bpe", "I'LL pay 1234!\n\n", ["I", "'LL", " pay", " ", "123", "4", "!\n\n"]),
        ("qwen2", "I'LL pay 1234!\n\n", ["I", "'LL", " pay", " ", "1", "2", "3", "4", "!\n\n"]),
        ("tekken", "camelCase 12/", ["camel", "Case", " ", "1", "2", "/"]),
        ("gpt-4o", "It's camelCase 1234/", ["It's", " camel", "Case", " ", "123", "4", "/"]),
        ("default", "I'll pay 1234!", ["I", "'", "ll", " pay", " ", "123", "4", "!"]),
        (None, "It’s 1234567", ["It", "’", "s", " ", "123", "456", "7"]),
        (
            "deepseek-llm",
            "Hé\nyou'll 中文 1234",
            ["H", "é", "\n", "you", "'", "ll", " ", "中文", " ", "1234"],
        ),
        ("deepseek-coder", "x = 12\n中文", ["x", " = ", "1", "2", "\n", "中文"]),
        ("deepseek-v3", "a.b 1234 中文!\n", ["a", ".b", " ", "123", "4", " ", "中文", "!\n"]),
        ("qwen35", "It's cafe\u0301 12", ["It", "'s", " cafe\u0301", " ", "1", "2"]),
        ("qwen2", "cafe\u0301 12", ["cafe", "\u0301", " ", "1", "2"]),
        ("glm4", "I'LL pay 1234", ["I", "'LL", " pay", " ", "123", "4"]),
        ("lfm2", "I'LL pay 1234", ["I", "'LL", " pay", " ", "123", "4"]),
        ("falcon", "a`b 1234", ["a", "`", "b", " ", "123", "4"]),
        ("bloom", "a, b.c", ["a", ",", " b", ".", "c"]),
        ("tiny_aya", "1234567 ab", ["1", "234", "567", " ab"]),
        ("seed-coder", "a!!\n12", ["a", "!!", "\n", "1", "2"]),
        ("exaone-moe", "안녕 하세요 12", ["안녕 하세요", " ", "1", "2"]),
        ("minicpm5", "ab 1234", ["ab", " ", "123", "4"]),
        ("laguna", "ab \n\n c", ["ab", " ", "\n\n", " c"]),
        ("bailingmoe", "a\n\nb", ["a", "\n\n", "b"]),
        ("youtu", "中文ab12", ["中文", "ab", "1", "2"]),
    ],
)
def test_pre_tokenizers_cut_where_they_should(
    pre: str | None, text: str, cut: list[str], tmp_path: Path
) -> None:
    backend = from_gguf(read_gguf(_gguf(tmp_path, pre=pre)), 258).backend
    assert [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)] == cut


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "wordpiece"}, {"model": None}, {"model": 3}, {"pre": "unheard-of"}, {"pre": 7}, {"tokens": None},
        {"tokens": "abc"}, {"tokens": ["a", "a"]}, {"tokens": [f"t{i}" for i in range(300)]}, {"merges": None},
        {"merges": ["th"]}, {"merges": ["t x y"]}, {"merges": [""]}, {"token_type": [1, 2]}, {"token_type": "x"},
        {"model": "llama"}, {"model": "llama", "scores": [float("nan")] * 258}, {"model": "llama", "scores": [1.0]},
        {"eos_token_id": 257, "add_eos_token": 1, "token_type": [1.5] * 3},
    ],
)  # fmt: skip
def test_broken_tokenizer_metadata_is_an_error(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        from_gguf(read_gguf(_gguf(tmp_path, **changes)), 258)


def test_a_piece_that_would_take_forever_is_refused(tmp_path: Path) -> None:
    tokens = ["a", "a" * 5000]
    with pytest.raises(ModelError, match="5000 characters"):
        from_gguf(
            read_gguf(_gguf(tmp_path, model="llama", tokens=tokens, scores=[0.0, 1.0], token_type=[1, 1])),
            258,
        )


def test_ids_outside_the_vocabulary_are_ignored(tmp_path: Path) -> None:
    tokenizer = from_gguf(read_gguf(_gguf(tmp_path, eos_token_id=2**31, bos_token_id=9999)), 258)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, frozenset())


def test_types_match_the_sentencepiece_model() -> None:
    tokens, scores, types = pieces(sentencepiece_model())
    assert (types[0], types[1], types[2]) == (2, 3, 3)
    assert types.count(6) == 256
    assert struct.calcsize("f") == 4 and len(tokens) == len(scores)
