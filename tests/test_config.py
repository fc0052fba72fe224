"""The settings table and what follows from it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tempo_mlx.config import USES, GenerateConfig, as_dict
from tempo_mlx.decode.registry import DECODERS
from tempo_mlx.errors import ConfigError
from tempo_mlx.load_config import LoadConfig
from tempo_mlx.output_config import OutputConfig
from tempo_mlx.resolution import SWITCHES, Shortcuts, resolve, upgrade
from tempo_mlx.settings import by_audience, settings_of
from tempo_mlx.sources import load_settings

ATTENTION = {"pruning_signal": "attention"}


def changed(**given: object) -> dict[str, object]:
    """What `resolve(given)` sets to something else than its default."""
    default = as_dict(GenerateConfig())
    return {name: value for name, value in as_dict(resolve(given)).items() if value != default[name]}


def test_a_resolved_configuration_reproduces_itself() -> None:
    for given in (
        {},
        {"branches": 3},
        {"preset": "original"},
        {"attention_threshold": 0.02},
        {"stop": ["a", "b"]},
    ):
        config = resolve(given)
        stored = json.loads(json.dumps(as_dict(config)))
        assert GenerateConfig(**stored) == config
        assert resolve(stored) == config
        assert pickle.loads(pickle.dumps(config)) == config


def test_config_imports_no_tensor_library() -> None:
    code = "import sys, tempo_mlx.config; print([m for m in ('numpy', 'mlx', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"default_mode": True}, {"decoder": "plain"}),
        ({"use_mcts": True, "mcts_depth": 3}, {"decoder": "mcts", "mcts_depth": 3}),
        ({"branches": 3}, {"decoder": "tree", "branches": 3}),
        ({"decoder": "tree", "branches": 5}, {"decoder": "tree"}),
        ({"preset": "plain"}, {"decoder": "plain"}),
        ({"preset": "branches"}, {"decoder": "tree"}),
        ({"preset": "branches", "decoder": "superposed"}, {}),
        (
            {"preset": "original", "combine": "mean"},
            {"attend": "all", "combine": "mean", **ATTENTION},
        ),
        ({"preset": "original", "decoder": "plain"}, {"decoder": "plain"}),
        (
            {"attention_threshold": 0.02},
            {"attention_threshold": 0.02, **ATTENTION},
        ),
        (
            {"attention_threshold": 0.02, "use_pruning": True},
            {"attention_threshold": 0.02, "pruning_strategy": "hybrid", **ATTENTION},
        ),
        ({"top_p": 0.8}, {"selection": "top-p", "top_p": 0.8}),
        ({"isolate": False}, {"allow_intraset_token_visibility": True, "attend": "weighted"}),
        ({"isolate": False, "attend": "all"}, {"allow_intraset_token_visibility": True, "attend": "all"}),
        ({"isolate": True}, {}),
        (
            {"preset": "original", "allow_intraset_token_visibility": True},
            {"attend": "all", "combine": "last", "allow_intraset_token_visibility": True, **ATTENTION},
        ),
        ({"enable_thinking": True}, {"enable_thinking": True, "chat": True}),
        ({"selection_threshold": 0.25}, {"threshold": 0.25}),
        ({"use_retroactive_removal": True}, {"pruning_signal": "posterior"}),
        ({"use_retroactive_pruning": True, "attention_threshold": 0.02}, {"attention_threshold": 0.02, **ATTENTION}),
        ({"use_retroactive_pruning": True, "pruning_signal": "random"}, {"pruning_signal": "random"}),
        ({"use_retroactive_pruning": True, "preset": "original"}, {"attend": "all", "combine": "last", **ATTENTION}),
        ({"use_retroactive_pruning": False, "preset": "original"}, {"attend": "all", "combine": "last"}),
        ({"use_retroactive_pruning": False, "pruning_signal": "posterior"}, {}),
        ({"use_pruning": True}, {"pruning_strategy": "hybrid"}),
        ({"use_pruning": True, "pruning_strategy": "coherence"}, {"pruning_strategy": "coherence"}),
        ({"dynamic_threshold": True}, {"final_threshold": 1.0}),
        ({"dynamic_threshold": True, "final_threshold": 0.4}, {"final_threshold": 0.4}),
        ({"dynamic_threshold": False, "final_threshold": 1.0}, {}),
        ({"final_threshold": 0, "bezier_p1": 0.5}, {"final_threshold": 0.0, "bezier_p1": 0.5}),
        ({"dynamic_threshold": True, "use_relu": True}, {"final_threshold": 1.0, "relu_activation_point": 0.5}),
        (
            {"final_threshold": 0.4, "use_relu": True, "relu_activation_point": 0.2},
            {"final_threshold": 0.4, "relu_activation_point": 0.2},
        ),
        ({"preset": "original", "relative_attention": False, "attend": "lineage", "combine": "mix"},
         {"relative_threshold": 0.0, **ATTENTION}),
        ({"attention_threshold": 0.01, "use_relative_attention": True, "relative_threshold": 0.7},
         {"relative_threshold": 0.7, **ATTENTION}),
        ({"attention_threshold": 0.01, "sigmoid_threshold": False}, {"sigmoid_steepness": 0.0, **ATTENTION}),
        ({"attention_threshold": 0.01, "use_sigmoid_threshold": True}, ATTENTION),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"final_threshold": 0.4, "threshold": 0.2, "top_p": 0.9},
         {"final_threshold": 0.4, "threshold": 0.2, "top_p": 0.9}),
        ({"final_threshold": 0.4, "dynamic_target": "pruning", "top_k": 4, "pruning_signal": "posterior"},
         {"final_threshold": 0.4, "dynamic_target": "pruning", "top_k": 4, "selection": "top-k",
          "pruning_signal": "posterior"}),
        ({"max_parallel_tokens": "auto"}, {"max_parallel_tokens": "auto"}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"preset": "plain", "branches": 3}, {"decoder": "tree", "branches": 3}),
    ],
)  # fmt: skip
def test_what_follows_from_what(given: dict[str, object], expected: dict[str, object]) -> None:
    assert changed(**given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"treshold": 1}, ["treshold", "threshold?"]),
        ({"threshold": 1.5}, ["threshold", "1.5", "from 0 to 1"]),
        ({"threshold": -0.1}, ["-0.1"]),
        ({"threshold": float("nan")}, ["nan"]),
        ({"threshold": True}, ["True"]),
        ({"threshold": "0.1"}, ["'0.1'"]),
        ({"max_tokens": 0}, ["max_tokens is 0", "from 1"]),
        ({"max_tokens": 1.5}, ["1.5", "whole number"]),
        ({"seed": -1}, ["-1"]),
        ({"seed": 10**5000}, ["huge"]),
        ({"temperature": 10**400}, ["huge"]),
        ({"temperature": float("inf")}, ["inf"]),
        ({"max_parallel_tokens": "many"}, ["many", "auto"]),
        ({"decoder": "magic"}, ["magic", "superposed", "plain"]),
        ({"stop": [""]}, ["empty"]),
        ({"top_p": 0.9, "final_threshold": 0.5}, ["final_threshold has no effect with selection top-p"]),
        ({"stop": [1]}, ["1"]),
        ({"min_steps": 5, "max_tokens": 4}, ["min_steps", "max_tokens"]),
        ({"attend": "best", "allow_intraset_token_visibility": True}, ["attend best", "weighted"]),
        ({"enable_thinking": True, "chat": False}, ["chat"]),
        ({"threshold": 0.2, "default_mode": True}, ["threshold", "plain", "leave it out"]),
        ({"use_mcts": True, "decoder": "beam"}, ["mcts", "beam"]),
        ({"use_mcts": True, "default_mode": True}, ["mcts", "plain"]),
        ({"dynamic_threshold": False, "final_threshold": 0.4}, ["final_threshold is 0.4", "dynamic_threshold"]),
        ({"use_pruning": False, "pruning_strategy": "coherence"}, ["coherence", "use_pruning"]),
        ({"sigmoid_threshold": False, "sigmoid_steepness": 3}, ["sigmoid_steepness is 3", "sigmoid_threshold"]),
        ({"use_retroactive_pruning": True, "decoder": "beam"}, ["beam"]),
        ({"use_retroactive_pruning": "yes"}, ["use_retroactive_pruning", "true or false"]),
        ({"branches": 3, "use_mcts": True}, ["branches", "mcts"]),
        ({"regex": "a", "choices": ["b"]}, ["regex", "choices"]),
        ({"regex": "a", "min_steps": 2}, ["min_steps", "regex"]),
        ({"logit_bias": ["7"]}, ["logit_bias", "464=-5"]),
        ({"logit_bias": {7: 101}}, ["logit_bias", "100"]),
        ({"repetition_penalty": 1.1, "decoder": "superposed"}, ["repetition_penalty", "plain or tree"]),
        ({"presence_context_size": 5, "decoder": "plain"}, ["--presence-penalty"]),
        ({"bezier_p1": 0.4}, ["--final-threshold"]),
        ({"bezier_p1": 0.4, "dynamic_threshold": True, "use_relu": True}, ["relu_activation_point"]),
        ({"dynamic_threshold": True, "dynamic_target": "pruning"}, ["--use-retroactive-pruning"]),
        (
            {
                "dynamic_threshold": True,
                "dynamic_target": "pruning",
                "pruning_strategy": "diversity",
            },
            ["nothing is pruned by one"],
        ),
        ({"coherence_threshold": 0.5}, ["--pruning-strategy coherence or hybrid"]),
        ({"posterior_threshold": 0.5}, ["without pruning_signal", "--pruning-signal posterior or"]),
        ({"pruning_window": 3}, ["--pruning-signal posterior or attention or"]),
        ({"attention_threshold": 0.5, "pruning_signal": "random"}, ["attention_threshold", "random"]),
        ({"paths": 3, "decoder": "beam"}, ["paths", "beam", "superposed"]),
        ({"path_distance": 0.5}, ["--paths"]),
        ({"threshold": 0.2, "selection_threshold": 0.2}, ["twice"]),
        ({"system": "Be brief."}, ["--chat"]),
        ({"system": "a\0b", "chat": True}, ["system"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_it(given: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(given)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 300 and "\n" not in message
    assert caught.value.exit_code == 2


def test_a_setting_of_another_decoder_at_its_default_asks_for_nothing() -> None:
    assert resolve({"decoder": "plain", "threshold": 0.1}) == resolve({"decoder": "plain"})


def test_load_config() -> None:
    assert LoadConfig(device="mps").device == "gpu"
    assert LoadConfig(kv_bits=4).kv_bits == 4
    for bad in ({"kv_bits": 5}, {"max_memory_gb": 0}, {"model": " "}, {"backend": "jax"}):
        with pytest.raises(ConfigError):
            LoadConfig(**bad)


def test_precedence_is_flag_environment_file_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('threshold = 0.3\nmax-tokens = 7\nseed = 3\nmodel = "a"\nquiet = true\n')
    dotenv = tmp_path / ".env"
    dotenv.write_text("TEMPO_SEED=4\nTEMPO_TOP_K=\nOTHER=1\nTEMPO_MAX_TOKENS=1\n")
    environ = {"TEMPO_MAX_TOKENS": "8", "MODEL_PATH": "b", "DEVICE": "mps"}
    given = load_settings(str(file), environ, {"max_tokens": 9}, dotenv=dotenv)
    config = given.generation()
    assert (config.threshold, config.max_tokens, config.seed, config.top_k) == (0.3, 9, 4, None)
    assert load_settings(str(file), environ, {}, dotenv=dotenv).generation().max_tokens == 8
    assert given.make(LoadConfig) == LoadConfig(model="b", device="gpu")
    assert given.make(OutputConfig).quiet
    stronger = load_settings(None, {**environ, "TEMPO_MODEL": "c"}, {}, dotenv=dotenv)
    assert stronger.make(LoadConfig).model == "c"


def test_the_environment_is_dropped_where_the_decoder_has_no_use_for_it(tmp_path: Path) -> None:
    none = tmp_path / "none"
    environ = {"TEMPO_THRESHOLD": "0.3", "TEMPO_PRESET": "original"}
    assert load_settings(None, environ, {"decoder": "plain"}, dotenv=none).generation() == resolve(
        {"decoder": "plain"}
    )
    assert load_settings(None, environ, {}, dotenv=none).generation() == resolve(
        {"preset": "original", "threshold": 0.3}
    )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("s.toml", "treshold = 0.1", ["s.toml", "treshold", "threshold?"]),
        ("s.toml", "threshold = 2", ["s.toml", "threshold", "2"]),
        ("s.toml", "threshold = ", ["s.toml", "malformed"]),
        ("s.json", "[1]", ["s.json", "names and values"]),
        ("s.json", "{", ["s.json", "malformed"]),
        ("s.yaml", "a: [", ["s.yaml", "malformed"]),
        ("s.yaml", "threshold: .nan", ["threshold", "nan"]),
        ("s.ini", "", ["s.ini", ".toml"]),
    ],
)
def test_a_bad_settings_file_is_named(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(str(tmp_path / name), {}, {}, dotenv=tmp_path / "none")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", ["s.toml", "s.json", "s.yaml"])
def test_every_kind_of_settings_file(tmp_path: Path, name: str) -> None:
    text = {"s.toml": "threshold = 0.3\nchat = true", "s.json": '{"threshold": 0.3, "chat": true}',
            "s.yaml": "threshold: 0.3\nchat: true"}[name]  # fmt: skip
    (tmp_path / name).write_text(text)
    given = load_settings(str(tmp_path / name), {}, {}, dotenv=tmp_path / "none")
    assert given.generation() == resolve({"threshold": 0.3, "chat": True})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"TEMPO_THRESHOLD": "2"}, ["TEMPO_THRESHOLD", "2"]),
        ({"TEMPO_THRESHOLD": "nan"}, ["TEMPO_THRESHOLD", "nan"]),
        ({"TEMPO_CHAT": "maybe"}, ["TEMPO_CHAT", "true or false"]),
        ({"TEMPO_DEVICE": "cuda:0"}, ["TEMPO_DEVICE", "cuda:0", "gpu"]),
    ],
)
def test_a_bad_environment_variable_is_named(
    tmp_path: Path, environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(None, environ, {}, dotenv=tmp_path / "none")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"DEVICE": "cuda:0"}, ["DEVICE ('cuda:0') is ignored", "gpu", "TEMPO_DEVICE"]),
        (
            {"MODEL_PATH": "/opt/other/model.onnx"},
            ["MODEL_PATH ('/opt/other/model.onnx') is ignored", "TEMPO_MODEL"],
        ),
        ({"MODEL_PATH": "missing.gguf"}, ["MODEL_PATH"]),
        ({"TEMPO_TRESHOLD": "1"}, ["TEMPO_TRESHOLD is not a setting", "TEMPO_THRESHOLD?"]),
    ],
)
def test_what_others_have_in_the_environment_is_ignored_and_noted_once(
    tmp_path: Path, environ: dict[str, str], words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Of the process and of a project's .env; not where it would not count, nor where only the text is wanted."""
    dotenv = tmp_path / ".env"
    dotenv.write_text("".join(f"{name}={value}\n" for name, value in environ.items()))
    for source, file in ((environ, tmp_path / "none"), ({}, dotenv), (environ, dotenv)):
        caplog.clear()
        given = load_settings(None, source, {}, dotenv=file)
        assert given.make(LoadConfig) == LoadConfig() and given.generation() == GenerateConfig()
        (record,) = caplog.records
        assert record.levelname == "WARNING" and all(word in record.getMessage() for word in words)
    caplog.clear()
    load_settings(None, environ, {"quiet": True}, dotenv=tmp_path / "none")
    if "TEMPO_TRESHOLD" not in environ:
        load_settings(None, environ, {"device": "cpu", "model": "a"}, dotenv=tmp_path / "none")
    assert not caplog.records


def test_a_model_path_that_can_be_meant_for_us_is(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    for text in (str(tmp_path / "model.gguf"), str(tmp_path), "org/name", "smollm2-135m"):
        given = load_settings(None, {"MODEL_PATH": text}, {}, dotenv=tmp_path / "none")
        assert given.make(LoadConfig).model == text


def test_dotenv_may_not_name_code_to_load(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TEMPO_BLAS=/tmp/evil.so\n")
    with pytest.raises(ConfigError, match="TEMPO_BLAS"):
        load_settings(None, {}, {}, dotenv=tmp_path / ".env")


def test_lists_in_the_environment(tmp_path: Path) -> None:
    environ = {"TEMPO_STOP": '["a", "b"]'}
    config = load_settings(None, environ, {}, dotenv=tmp_path / "none").generation()
    assert config.stop == ("a", "b")


def test_a_flag_beats_the_environment_in_what_it_implies(tmp_path: Path) -> None:
    def config(flags: dict[str, object], **environ: str) -> dict[str, object]:
        found = load_settings(None, environ, flags, dotenv=tmp_path / "none").generation()
        return {
            name: value for name, value in as_dict(found).items() if value != as_dict(GenerateConfig())[name]
        }

    assert config({}, TEMPO_TOP_P="0.8") == {"selection": "top-p", "top_p": 0.8}
    assert config({"threshold": 0.2}, TEMPO_TOP_P="0.8") == {"threshold": 0.2, "top_p": 0.8}
    assert config({"top_k": 3}, TEMPO_SELECTION="top-p") == {"selection": "top-k", "top_k": 3}
    assert config({"top_k": 3, "top_p": 0.8}) == {"selection": "top-k", "top_k": 3, "top_p": 0.8}
    assert config({"repetition_penalty": 1.1}) == {"decoder": "plain", "repetition_penalty": 1.1}
    assert config({"regex": "a+", "branches": 3}) == {"decoder": "tree", "regex": "a+", "branches": 3}
    assert config({"logit_bias": {7: -2}, "top_p": 0.5, "decoder": "plain"}) == {
        "logit_bias": ["7=-2"], "top_p": 0.5, "decoder": "plain",
    }  # fmt: skip
    assert config({"enable_thinking": True}, TEMPO_CHAT="false") == {"chat": True, "enable_thinking": True}
    assert config({"chat": False}, TEMPO_ENABLE_THINKING="true") == {}
    assert config({"dynamic_threshold": True}, TEMPO_FINAL_THRESHOLD="0.4") == {"final_threshold": 0.4}
    assert config({"final_threshold": 0.4}, TEMPO_DYNAMIC_THRESHOLD="false") == {"final_threshold": 0.4}
    assert config({"dynamic_threshold": False}, TEMPO_FINAL_THRESHOLD="0.4") == {}
    assert config({"relative_attention": True, "attention_threshold": 0.02}, TEMPO_RELATIVE_THRESHOLD="0") == {
        "attention_threshold": 0.02, **ATTENTION,
    }  # fmt: skip
    assert config({"decoder": "beam"}, TEMPO_USE_MCTS="true", TEMPO_USE_RETROACTIVE_PRUNING="1") == {
        "decoder": "beam"
    }
    assert config({}, TEMPO_FINAL_THRESHOLD="none", TEMPO_DYNAMIC_THRESHOLD="true") == {}


OLD = {
    "chat": False,
    "seed": 7,
    "threshold": 0.05,
    "decoder": "superposed",
    "dynamic_threshold": False,
    "dynamic_target": "selection",
    "final_threshold": 1.0,
    "use_relu": False,
    "relu_activation_point": 0.5,
    "use_pruning": False,
    "pruning_strategy": "hybrid",
    "use_retroactive_pruning": False,
    "pruning_signal": "posterior",
    "attention_threshold": 0.01,
    "relative_attention": True,
    "relative_threshold": 0.5,
    "sigmoid_threshold": True,
    "sigmoid_steepness": 10.0,
}  # fmt: skip  (of a run file of version 0.1.0, shortened)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {}),
        ({"use_retroactive_pruning": True}, {"pruning_signal": "posterior"}),
        (
            {"use_retroactive_pruning": True, "pruning_signal": "attention", "relative_attention": False},
            {"pruning_signal": "attention", "relative_threshold": 0.0},
        ),
        (
            {"use_retroactive_pruning": True, "pruning_signal": "attention", "sigmoid_threshold": False},
            {"pruning_signal": "attention", "sigmoid_steepness": 0.0},
        ),
        ({"dynamic_threshold": True, "final_threshold": 0.4}, {"final_threshold": 0.4}),
        (
            {"dynamic_threshold": True, "use_relu": True, "relu_activation_point": 0.2},
            {"final_threshold": 1.0, "relu_activation_point": 0.2},
        ),
        ({"use_pruning": True, "pruning_strategy": "coherence"}, {"pruning_strategy": "coherence"}),
    ],
)
def test_a_config_of_version_0_1_0_means_what_it_meant(
    old: dict[str, object], new: dict[str, object]
) -> None:
    config = upgrade({**OLD, **old})
    assert GenerateConfig(**config) == GenerateConfig(seed=7, threshold=0.05, **new)
    assert upgrade(config) == config
    assert resolve({**OLD, **old}) == resolve(config) == GenerateConfig(**config)


def test_what_was_off_stays_off_in_an_old_config() -> None:
    assert upgrade({"dynamic_threshold": False, "final_threshold": 0.4}) == {"final_threshold": None}
    assert (
        upgrade({"use_relu": "no", "relu_activation_point": 0.4})["use_relu"] == "no"
    )  # refused by who reads it


def test_every_needed_setting_and_decoder_exists() -> None:
    """A typo in the table would switch a check off without anyone noticing."""
    settings = settings_of(GenerateConfig)
    decoders = settings["decoder"].choices
    for setting in settings.values():
        assert set(setting.row.decoders or ()) <= set(decoders), setting.name
        for other, allowed in (setting.row.needs or {}).items():
            for value in allowed:
                settings[other].check(value)
        for other in setting.row.implies:
            assert setting.row.decoders if other == "decoder" else other in (setting.row.needs or {}), (
                setting.name
            )


def test_every_decoder_uses_something_that_a_row_asks_for() -> None:
    assert list(USES) == list(DECODERS) == list(settings_of(GenerateConfig)["decoder"].choices)
    asked = [set(s.row.decoders) for s in settings_of(GenerateConfig).values() if s.row.decoders is not None]
    for decoder, used in USES.items():
        assert sum(decoder in decoders for decoders in asked) >= len(used)
    assert all(asked), "no row is for nobody: a typo in what it is used by"


def test_settings_are_shown_by_audience() -> None:
    shown = [s.row.audience for s in by_audience(settings_of(GenerateConfig).values())]
    assert shown == sorted(shown, key=["everyday", "study", "ablation"].index)
    assert len(set(shown)) == 3 and shown.count("everyday") < len(shown) / 2


def test_a_shortcut_names_a_setting_and_values_of_it() -> None:
    settings = settings_of(GenerateConfig)
    assert set(SWITCHES) == set(settings_of(Shortcuts)) - {"preset"}
    for switch in SWITCHES.values():
        for value in (switch.on, switch.off)[: 1 if switch.exactly else 2]:
            assert settings[switch.setting].check(value) == value


def test_names_and_spellings_are_unique() -> None:
    seen: set[str] = set()
    for config in (LoadConfig, GenerateConfig, Shortcuts, OutputConfig):
        for setting in settings_of(config).values():
            for flag in (setting.flag, *(alias.lstrip("/") for alias in setting.row.aliases)):
                assert flag not in seen
                seen.add(flag)


@pytest.mark.parametrize("text", ["~nobody-of-that-name/model", "/" + "a" * 300])
def test_a_model_path_that_no_file_can_have_is_others(tmp_path: Path, text: str) -> None:
    given = load_settings(None, {"MODEL_PATH": text}, {}, dotenv=tmp_path / "none")
    assert given.make(LoadConfig) == LoadConfig()


def test_a_dotenv_that_cannot_be_read_is_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".env").write_bytes(b"NAME=\xe9\nTEMPO_SEED=3\n")
    assert load_settings(None, {}, {}, dotenv=tmp_path / ".env").generation() == GenerateConfig()
    (record,) = caplog.records
    assert ".env is ignored: it is not UTF-8 text" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "text"), [("s.toml", "seed = 3"), ("s.json", '{"seed": 3}'), ("s.yaml", "seed: 3")]
)
def test_a_settings_file_may_begin_with_a_byte_order_mark(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_settings(str(tmp_path / name), {}, {}, dotenv=tmp_path / "none").generation().seed == 3


@pytest.mark.parametrize("name", ["s.toml", "s.yaml"])
def test_a_settings_file_may_hold_comments_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# seed: 3\n")
    given = load_settings(str(tmp_path / name), {}, {}, dotenv=tmp_path / "none")
    assert given.generation() == GenerateConfig()
