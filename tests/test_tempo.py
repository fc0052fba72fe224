"""The superposed loop and the stream around it: what is run, what is recorded, when it stops."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tempo_mlx.api import generate, stream
from tempo_mlx.decode.combine import log_probabilities
from tempo_mlx.decode.decoder import Setup
from tempo_mlx.decode.tempo import plain, superposed
from tempo_mlx.errors import ConfigError, PromptError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import LoadedModel
from tempo_mlx.model.mlx_backend import build
from tempo_mlx.resolution import resolve
from tempo_mlx.weights import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = 64
PROMPT = [3, 14, 15, 9, 26, 5]


class Pieces:
    """A tokenizer of made-up words, for runs in which the text does not matter."""

    bos_id = None
    eos_ids: frozenset[int] = frozenset()
    has_chat_template = False

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: Any, continues: bool = False) -> str:
        return "".join(f" w{i}" for i in ids)

    def token_text(self, token_id: int) -> str:
        return f" w{token_id}"

    def detokenizer(self) -> Any:
        class Each:
            def add(self, token_id: int) -> str:
                return f" w{token_id}"

            def finish(self) -> str:
                return ""

        return Each()


class Watched:
    """A model that remembers how many rows each forward had, at which positions."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, []
        self.architecture, self.info = model.architecture, model.info
        self.new_cache, self.embeddings = model.new_cache, model.embeddings

    def forward(self, tokens: Any, positions: Any, bias: Any, cache: Any, **rest: Any) -> Any:
        self.calls.append((list(tokens), np.asarray(positions).tolist()))
        return self.model.forward(tokens, positions, bias, cache, **rest)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    twin = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim == 2:
                parameter.mul_(14.0)
    where: Path = tmp_path_factory.mktemp("tempo")
    twin.save_pretrained(where)
    return build(open_checkpoint(str(where)), "auto", "float32")


@pytest.fixture
def loaded(plain_model: Any) -> LoadedModel:
    return LoadedModel(Watched(plain_model), Pieces(), LoadConfig())  # type: ignore[arg-type]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Argmax after argmax, each from a forward pass over everything."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(
            int(model.forward(ids, range(len(ids)), None, model.new_cache(), logits="last").logits.argmax())
        )
    return ids[len(prompt) :]


def test_every_member_is_run_in_one_pass_at_one_position(loaded: LoadedModel) -> None:
    run = generate(loaded, PROMPT, threshold=0.06, max_tokens=12, min_steps=12)
    calls = loaded.model.calls[1:]
    assert loaded.model.calls[0] == (PROMPT, list(range(6)))
    assert max(len(tokens) for tokens, _ in calls) > 1
    assert len(calls) == len(run.steps) - 1  # the last set is recorded, not run
    for (tokens, positions), step in zip(calls, run.steps, strict=False):
        by_slot = sorted((t for t in step.tokens if t.slot is not None), key=lambda t: t.slot)
        assert tokens == [t.id for t in by_slot]
        assert positions == [step.position] * len(tokens)
        assert [t.probability for t in by_slot] == sorted(t.probability for t in by_slot)
    assert [step.position for step in run.steps] == list(range(6, 18))


def test_the_record_adds_up(loaded: LoadedModel) -> None:
    run = generate(loaded, PROMPT, threshold=0.06, max_tokens=12)
    previous: list[int] = []
    for step in run.steps:
        assert step.threshold == 0.06
        assert all(t.probability >= np.float32(0.06) for t in step.tokens[1:])
        assert step.residual_probability == pytest.approx(
            1 - sum(t.probability for t in step.tokens), abs=1e-9
        )
        assert sum(t.weight for t in step.tokens if t.weight is not None) == pytest.approx(1.0)
        for token in step.tokens:
            assert [edge.slot for edge in token.parents] == previous
            assert not previous or sum(edge.posterior for edge in token.parents) == pytest.approx(1.0)
        previous = sorted(t.slot for t in step.tokens if t.slot is not None)


@pytest.mark.parametrize(
    "settings", [{"threshold": 1.0}, {"max_parallel_tokens": 1}, {"temperature": 0.0},
                 {"decoder": "plain", "temperature": 0.0}]
)  # fmt: skip
def test_width_one_is_greedy_decoding(loaded: LoadedModel, settings: Any) -> None:
    run = generate(loaded, PROMPT, max_tokens=20, min_steps=20, **settings)
    ids = [step.tokens[0].id for step in run.steps]
    logits = greedy(loaded.model.model, PROMPT, 20)
    assert all(len(step.tokens) == 1 for step in run.steps)
    assert ids == logits


def test_plain_decoding_samples_at_the_temperature(loaded: LoadedModel) -> None:
    """The share of each first token over many seeds is its probability, to within four standard errors."""
    model, temperature = loaded.model.model, 1.5
    logits = model.forward(PROMPT, range(6), None, model.new_cache(), logits="last").logits
    wanted = np.exp(log_probabilities(logits, temperature))[0]
    start = plain(Setup(model, PROMPT, resolve({"decoder": "plain", "temperature": temperature})))
    draws = []
    for seed in range(2000):
        state = start.copy()
        state.config = replace(start.config, seed=seed)
        draws.append(int(state.select(wanted)[0]))
    share = np.bincount(draws, minlength=VOCABULARY) / 2000
    assert (abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 2000) + 1e-3).all()
    runs = [generate(loaded, PROMPT, decoder="plain", max_tokens=8, seed=s) for s in (1, 1, 2, 3)]
    texts = {run.final_text for run in runs}
    assert {step.threshold for step in runs[0].steps} == {None}  # no token was held against one
    assert 1 < len(texts) <= 3  # the same seed gives the same text


def test_each_step_draws_the_next_number_of_the_seed(loaded: LoadedModel) -> None:
    """As one generator would give them, whichever step is asked for."""
    config = resolve({"decoder": "plain", "seed": 5})
    decoder = plain(Setup(loaded.model, [1, 2, 3], config))
    numbers = np.random.default_rng(5).random(6).tolist()
    assert [decoder.place(index) for index in (3, 0, 1, 2, 5, 4)] == [numbers[i] for i in (3, 0, 1, 2, 5, 4)]


def test_temperature_zero_records_probabilities_at_one(loaded: LoadedModel) -> None:
    cold = generate(loaded, PROMPT, temperature=0.0, max_tokens=1).steps[0].tokens[0]
    warm = generate(loaded, PROMPT, threshold=1.0, max_tokens=1).steps[0].tokens[0]
    assert (cold.id, cold.probability) == (warm.id, warm.probability)


def end_token(loaded: LoadedModel, **settings: Any) -> LoadedModel:
    """The same model with a tokenizer whose end of text is the likeliest token of step 3."""
    steps = generate(loaded, PROMPT, max_tokens=4, **settings).steps
    tokenizer = Pieces()
    tokenizer.eos_ids = frozenset({steps[3].tokens[0].id})
    return replace(loaded, tokenizer=tokenizer)  # type: ignore[arg-type]


def test_the_run_ends_with_the_likeliest_end_of_text(loaded: LoadedModel) -> None:
    ending = end_token(loaded, threshold=1.0)
    run = generate(ending, PROMPT, threshold=1.0, max_tokens=20)
    last = run.steps[-1].tokens[0]
    assert run.finish_reason == "stop"
    assert last.id in ending.tokenizer.eos_ids and last.slot is None and last.weight is None
    assert last.parents and sum(e.posterior for e in last.parents) == pytest.approx(1.0)
    assert f"w{last.id}" not in run.text


def test_min_steps_makes_ends_of_text_ineligible_and_renormalises_nothing(loaded: LoadedModel) -> None:
    ending = end_token(loaded, threshold=1.0)
    stop = len(generate(ending, PROMPT, threshold=1.0, max_tokens=20).steps)
    longer = generate(ending, PROMPT, threshold=1.0, max_tokens=20, min_steps=stop + 2)
    assert len(longer.steps) > stop
    instead = longer.steps[stop - 1].tokens[0]
    assert instead.id not in ending.tokenizer.eos_ids
    assert instead.probability <= 0.5  # its own share, below that of the end of text


def test_a_member_that_ends_the_text_has_no_row(loaded: LoadedModel) -> None:
    steps = generate(loaded, PROMPT, threshold=0.06, max_tokens=12, min_steps=12).steps
    wide = next(s for s in steps[1:-1] if len(s.tokens) > 1)
    tokenizer = Pieces()
    tokenizer.eos_ids = frozenset({wide.tokens[1].id})
    ending = replace(loaded, tokenizer=tokenizer)  # type: ignore[arg-type]
    loaded.model.calls.clear()
    run = generate(ending, PROMPT, threshold=0.06, max_tokens=12)
    member = next(t for s in run.steps for t in s.tokens if t.id in tokenizer.eos_ids)
    assert member.slot is None and member.weight is None and member.parents
    assert all(wide.tokens[1].id not in tokens for tokens, _ in loaded.model.calls[1:])


def test_an_end_that_is_not_the_likeliest_token_ends_nothing(loaded: LoadedModel) -> None:
    config = resolve({"threshold": 0.02, "max_parallel_tokens": 4})
    members = [token.id for token in superposed(Setup(loaded.model, PROMPT, config)).advance().tokens]
    assert len(members) > 1
    for end, finished in ((members[-1], False), (members[0], True)):
        state = superposed(Setup(loaded.model, PROMPT, config, eos_ids=frozenset([end])))
        assert [token.id for token in state.advance().tokens] == members
        assert state.finished is finished


def test_stop_strings_are_matched_in_the_likeliest_reading(loaded: LoadedModel) -> None:
    reading = generate(loaded, PROMPT, threshold=0.06, max_tokens=10, min_steps=10).final_text.split()
    run = generate(loaded, PROMPT, threshold=0.06, max_tokens=10, stop=[reading[4] + " " + reading[5]])
    assert run.finish_reason == "stop" and len(run.steps) < 10
    assert reading[5] not in run.final_text.split()[4:]


def test_the_context_is_a_limit(loaded: LoadedModel) -> None:
    with pytest.raises(PromptError, match="64 tokens and the model's context is 64"):
        list(stream(loaded, [1] * 64))
    with pytest.raises(PromptError, match="empty"):
        list(stream(loaded, []))
    run = generate(loaded, [1] * 60, max_tokens=30, threshold=1.0, min_steps=30)
    assert run.finish_reason == "length" and run.steps[-1].position == 63


def test_limits_end_a_run_and_keep_it(loaded: LoadedModel) -> None:
    run = generate(loaded, PROMPT, threshold=0.06, max_tokens=30, min_steps=30, max_cache_tokens=12)
    rows = 6 + sum(len(call[0]) for call in loaded.model.calls[-len(run.steps) + 1 :])
    assert run.finish_reason == "memory" and 0 < len(run.steps) < 30 and rows <= 12
    late = generate(loaded, PROMPT, max_tokens=30, timeout=1e-9)
    assert late.finish_reason == "timeout" and not late.steps


def test_a_member_that_ends_the_text_takes_no_slot_of_the_limit() -> None:
    from tests.small import PROMPT, small

    whole = {"threshold": 0.0, "max_parallel_tokens": 8, "max_tokens": 2, "max_cache_tokens": len(PROMPT) + 7}
    run = generate(small(8), PROMPT, **whole)
    assert [len(step.tokens) for step in run.steps] == [8, 8]


def test_cancelling_keeps_what_there_is(loaded: LoadedModel) -> None:
    decoding = stream(loaded, PROMPT, max_tokens=30, threshold=0.06, min_steps=30)
    next(decoding), next(decoding)
    assert decoding.run().finish_reason == "cancelled"
    decoding.cancel()
    assert list(decoding) == []
    run = decoding.run()
    assert run.finish_reason == "cancelled" and len(run.steps) == 2
    whole = generate(loaded, PROMPT, max_tokens=30, threshold=0.06, min_steps=30)
    assert [t.id for t in run.steps[1].tokens] == [t.id for t in whole.steps[1].tokens]


def test_interruption_reaches_into_the_prompt(loaded: LoadedModel) -> None:
    decoding = stream(loaded, PROMPT, interrupted=lambda: "cancelled" if loaded.model.calls else None)
    list(decoding)
    assert decoding.finish_reason == "cancelled" and len(loaded.model.calls) == 1


def test_a_copied_state_decodes_on_its_own(loaded: LoadedModel) -> None:
    config = resolve({"threshold": 0.06, "use_retroactive_pruning": True, "posterior_threshold": 0.3})
    state = superposed(Setup(loaded.model, PROMPT, config))
    for _ in range(5):
        state.advance()
    other = state.copy()
    ahead = [[t.id for t in state.advance().tokens] for _ in range(5)]
    assert [[t.id for t in other.advance().tokens] for _ in range(5)] == ahead
    assert state.lattice.slots.tolist() == other.lattice.slots.tolist()
    assert len(other.steps) == 10 and other.steps[6] is not state.steps[6]


def test_a_run_reproduces_itself_from_its_config(loaded: LoadedModel) -> None:
    run = generate(loaded, PROMPT, threshold=0.06, max_tokens=12, attend="weighted", temperature=0.8)
    config = pickle.loads(pickle.dumps(resolve({}))).__class__(**run.config)
    decoding = stream(loaded, PROMPT, config)
    list(decoding)
    again = decoding.run()
    assert again.steps == run.steps and again.config == run.config


def test_settings_that_do_nothing_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="combine"):
        generate(loaded, PROMPT, decoder="plain", combine="max")
    with pytest.raises(ConfigError, match=r"thresold.*threshold"):
        generate(loaded, PROMPT, thresold=0.1)
    with pytest.raises(ConfigError, match="threshold"):
        generate(loaded, PROMPT, threshold=1.5)
