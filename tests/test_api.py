"""The Python API: names, typed keywords, texts of steps, messages, conversations, threads, and what is refused."""

from __future__ import annotations

import asyncio
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tempo_mlx
from tempo_mlx.config import GenerateConfig, as_dict
from tempo_mlx.decode import score as scoring
from tempo_mlx.decode import width
from tempo_mlx.errors import ConfigError, ModelError, OutputError, PromptError, RunFileError, TempoError
from tempo_mlx.keywords import DecoderName, GenerateSettings, LoadSettings
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.loading import LoadedModel
from tempo_mlx.report.run import Run
from tempo_mlx.resolution import Shortcuts
from tempo_mlx.sessions.conversation import Conversation
from tempo_mlx.settings import settings_of, spellings
from tests.runs import WORDS, make_run, members, sky_run, step
from tests.twins import twin

ROOT = Path(__file__).parents[1]


def three(probabilities: Any, step: int) -> Any:
    """The best three characters of ASCII, so that every token is text of its own."""
    return np.argsort(-probabilities[:94])[:3]


SETTINGS: dict[str, Any] = {"max_tokens": 6, "min_steps": 6, "threshold": 0.02}
ASCII: dict[str, Any] = {"max_tokens": 6, "min_steps": 6, "select": three}
PROMPT = "Once upon a time"
QUESTION = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tempo_mlx.load(twin("llama"), device="cpu")  # a Path, as it is


# Names


def test_dir_lists_the_names_and_the_version() -> None:
    assert dir(tempo_mlx) == sorted(tempo_mlx.__all__)
    assert {"load", "generate", "stream", "score", "Conversation", "Run", "TempoError"} < set(dir(tempo_mlx))
    assert tempo_mlx.__version__ == runpy.run_path(str(ROOT / "tempo_mlx" / "_version.py"))["__version__"]


def test_importing_the_package_loads_no_tensor_library() -> None:
    code = "import sys, tempo_mlx; dir(tempo_mlx); print([m for m in ('numpy', 'mlx') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Keywords


def test_the_keywords_are_what_the_tables_say() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_keywords.py"))
    assert script["FILE"].read_text("utf-8") == script["keywords"](), "run: make docs"


def test_every_spelling_of_every_setting_is_a_keyword() -> None:
    known = {**settings_of(GenerateConfig), **settings_of(Shortcuts)}
    assert {*GenerateSettings.__annotations__, "decoder"} == set(spellings(known))
    assert {*LoadSettings.__annotations__, "model"} == set(spellings(settings_of(LoadConfig)))
    assert set(DecoderName.__args__) == set(known["decoder"].choices)


RIGHT = """
import tempo_mlx
model = tempo_mlx.load("a", device="cpu", kv_bits=4)
run = tempo_mlx.generate(model, "Hi", threshold=0.1, stop=["."], branches=3, decoder="tree", preset="plain")
for step in tempo_mlx.stream(model, [{"role": "user", "content": "Hi"}], max_parallel_tokens="auto"):
    print(step.text, step.best_text, step.tokens[0].text)
tempo_mlx.Session(model).generate([1, 2, 3], system=None)
tempo_mlx.Conversation(model, temperature=0).ask("Hi", seed=3)
print([text.share for text in run.texts], [fork.alternatives for fork in run.phrases], tempo_mlx.__version__)
"""
WRONG = {
    "generate(model, 'Hi', thresold=0.1)": 'Unexpected keyword argument "thresold" for "generate"; did you mean',
    "stream(model, 'Hi', max_token=3)": 'Unexpected keyword argument "max_token" for "stream"',
    "load('a', devise='cpu')": 'Unexpected keyword argument "devise" for "load"',
    "load('a', dtype='float64')": "incompatible type",
    "generate(model, 'Hi', attend='some')": "incompatible type",
    "generate(model, 'Hi', decoder='treee')": "incompatible type",
    "generate(model, 'Hi', max_tokens='3')": "incompatible type",
    "generate('a', 'Hi')": "incompatible type",
    "Session(model).stream('Hi', thresold=0.1)": 'Unexpected keyword argument "thresold" for "stream"',
    "Conversation(model).ask('Hi', thresold=0.1)": 'Unexpected keyword argument "thresold" for "ask"',
}


@pytest.mark.slow
def test_a_type_checker_knows_the_keywords(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(RIGHT)
    calls = [f"tempo_mlx.{call}" if not call.startswith("tempo") else call for call in WRONG]
    (tmp_path / "wrong.py").write_text(
        "\n".join(["import tempo_mlx", "model = tempo_mlx.load()", *calls, ""])
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--no-error-summary"]
    paths = [str(tmp_path / "right.py"), str(tmp_path / "wrong.py")]
    said = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [line for line in said.splitlines() if ": error:" in line]
    assert not [line for line in lines if "right.py" in line]
    for number, (call, words) in enumerate(WRONG.items(), 3):
        assert [line for line in lines if f"wrong.py:{number}:" in line and words in line], (call, said)


# Texts


def test_a_stream_gives_its_steps_their_texts(model: LoadedModel) -> None:
    decoding = tempo_mlx.stream(model, PROMPT, **ASCII)
    texts, best = [], ""
    for one in decoding:
        assert all(member.text == model.tokenizer.token_text(member.id) for member in one.tokens[1:])
        texts.append(one.text)
        best += one.best_text
        assert one.best_text == one.tokens[0].text
    assert any("[" in text and "/" in text for text in texts)
    run = decoding.run()
    assert "".join(step.text for step in decoding.steps) == run.text
    assert best == "".join(step.best_text for step in decoding.steps)
    plain = tempo_mlx.stream(model, PROMPT, decoder="plain", max_tokens=6)
    assert "".join(step.best_text for step in plain) == plain.run().final_text


def test_a_step_that_loses_a_member_says_so(model: LoadedModel) -> None:
    """Its text is made anew, so that texts joined are always the run's."""
    decoding = tempo_mlx.stream(
        model, PROMPT, **ASCII, prune=lambda context: [
            entry for view in context.sets for entry in view.under(view.posterior, view.posterior.max(), "mine")
        ]
    )  # fmt: skip
    first = [(one, one.text) for one in decoding]
    assert any(one.text != before for one, before in first)
    assert "".join(one.text for one, _ in first) == decoding.run().text


def test_a_token_that_ends_the_text_has_no_text_to_print() -> None:
    assert make_run([step(0, members({0: 0.9, 1: 0.1}, 3))]).steps[0].best_text == ""
    assert make_run([step(0, members({1: 0.9, 0: 0.1}, 3))]).steps[0].best_text == WORDS.token_text(1)


def test_a_run_shows_itself_in_a_line() -> None:
    run = sky_run()
    assert repr(run).startswith(f"<Run superposed, {len(run.steps)} steps, {run.finish_reason}: '")
    assert "\n" not in repr(run) and len(repr(run)) < 160


@pytest.mark.parametrize("settings", [{"branches": 3}, {"decoder": "sample", "beam_width": 3}, {"paths": 2}])
def test_a_run_of_several_texts_lists_them_with_shares(model: LoadedModel, settings: dict[str, Any]) -> None:
    run = tempo_mlx.generate(model, PROMPT, max_tokens=5, threshold=0.02, **settings)
    assert {text.text for text in run.texts} == {path.text for path in run.paths}
    assert sum(text.share for text in run.texts) == pytest.approx(1)
    weight = {text.text: 0.0 for text in run.texts}
    for path in run.paths:
        weight[path.text] += float(np.exp(path.logprob))
    total = sum(weight.values())
    assert [text.share for text in run.texts] == pytest.approx(
        [weight[text.text] / total for text in run.texts]
    )
    assert [text.share for text in run.texts] == sorted((text.share for text in run.texts), reverse=True)


# Messages


def test_messages_are_a_prompt_wherever_one_is_taken(model: LoadedModel) -> None:
    told = tempo_mlx.generate(model, "Hello", chat=True, max_tokens=3)
    for run in (
        tempo_mlx.generate(model, QUESTION, max_tokens=3),
        tempo_mlx.generate(model, QUESTION, GenerateConfig(chat=True, max_tokens=3)),
        tempo_mlx.Session(model).generate(QUESTION, max_tokens=3),
    ):
        assert run.prompt == told.prompt and run.config["chat"] and run.text == told.text
    longer = [{"role": "system", "content": "Brief."}, *QUESTION]
    assert tempo_mlx.generate(model, QUESTION, system="Brief.", max_tokens=1).prompt == (
        tempo_mlx.generate(model, longer, max_tokens=1).prompt
    )
    (one,) = tempo_mlx.score(model, QUESTION, [" world"])
    (other,) = tempo_mlx.score(model, told.prompt.token_ids, [" world"])
    assert one == other


# Conversations


def test_a_conversation_remembers_and_forgets(model: LoadedModel) -> None:
    talk = Conversation(model, system="Be brief.", **SETTINGS)
    first = talk.ask("Hello")
    assert first.prompt.text.startswith("<|im_start|>system\nBe brief.") and first.config["max_tokens"] == 6
    second = talk.ask("And then?", max_tokens=7)
    assert first.final_text in second.prompt.text and len(second.steps) == 7
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[3]["content"] == second.final_text
    again = talk.again(max_tokens=7)
    assert again.text == second.text and len(talk.messages) == 4
    with pytest.raises(ConfigError, match="top_kk"):
        talk.again(top_kk=7)  # type: ignore[call-arg]
    assert talk.messages[3]["content"] == second.final_text
    assert talk.undo() == "And then?" and talk.messages[1]["content"] == first.final_text
    assert repr(talk) == f"<Conversation of 1 turns with {twin('llama')}>"
    assert talk.undo() == "Hello" and talk.undo() is None
    with pytest.raises(PromptError, match="ask something first"):
        talk.again()


def test_an_answer_that_is_streamed_is_kept_when_it_is_said_to_be(model: LoadedModel) -> None:
    talk = Conversation(tempo_mlx.Session(model), branches=3, threshold=0.01, max_tokens=4)
    answer = talk.stream("Hello")
    next(answer)
    assert talk.messages == []
    answer.cancel()
    run = talk.keep(answer.run())
    assert run.finish_reason == "cancelled" and talk.messages[1]["content"] == run.final_text
    talk.undo()
    run = talk.stream("Hello").complete()
    talk.keep(run, run.texts[1].text)
    assert talk.messages[1]["content"] == run.texts[1].text != run.final_text
    talk.reset()
    plain = talk.ask("Hello", decoder="plain")  # what it has no use for is dropped
    assert plain.decoder == "plain" and talk.settings.decoder == "tree"


def test_a_conversation_is_saved_and_loaded(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk = Conversation(model, system="Be brief.", **SETTINGS)
    talk.ask("Grüß dich")
    talk.save(path)
    again = Conversation.load(model, path)
    assert again.messages == talk.messages and again.settings == talk.settings
    assert "Grüß dich" in path.read_text("utf-8")
    Conversation(model, GenerateConfig(decoder="plain", threshold=0.5, seed=7)).save(path)  # of no use to it
    assert Conversation.load(model, path).settings == GenerateConfig(decoder="plain", chat=True, seed=7)
    for content in (
        "{",
        "[]",
        '{"format": "tempo-mlx/run"}',
        '{"format": "tempo-mlx/conversation", "version": 2}',
    ):
        path.write_text(content)
        with pytest.raises(PromptError, match="holds no conversation of version 1"):
            Conversation.load(model, path)
    with pytest.raises(OutputError):
        talk.save(tmp_path / "none" / "talk.json")


@pytest.mark.parametrize("decoder", ["plain", "tree", "mcts"])
def test_a_stream_that_raised_has_ended(model: LoadedModel, decoder: Any) -> None:
    def fails_later(ids: Any, logits: Any) -> Any:
        if len(ids) >= len(decoding.prompt.token_ids) + 3:
            raise ZeroDivisionError
        return logits

    settings: dict[str, Any] = {"max_tokens": 6, "min_steps": 6, "logits_processors": [fails_later]}
    decoding = tempo_mlx.stream(model, PROMPT, decoder=decoder, **settings)
    with pytest.raises(ZeroDivisionError):
        list(decoding)
    made = len(decoding.steps)
    assert next(decoding, None) is None and len(decoding.steps) == made
    run = decoding.run()
    assert run.finish_reason == "cancelled" and len(run.steps) == made


# Threads and asyncio


def test_streams_of_several_threads_give_what_each_would_alone(model: LoadedModel) -> None:
    prompts = [f"{PROMPT}{number}" for number in range(6)]
    alone = [tempo_mlx.generate(model, prompt, **SETTINGS).text for prompt in prompts]
    together: dict[str, str] = {}

    def go(prompt: str) -> None:
        together[prompt] = tempo_mlx.generate(model, prompt, **SETTINGS).text

    threads = [threading.Thread(target=go, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[prompt] for prompt in prompts] == alone


def test_a_model_that_was_just_loaded_runs_in_another_thread() -> None:
    """MLX cannot compute in one thread what was put off in another."""
    fresh, runs = tempo_mlx.load(str(twin("llama")), device="cpu"), []
    thread = threading.Thread(target=lambda: runs.append(tempo_mlx.generate(fresh, PROMPT, **SETTINGS)))
    thread.start()
    thread.join()
    assert runs[0].text == tempo_mlx.generate(fresh, PROMPT, **SETTINGS).text


def test_threads_take_turns_at_a_model(model: LoadedModel) -> None:
    decoding = tempo_mlx.stream(model, PROMPT, **SETTINGS)
    waiting = threading.Thread(target=next, args=(decoding,))
    with model.lock:
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and not decoding.steps
    waiting.join(60)
    assert len(decoding.steps) == 1


@pytest.mark.parametrize("call", ["score", "stream"])
def test_what_else_computes_waits_for_its_turn(
    model: LoadedModel, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(scoring, "score_sequences", lambda *_, **__: ran.append("score") or [np.zeros(1)])
    monkeypatch.setattr(width, "row_costs", lambda _: ran.append("stream") or {1: 1.0, 2: 3.0})
    calls = {
        "score": lambda: tempo_mlx.score(model, PROMPT, ["."]),
        "stream": lambda: tempo_mlx.stream(model, PROMPT, max_parallel_tokens="auto"),
    }
    waiting = threading.Thread(target=calls[call])
    with model.lock:
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and not ran
    waiting.join(60)
    assert ran == [call]


def test_a_stream_is_an_asynchronous_iterator(model: LoadedModel) -> None:
    alone = tempo_mlx.generate(model, PROMPT, **ASCII)

    async def main() -> tuple[str, str, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(tick())
        decodings = [tempo_mlx.stream(model, PROMPT, **ASCII) for _ in range(2)]

        async def read(decoding: tempo_mlx.Stream) -> str:
            return "".join([step.text async for step in decoding])

        one, other = await asyncio.gather(*map(read, decodings))
        beside.cancel()
        return one, other, ticks

    one, other, ticks = asyncio.run(main())
    assert one == other == alone.text and ticks > 6


def test_cancelling_the_task_ends_the_run(model: LoadedModel) -> None:
    decoding = tempo_mlx.stream(model, PROMPT, max_tokens=100, min_steps=100)

    async def main() -> None:
        async def read() -> None:
            async for _ in decoding:
                pass

        task = asyncio.create_task(read())
        while len(decoding.steps) < 2 and not task.done():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert next(decoding, None) is None and decoding.finish_reason == "cancelled"
    assert 2 <= len(decoding.run().steps) < 100


# What is refused

generate = tempo_mlx.generate


def none(*_: object) -> Any:
    return None


BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("no model", lambda m: generate(None, "Hi"), {}, "None is no model; give what tempo_mlx.load"),
    ("a name", lambda m: generate("smollm2-135m", "Hi"), {}, r"give tempo_mlx.load\('smollm2-135m'\)"),
    ("a session of a name", lambda m: tempo_mlx.Session("qwen"), {}, r"give tempo_mlx.load\('qwen'\)"),
    ("a talk of a name", lambda m: tempo_mlx.Conversation("qwen"), {}, r"give tempo_mlx.load\('qwen'\)"),
    ("a score of a name", lambda m: tempo_mlx.score("qwen", "Hi", ["."]), {}, r"give tempo_mlx.load\('qwen'\)"),
    ("load a number", lambda m: tempo_mlx.load(5), {}, "model is 5; choose text"),
    ("load a typo", lambda m: tempo_mlx.load("a", devise="cpu"), {}, "devise is not a setting; did you mean device"),
    ("no prompt", lambda m: generate(m, None), {}, "The prompt must be text or token ids, not null"),
    ("bytes", lambda m: generate(m, b"Hi"), {}, "The prompt must be text or token ids"),
    ("texts", lambda m: generate(m, ["a", "b"]), {}, "The prompt holds text at place 0; token ids are"),
    ("a dict", lambda m: generate(m, {"role": "user"}), {}, "must be text or token ids, not an object"),
    ("no ids", lambda m: generate(m, []), {}, "prompt is empty"),
    ("no content", lambda m: generate(m, [*QUESTION, {"role": "user"}]), {}, "Message 2 is .* a content"),
    ("a message of none", lambda m: generate(m, [*QUESTION, None]), {}, "Message 2 is None; give it a role"),
    ("messages raw", lambda m: generate(m, QUESTION, chat=False), {}, "leave out chat=False"),
    ("messages by config", lambda m: generate(m, QUESTION, GenerateConfig()), {}, "a config says chat=True"),
    ("config a dict", lambda m: generate(m, "Hi", {"seed": 1}), {}, r"config is .'seed': 1.; .*\*\*a_dict"),
    ("config twice", lambda m: generate(m, "Hi", GenerateConfig(), seed=1), {}, "leave out seed, or it"),
    ("a typo", lambda m: generate(m, "Hi", thresold=0.1), {}, "did you mean threshold"),
    ("decoder 5", lambda m: generate(m, "Hi", decoder=5), {}, "decoder is 5; choose superposed"),
    ("a message of bytes", lambda m: Conversation(m).ask(b"Hi"), {}, "The message is b'Hi'; give a text"),
    ("an empty message", lambda m: Conversation(m).ask("  "), {}, "give a text that says something"),
    ("prune a name", generate, {"prune": "posterior"}, "prune is 'posterior'; give a function"),
    ("prune none", generate, {"prune": none}, "prune function returned None at step 0; it must return Pruned"),
    ("prune texts", generate, {"prune": lambda c: ["a"]}, r"prune function returned \['a'\]"),
    ("select none", generate, {"select": none}, "select function returned None at step 0; it must return token"),
    ("select text", generate, {"select": lambda p, s: "ab"}, "select function returned 'ab'"),
    ("schedule none", generate, {"schedule": none}, "schedule function returned None at step 0; .* from 0 to 1"),
    ("schedule 7", generate, {"schedule": lambda s: 7}, "schedule function returned 7"),
    ("value none", generate, {"value": none, "decoder": "mcts"}, "value function returned None; .* finite"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "keywords", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_wrong_argument_is_told_what_to_pass(
    model: LoadedModel, call: Any, keywords: dict[str, Any], words: str
) -> None:
    with pytest.raises(TempoError, match=words) as problem:
        call(model, PROMPT, threshold=0.02, max_tokens=4, **keywords) if keywords else call(model)
    assert isinstance(problem.value, ConfigError | PromptError | ModelError)
    assert str(problem.value).count("\n") == 0


def test_settings_that_are_not_at_their_defaults_make_the_same_configuration() -> None:
    from tempo_mlx.resolution import resolve
    from tempo_mlx.sessions.conversation import changed

    cases: list[dict[str, Any]] = [
        {}, {"branches": 3}, {"preset": "original"}, {"stop": ["a"], "chat": True, "system": "x"},
        {"threshold": 0.1, "top_p": 0.9}, {"decoder": "enumerate", "merge_length": 3},
    ]  # fmt: skip
    for given in cases:
        config = resolve(given)
        assert resolve(changed(config)) == config
        assert set(changed(config)) <= set(as_dict(config))


def test_a_run_file_says_what_is_wrong_with_it() -> None:
    for text in (None, 5):
        with pytest.raises(RunFileError, match=f"{text} is no run file; give its text"):
            Run.from_json(text)
