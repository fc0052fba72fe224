"""Small runs made by hand, for tests of everything that reads a run."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from tempo_mlx.decode.step import Edge, Member, Rejected, Removal, Step
from tempo_mlx.report.build import build_run
from tempo_mlx.report.records import RunPath, RunPrompt
from tempo_mlx.report.run import Run

EOS = 0


class ByteTokenizer:
    """Token i is `pieces[i]`, bytes that need not be whole characters."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def token_text(self, token_id: int) -> str:
        return self.pieces[token_id].decode("utf-8", "replace")

    def detokenizer(self, *, continues: bool = False) -> ByteDetokenizer:
        return ByteDetokenizer(self.pieces)


class ByteDetokenizer:
    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def open(self) -> bool:
        return bool(self.decoder.getstate()[0])

    def add(self, token_id: int) -> str:
        return self.decoder.decode(self.pieces[token_id])

    def finish(self) -> str:
        return self.decoder.decode(b"", True)


WORDS = ByteTokenizer(
    [
        b"<eos>",
        b" was",
        b" is",
        b" blue",
        b" clear",
        b" today",
        b".",
        b"ish",
        b"\n",
        b"\xe2\x82",
        b"\xac",
        b" \xe2",
    ]
)


def members(
    words: Mapping[int, float], first_slot: int, parents: Sequence[int] = (), **forward: Any
) -> list[Member]:
    """A set from token id -> probability (best first): slots ascend with probability, each parent an edge.

    forward: P(j|i) by token id as `t3=[...]`, in parent order; 1/2 where it is not given.
    """
    mass = sum(p for token, p in words.items() if token != EOS)
    count = sum(token != EOS for token in words)
    result = []
    for token, probability in words.items():
        edges = tuple(
            Edge(slot, 1.0 / len(parents), forward.get(f"t{token}", [0.5] * len(parents))[index])
            for index, slot in enumerate(parents)
        )
        if token == EOS:
            result.append(Member(token, probability, None, None, edges))
        else:
            count -= 1
            result.append(Member(token, probability, first_slot + count, probability / mass, edges))
    return result


def step(index: int, tokens: list[Member], prompt_length: int = 3, rejected: Sequence[Rejected] = ()) -> Step:
    residual = 1.0 - sum(token.probability for token in tokens)
    return Step(index, prompt_length + index, 0.1, residual, tuple(tokens), tuple(rejected))


def sky_steps() -> list[Step]:
    """` [was/is] [blue/clear/ish] today [./<eos>]`, clear removed by its posterior, a candidate rejected."""
    first = members({1: 0.5, 2: 0.4}, 3)
    second = members({3: 0.5, 4: 0.25, 7: 0.125}, 5, [3, 4], t3=[0.6, 0.1], t4=[0.1, 0.9], t7=[0.2, 0.1])
    second[1].removed_after, second[1].removed_why = 2, Removal("posterior", 0.06, 0.1)
    second[1].posterior = 0.06
    third = members({5: 0.9}, 8, [5, 6, 7], t5=[0.1, 0.2, 0.9])
    last = members({6: 0.6, EOS: 0.3}, 9, [8])
    return [
        step(0, first),
        step(1, second, rejected=[Rejected(8, 0.11, "diversity")]),
        step(2, third),
        step(3, last),
    ]


def make_run(steps: Sequence[Step], tokenizer: ByteTokenizer = WORDS, **changes: Any) -> Run:
    arguments: dict[str, Any] = {
        "prompt": RunPrompt("The sky", (11, 12, 13)),
        "model_info": {"id": "tiny", "sha256": "00", "family": "llama", "dtype": "float32"},
        "config": {"attend": "lineage", "stop": [], "temperature": 1.0},
        "tokenizer": tokenizer,
        "decoder": "superposed",
        "finish_reason": "length",
        "timing": {"prefill_seconds": 0.1, "decode_seconds": 0.4, "tokens_per_second": 10.0},
        **changes,
    }
    return build_run(steps, **arguments)


def sky_run(**changes: Any) -> Run:
    return make_run(sky_steps(), paths=[RunPath((1, 3, 5, 6), " was blue today.", -3.25, True)], **changes)
