"""What a command line that is wrong is told: one sentence, an exit code, and nothing else. In process, no model."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tempo_mlx.cli.advice import MEANT
from tempo_mlx.cli.main import main

GENERATE = [
    # what, exit code, words of the sentence
    ("", 2, "There is no prompt; give one"),
    ("a --prompt b", 2, "Several prompts are given; give one"),
    ("a --prompt-file p.txt", 2, "Several prompts are given"),
    ("''", 2, "The prompt is empty"),
    ("'  '", 2, "The prompt is empty"),
    ("--prompt-file missing.txt", 2, "Cannot read missing.txt"),
    ("--prompt-file latin.txt", 2, "is not UTF-8 text"),
    ("--prompt-file .", 2, "Cannot read .:"),
    ("once upon a time", 2, "Words are left over (upon a time); put the whole prompt in quotes"),
    ("'- milk'", 2, "A prompt that begins with - stands behind --"),
    ("once upon", 2, "Words are left over (upon); put the whole prompt in quotes"),
    ("a --threshold 1.5", 2, "--threshold is 1.5; choose a number from 0 to 1"),
    ("a --threshold -0.1", 2, "--threshold is -0.1; choose a number from 0 to 1"),
    ("a --threshold high", 2, "--threshold is 'high'; choose a number from 0 to 1"),
    ("a --threshold nan", 2, "--threshold is nan; choose"),
    ("a --threshold", 2, "requires an argument"),
    ("a --treshold 1", 2, "There is no --treshold here; did you mean --threshold?"),
    ("a --thresholds 1", 2, "did you mean --threshold?"),
    ("a --max-token 5", 2, "did you mean --max-tokens?"),
    ("a --max-tokens 0", 2, "--max-tokens is 0; choose a whole number from 1"),
    ("a --max-tokens -3", 2, "--max-tokens is -3; choose a whole number"),
    ("a --max-tokens many", 2, "--max-tokens is 'many'"),
    ("a --max-tokens 1.5", 2, "--max-tokens is '1.5'"),
    ("a -n 0", 2, "--max-tokens is 0"),
    ("a -n", 2, "requires an argument"),
    ("a --temp -1", 2, "--temperature is -1.0; choose a number from 0"),
    ("a -t warm", 2, "--temperature is 'warm'"),
    ("a --temperature inf", 2, "--temperature is inf"),
    ("a --seed -1", 2, "--seed is -1"),
    ("a --seed x", 2, "--seed is 'x'"),
    ("a --min-steps 200", 2, "min_steps is 200, more than max_tokens (100); lower it"),
    ("a --stop ''", 2, "stop holds an empty text"),
    ("a --decoder magic", 2, "choose superposed, tree"),
    ("a --selection best", 2, "--selection is 'best'; choose threshold, min-p"),
    ("a --top-p 0", 2, "--top-p is 0.0; choose a number above 0"),
    ("a --top-k 0", 2, "--top-k is 0"),
    ("a --min-p 2", 2, "--min-p is 2.0"),
    ("a --combine sum", 2, "choose mix, last, mean"),
    ("a --attend some", 2, "choose lineage, all"),
    (
        "a --attend lineage --allow-intraset-token-visibility",
        2,
        "allow_intraset_token_visibility has no effect",
    ),
    ("a --max-parallel-tokens 0", 2, "--max-parallel-tokens is 0"),
    ("a --max-parallel-tokens few", 2, "or auto"),
    ("a --branches 0", 2, "--branches is 0; choose a whole number from 1 to 256"),
    ("a --branches 300", 2, "--branches is 300"),
    ("a --branches 4 --decoder beam", 2, "branches has no effect with the beam decoder"),
    ("a --branches 5 --best-of 3", 2, "best_of is 3, fewer than the 5 branches wanted"),
    ("a --branch-choice worst", 2, "choose best or sample"),
    ("a --beam-width 3", 2, "beam_width has no effect with the superposed decoder"),
    ("a --diversity-strength 2 --decoder beam", 2, "diversity_strength has no effect with the beam decoder"),
    ("a --mcts-depth 2", 2, "mcts_depth has no effect"),
    ("a --paths -1", 2, "--paths is -1"),
    ("a --path-distance 0.3", 2, "path_distance has no effect without paths"),
    (
        "a --repetition-penalty 1.2 --attend all",
        2,
        "attend and repetition_penalty are for different decoders",
    ),
    ("a --leaves 3 --branches 2", 2, "branches and leaves are for different decoders"),
    ("a --paths 2 --decoder plain", 2, "paths has no effect with the plain decoder"),
    ("a --default-mode --threshold 0.3", 2, "threshold has no effect with the plain decoder; leave it out"),
    ("a --default-mode --decoder tree", 2, "decoder is tree, which default_mode contradicts"),
    ("a --preset fast", 2, "--preset is 'fast'; choose lineage"),
    ("a --system Hi", 2, "system has no effect without chat; add --chat"),
    ("a --system-prompt Hi", 2, "system has no effect without chat; add --chat"),
    ("a -s Hi", 2, "system has no effect without chat; add --chat"),
    ("a --system-file p.txt", 2, "system has no effect without chat; add --chat"),
    ("a --system-file missing.txt --chat", 2, "Cannot read missing.txt"),
    ("a --system-file p.txt --system Hi --chat", 2, "A system message is given besides the one in p.txt"),
    ("a --thinking-budget 5", 2, "thinking_budget has no effect without enable_thinking"),
    ("a --enable-thinking --decoder mcts", 2, "enable_thinking has no effect with the mcts decoder"),
    ("a --posterior-threshold 0.2", 2, "posterior_threshold has no effect without pruning_signal"),
    ("a --pruning-window 3", 2, "pruning_window has no effect without pruning_signal"),
    ("a --pruning-signal luck", 2, "choose posterior, attention"),
    ("a --coherence-threshold 0.2", 2, "coherence_threshold has no effect without pruning_strategy"),
    ("a --bezier-p1 0.2 --bezier-p2 0.3", 2, "bezier_p2 has no effect without final_threshold"),
    ("a --final-threshold 2", 2, "--final-threshold is 2.0"),
    ("a --dynamic-threshold --dynamic-target pruning", 2, "nothing is pruned by one"),
    ("a --early-exit --exit-layers 3,7 --confidence-thresholds 0.7", 2, "2 exit_layers and 1"),
    ("a --exit-layers 3", 2, "exit_layers has no effect without early_exit"),
    ("a --early-exit --exit-layers 3,3", 2, "names a layer twice"),
    ("a --early-exit --pruning-signal attention", 2, "early_exit has nothing to skip"),
    ("a --compare", 2, "--compare shows what early exit changes; add --early-exit"),
    ("a --view pictures", 2, "--view is 'pictures'; choose phrases, text, sets"),
    ("a --view text --show-token-ids", 2, "show_token_ids has no effect with view text; choose --view sets"),
    ("a --view phrases --show-token-ids", 2, "show_token_ids has no effect with view phrases"),
    ("a --show-above 2", 2, "--show-above is 2.0; choose a number from 0 to 1"),
    ("a --format pdf", 2, "--format is 'pdf'; choose text, json"),
    ("a --config missing.toml", 2, "missing.toml cannot be read"),
    ("a --config p.txt", 2, "is of no kind known; name it .toml"),
    ("a --config bad.toml", 2, "bad.toml is malformed"),
    ("a --config unknown.toml", 2, "In unknown.toml: treshold is not a setting; did you mean threshold?"),
    ("a --config range.toml", 2, "In range.toml: threshold is 7"),
    ("a --timeout 0", 2, "--timeout is 0.0; choose a number above 0"),
    ("a --max-cache-tokens 0", 2, "--max-cache-tokens is 0"),
    ("a --max-memory-gb 0", 2, "--max-memory-gb is 0.0"),
    ("a --kv-bits 3", 2, "choose 4, 8"),
    ("a --dtype int4", 2, "choose auto, float32"),
    ("a --device tpu", 2, "choose auto, cpu"),
    ("a --backend jax", 2, "choose mlx or torch"),
    ("a --model ''", 2, "model is empty; name a model"),
    ("a --model no-such-model", 1, "no-such-model"),
    ("a -m no-such-model", 1, "no-such-model"),
    ("a --model empty.gguf", 1, "empty.gguf"),
    ("a --json-output-file no/such/run.json", 1, "no/such"),
    ("a --json-output-file .", 1, "it is a directory; name a file in it"),
    ("a --output-dir empty.gguf/x", 1, "empty.gguf/x"),
    ("a --profile-output no/such/profile.json", 1, "no/such"),
    (
        "a --json-output-file r.json --profile-output ./r.json",
        2,
        "--json-output-file and --profile-output are both",
    ),
    (
        "--prompt-file p.txt --json-output-file p.txt",
        2,
        "--prompt-file and --json-output-file are both p.txt",
    ),
    ("a --model empty.gguf --json-output-file empty.gguf", 2, "--model and --json-output-file are both"),
    ("a --prompt-cache r.json --json-output-file r.json", 2, "are both r.json; write to another file"),
    ("a --early-exit --compare --json-output-file r.json", 2, "--compare shows several decodings"),
    ("a --early-exit --compare --format json", 2, "--compare shows several decodings"),
    ("a --disable-kv-cache", 2, "--disable-kv-cache would change nothing but the speed"),
    ("a --use-cprofile", 2, "use --profile"),
    ("a -x", 2, "There is no -x here"),
    ("a --no-threshold", 2, "There is no --no-threshold here"),
    ("a --nonsense", 2, "There is no --nonsense here; tempo-mlx generate --help-all shows what there is"),
    ("a --quiet=maybe", 2, "--quiet"),
]
OTHERS = [
    ("ask", 2, "There is no prompt"),
    ("ask what is this", 2, "Words are left over (is this); put the whole prompt in quotes: tempo-mlx ask"),
    ("ask a --chat", 2, "There is no --chat here"),
    ("ask a --temprature 1", 2, "did you mean --temperature?"),
    ("ask a -n 0", 2, "--max-tokens is 0"),
    ("ask a --system-file missing.txt", 2, "Cannot read missing.txt"),
    ("ask a --choices b,c --system-file missing.txt", 2, "Cannot read missing.txt"),
    ("ask a --choices b,c --profile", 2, "--choices are scored without a run"),
    ("ask a --choices b,c --profile-output p.json", 2, "--choices are scored without a run"),
    ("ask a -m no-such-model", 1, "no-such-model"),
    ("chat hello", 2, "tempo-mlx chat has no use for hello"),
    ("chat --format json", 2, "There is no --format here"),
    ("chat -m no-such-model", 1, "no-such-model"),
    ("chat -t hot", 2, "--temperature is 'hot'"),
    ("version", 2, "There is no command version; write tempo-mlx --version"),
    ("complete a", 2, "write tempo-mlx generate"),
    ("generat a", 2, "There is no command generat; did you mean 'generate'?"),
    ("'The sky is'", 2, "A prompt needs a command before it: tempo-mlx generate 'The sky is'"),
    ("nonsense", 2, "There is no command nonsense; tempo-mlx --help lists them"),
    ("--nonsense", 2, "There is no --nonsense here"),
    ("show", 2, "Missing argument"),
    ("show missing.json", 2, "missing.json"),
    ("show p.txt", 1, "p.txt"),
    ("show object.json", 1, "object.json"),
    ("show missing.json --view pictures", 2, "--view is 'pictures'"),
    ("show missing.json --view text --show-token-ids", 2, "show_token_ids has no effect"),
    ("show p.txt --html p.txt", 2, "RUN.json and --html are both p.txt"),
    ("calibrate no-such-model --output .", 1, "it is a directory; name a file in it"),
    ("calibrate no-such-model --text p.txt --output p.txt", 2, "--text p.txt and --output are both p.txt"),
    ("verify missing.json", 2, "missing.json"),
    ("verify object.json", 1, "object.json"),
    ("score", 2, "Missing argument"),
    ("models nonsense", 2, "There is no command nonsense"),
    ("models info no-such-model", 1, "no-such-model"),
    ("batch", 2, "Missing argument"),
    ("convert", 2, "Missing"),
    ("serve --port 99999999", 2, "--port"),
    ("serve --prot 1", 2, "did you mean --port?"),
]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "p.txt").write_text("Hello\n")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "bad.toml").write_text("threshold =")
    (tmp_path / "unknown.toml").write_text("treshold = 0.1\n")
    (tmp_path / "range.toml").write_text("threshold = 7\n")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def check(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ") and err.count("\n") == 1, err
    assert words in err
    assert err.rstrip().endswith((".", "?", '"', "'")), "a whole sentence"


def split(line: str) -> list[str]:
    return shlex.split(line)


def test_the_table_is_long() -> None:
    assert len(GENERATE) + len(OTHERS) + len(MEANT) >= 120


@pytest.mark.parametrize(("line", "code", "words"), GENERATE)
def test_generate_is_told_what_is_wrong(
    line: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check(["generate", *split(line)], code, words, capsys)


@pytest.mark.parametrize(("line", "code", "words"), OTHERS)
def test_the_others_are_told_what_is_wrong(
    line: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check(split(line), code, words, capsys)


@pytest.mark.parametrize("word", MEANT)
def test_what_other_programs_call_it_is_understood(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And what is advised exists."""
    check(["generate", "a", word] if word.startswith("-") else [word], 2, f"write {MEANT[word]}.", capsys)
    named = MEANT[word].split(",")[0].split(" or ")[0].split()
    if named[0] == "tempo-mlx":
        assert main([*named[1:2], *(w for w in named[2:] if not w.startswith("-")), "--help"]) == 0
    else:
        assert main(["generate", "--help-all"]) == 0
        shown = capsys.readouterr().out
        assert all(flag in shown for flag in named if flag.startswith("--"))


@pytest.mark.parametrize(
    "arguments", [[], ["models", "-h"], ["--help"], ["generate", "-h"], ["ask", "--help-all"]]
)
def test_help_is_no_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: tempo-mlx") and err == ""


@pytest.mark.parametrize("columns", ["0", "1", "2", "9"])
@pytest.mark.parametrize("arguments", ["--help", "generate --help-all", "models --help"])
def test_help_needs_no_room(
    columns: str, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(split(arguments)) == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tempo-mlx gen", "generate"),
        ("tempo-mlx generate --thr", "--threshold"),
        ("tempo-mlx models pu", "pull"),
    ],
)
def test_the_shell_is_told_what_could_follow(typed: str, offered: str) -> None:
    environ = {**os.environ, "_TEMPO_MLX_COMPLETE": "complete_bash", "COMP_WORDS": typed,
               "COMP_CWORD": str(len(typed.split()) - 1)}  # fmt: skip
    command = [sys.executable, "-m", "tempo_mlx"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.split() == [offered]
