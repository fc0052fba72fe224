"""What a newcomer meets first: Makefile, README, metadata, generated documentation; and the order of layers."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib as toml
else:
    import tomli as toml

import tempo_mlx
from tempo_mlx._version import __version__
from tempo_mlx.cli.main import main

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tempo_mlx"
README = (ROOT / "README.md").read_text("utf-8")


def test_readme_begins_with_the_two_commands_and_is_short() -> None:
    lines = [line.split("#")[0].strip() for line in README.splitlines() if line.strip()]
    assert lines[1:3] == ["make run", "make test"]
    assert len(README.split()) <= 700


def test_readme_names_only_flags_commands_and_targets_that_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    helps: dict[str, str] = {}

    def help_of(*command: str) -> str:
        if " ".join(command) not in helps:
            every = "--help-all" if command[:1] and command[0] in ("generate", "ask", "chat") else "--help"
            assert main([*command, every]) == 0, command
            helps[" ".join(command)] = capsys.readouterr().out
        return helps[" ".join(command)]

    for line in re.findall(r"(?:^    |`)tempo-mlx ([a-z][^`\n]*)", README, re.M):
        words = line.split("#")[0].split()
        command = words[:2] if words[0] == "models" and len(words) > 1 else words[:1]
        for flag in re.findall(r"--[a-z-]+", line):
            assert flag in help_of(*command), line
        help_of(*command)
    for flag in set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)[^`\n]*`", README)):
        assert any(flag in text for text in [help_of("generate"), help_of(), *helps.values()]), flag
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)[ `\n]", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_settings_file_of_the_settings_page(tmp_path: Path) -> None:
    from tempo_mlx.sources import load_settings

    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    (tmp_path / "settings.toml").write_text(example)
    config = load_settings(str(tmp_path / "settings.toml"), {}, {}, dotenv=tmp_path / "none").generation()
    assert config.pruning_signal == "posterior" and config.max_tokens == 200


def test_the_settings_page_is_what_the_tables_say() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_settings_docs.py"))
    for path, text in script["files"]().items():
        assert path.read_text("utf-8") == text, "run: make docs"


def test_the_models_page_is_what_the_table_says() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_models_docs.py"))
    assert script["PAGE"].read_text("utf-8") == script["models_docs"](), "run: make docs"


@pytest.mark.parametrize("page", ["cli", "api"])
def test_the_generated_references_are_what_the_code_says(page: str) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / f"write_{page}_docs.py"))
    assert script["PAGE"].read_text("utf-8") == script[f"{page}_docs"](), "run: make docs"


def test_versions_dates_and_addresses_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    bibtex = dict(re.findall(r"^  (\w+) = \{(.*)\}", README, re.M))
    assert citation["version"] == bibtex["version"] == __version__
    assert f"\n## {__version__} - {citation['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert bibtex["date"] == str(citation["date-released"])
    urls = toml.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    assert citation["repository-code"] == bibtex["url"] == urls["Repository"]
    assert citation["references"][0]["repository-code"] == urls["Original TEMPO"]
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert yaml.safe_load(workflow.read_text())["jobs"]
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]


def test_public_names_can_be_imported() -> None:
    for name in tempo_mlx.__all__:
        assert getattr(tempo_mlx, name) is not None


def test_the_wheel_holds_the_page_and_not_its_sources(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    page = [name for name in names if name.startswith("tempo_mlx/server/web/")]
    assert {f"tempo_mlx/server/web/dist/{name}" for name in ("index.html", "tempo-run.js")} <= set(page)
    assert all("/web/dist/" in name for name in page)
    assert "tempo_mlx/py.typed" in names
    assert not [name for name in names if name.startswith("tests") or "__pycache__" in name]
    metadata = zipfile.ZipFile(wheel).read(f"tempo_mlx-{__version__}.dist-info/METADATA").decode()
    assert 'Requires-Dist: mlx[cpu]>=0.32.4; platform_system == "Linux"' in metadata.replace("'", '"')


def test_the_base_install_is_light_and_everything_in_it_is_imported() -> None:
    """What only benchmarks, servers or tests use is in an extra; what is listed is used."""
    project = toml.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    base = {Requirement(each).name for each in project["dependencies"]}
    assert not base & {"mlx-lm", "transformers", "torch", "fastapi"}
    imported = {"huggingface-hub": "huggingface_hub", "protobuf": "google.protobuf", "python-dotenv": "dotenv",
                "prompt-toolkit": "prompt_toolkit",
                "pyyaml": "yaml", "scipy-openblas32": "scipy-openblas32",
                "typing-extensions": "typing_extensions"}  # fmt: skip
    code = "\n".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    for name in base:
        assert re.search(rf"(import |from |\")({re.escape(imported.get(name, name))})\b", code), name


# The Makefile, for make 3.81 and a plain shell


def fake_python(directory: Path, name: str, version: tuple[int, int], venv: bool = True) -> None:
    """A stand-in that answers the two questions find-python.sh asks."""
    old = "exit 1" if version < (3, 10) else "exit 0"
    (directory / name).write_text(
        f'#!/bin/sh\ncase "$2" in *version_info*) {old};; *ensurepip*) exit {0 if venv else 1};; esac\n'
    )
    (directory / name).chmod(0o755)


def find_python(
    directory: Path, system: str = "Linux", machine: str = "x86_64", version: str = "glibc 2.35", **env: str
) -> subprocess.CompletedProcess[str]:
    """The script on a machine of this kind, with nothing on PATH but what stands in `directory`."""
    answers = {"uname": f'case "$1" in -s) echo {system};; -m) echo {machine};; esac',
               "sw_vers": f"echo {version}", "getconf": f'test -n "{version}" && echo {version}'}  # fmt: skip
    for name, answer in answers.items():
        (directory / name).write_text(f"#!/bin/sh\n{answer}\n")
        (directory / name).chmod(0o755)
    command = ["/bin/sh", str(ROOT / "scripts" / "find-python.sh")]
    return subprocess.run(command, env={"PATH": str(directory), **env}, capture_output=True, text=True)


def test_the_newest_python_is_taken(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3", (3, 9))
    fake_python(tmp_path, "python3.11", (3, 11))
    fake_python(tmp_path, "python3.13", (3, 13))
    fake_python(tmp_path, "python3.14", (3, 14), venv=False)
    assert find_python(tmp_path).stdout == f"{tmp_path}/python3.13\n"


def test_without_a_python_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3", (3, 9))
    done = find_python(tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Python 3.10 or newer" in done.stderr
    fake_python(tmp_path, "python3.12", (3, 12), venv=False)
    done = find_python(tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "python3.12-venv" in done.stderr


def test_the_python_that_is_given_is_taken_or_refused_by_name(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3.13", (3, 13))
    fake_python(tmp_path, "mine", (3, 10))
    fake_python(tmp_path, "old", (3, 9))
    assert find_python(tmp_path, PYTHON="mine").stdout == f"{tmp_path}/mine\n"
    done = find_python(tmp_path, PYTHON="old")
    assert done.returncode == 1 and done.stderr.startswith("PYTHON=old is no Python 3.10 or newer")


@pytest.mark.parametrize(
    ("system", "machine", "version", "named"),
    [
        ("Darwin", "arm64", "13.7.1", "this is macOS 13.7.1"),
        ("Darwin", "x86_64", "15.1", "this is a Mac with another processor (x86_64)"),
        ("Linux", "x86_64", "glibc 2.31", "this is a Linux with glibc 2.31"),
        ("Linux", "aarch64", "", "this is a Linux with another C library"),
        ("Linux", "riscv64", "glibc 2.41", "this is Linux on riscv64"),
    ],
)
def test_a_machine_without_a_wheel_of_mlx_is_told_so_before_pip_fails(
    system: str, machine: str, version: str, named: str, tmp_path: Path
) -> None:
    fake_python(tmp_path, "python3.13", (3, 13))
    done = find_python(tmp_path, system, machine, version)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert named in done.stderr and "glibc 2.35" in done.stderr and "macOS 14" in done.stderr
    make = [
        "make",
        f"VENV={tmp_path / 'venv'}",
        str(tmp_path / "venv" / "bin" / "python"),
        "PYTHON=python3.13",
    ]
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    made = subprocess.run(make, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert made.returncode and named in made.stderr and not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("system", "machine", "version"),
    [("Darwin", "arm64", "14.0"), ("Darwin", "arm64", "26"), ("Linux", "aarch64", "glibc 2.41"),
     ("Linux", "x86_64", "glibc 3.0")],
)  # fmt: skip
def test_a_machine_with_one_goes_on(system: str, machine: str, version: str, tmp_path: Path) -> None:
    fake_python(tmp_path, "python3.13", (3, 13))
    assert find_python(tmp_path, system, machine, version).stdout == f"{tmp_path}/python3.13\n"


def test_every_job_of_a_matrix_takes_its_own_python_and_not_the_newest() -> None:
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        for name, job in yaml.safe_load(workflow.read_text())["jobs"].items():
            if "matrix.python" not in str(job):
                continue
            makes = [step for step in job["steps"] if re.match("make run|scripts/", step.get("run", ""))]
            assert makes, name
            for step in makes:
                assert step["env"]["PYTHON"] == "${{ steps.python.outputs.python-path }}", (name, step)
            if any(step["run"] == "make run" for step in makes):
                (asked,) = (step["run"] for step in job["steps"] if "sys.version_info" in step.get("run", ""))
                assert asked.startswith(".venv/bin/python") and '"${{ matrix.python }}"' in asked


PROMPTS = ["plain words", "it's", 'say "hi"', "a $5 `echo` \\n tail", "#1; rm -rf /", "$(HOME) ${HOME}", "-x"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_make_run_passes_the_prompt_on_as_it_is(prompt: str, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "tempo-mlx"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor argument; do printf "%s\\n" "$argument"; done\n')
    program.chmod(0o755)
    (tmp_path / "bin" / "python").touch()
    (tmp_path / ".run").touch()
    command = ["make", "run", f"VENV={tmp_path}", "ARGS=--seed 3", f"PROMPT={prompt}"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["generate", "--seed", "3", "--", prompt]


def test_the_makefile_keeps_to_make_3_81() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert not re.search(
        r"^\.ONESHELL|^[A-Z_]+ *(::=|!=)|\$\((file|guile|let|intcmp) |^\$\(call undefine", makefile, re.M
    )
    assert "[[" not in makefile and "SHELL = /bin/sh" in makefile


# Layers

ORDER = ["errors", "arrays", "files", "cores", "kept", "strict", "token_ids", "settings", "_version", "config",
         "load_config", "output_config", "resolution", "keywords", "sources", "few_rows", "packed_products", "blas",
         "mlx", "lattice", "architecture", "weights", "model", "ranks", "prompt_cache", "loading", "exits", "decode",
         "report", "task", "api", "sandbox", "voting", "asking",
         "sessions", "batch_file", "batch", "bench", "server", "cli"]  # fmt: skip


def imports_of(path: Path) -> Iterator[str]:
    """The first part below tempo_mlx of every import that runs or is for types."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == "tempo_mlx":
            names = [f"tempo_mlx.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("tempo_mlx."))


def test_imports_run_one_way() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if layer in ("__init__", "__main__"):
            continue
        assert layer in ORDER, f"{path} is of no layer; add it to ORDER"
        for imported in imports_of(path):
            if ORDER.index(imported) > ORDER.index(layer):
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not wrong, wrong


def test_the_architecture_page_names_the_layers_and_who_computes() -> None:
    """In their order; and MLX or torch stands in the last column of those that import it, and of no other."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (\w+) \| .* \| (.*) \|$", page.split("## Layers")[1], re.M)
    assert [name for name, _ in rows if name != "layer"] == ORDER
    for name, touched in rows[1:]:
        files = (
            [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else (PACKAGE / name).rglob("*.py")
        )
        code = "\n".join(path.read_text("utf-8") for path in files)
        mlx = r"^ *(import|from) (tempo_mlx\.)?mlx\b|^ *from tempo_mlx import .*\bmlx\b"
        assert ("MLX" in touched) == bool(re.search(mlx, code, re.M)), name
        assert ("torch" in touched) == bool(re.search(r"^ *(import|from) torch\b", code, re.M)), name


def test_a_step_of_the_architecture_page_is_the_one_in_the_code() -> None:
    """The numbered boxes are the calls of `Tempo.advance`, in their order."""
    tree = ast.parse((PACKAGE / "decode" / "tempo.py").read_text("utf-8"))
    (advance,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "advance"
    )
    calls = [node.func for node in ast.walk(advance) if isinstance(node, ast.Call)]
    named = sorted((call.lineno, call.attr) for call in calls if isinstance(call, ast.Attribute))
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    boxes = re.findall(r'\["(\d) (\w+):', page)
    assert [name for _, name in sorted(boxes)] == [name for _, name in named]


def test_no_two_files_import_each_other() -> None:
    """Not in a circle of any length either; imports for types alone aside."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for path in PACKAGE.rglob("*.py")}  # fmt: skip
    imports: dict[str, set[str]] = {}
    for name, path in files.items():
        imports[name] = set()
        tree = ast.parse(path.read_text("utf-8"))
        for_types = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in (node for node in ast.walk(tree) if id(node) not in for_types):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    imports[name].add(inner if inner in files else node.module)
            elif isinstance(node, ast.Import):
                imports[name] |= {alias.name for alias in node.names} & set(files)
    sorter = graphlib.TopologicalSorter(imports)
    sorter.prepare()  # raises CycleError, which names the files


def test_a_file_is_one_story_and_a_function_one_screen() -> None:
    long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text("utf-8")
        long += [f"{path.name} has {lines} lines" for lines in [len(text.splitlines())] if lines > 450]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                long += [f"{path.name}: {node.name} has {lines} lines"] if lines > 60 else []
    assert not long, long


def test_mlx_is_imported_in_one_place() -> None:
    """Everything else takes it from there, so that the BLAS is loaded first."""
    importing = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^\s*(import|from) mlx\b", path.read_text("utf-8"), re.M)
    ]
    assert sorted(importing) == ["blas.py", "mlx.py"]


def test_array_types_are_named_once() -> None:
    naming = [
        str(path.relative_to(ROOT))
        for package in (PACKAGE, ROOT / "benchmarks")
        for path in package.rglob("*.py")
        if re.search(r"^\w+ = NDArray\[np\.(int64|float64|float32|bool_)\]$", path.read_text("utf-8"), re.M)
    ]
    assert naming == ["tempo_mlx/arrays.py"]
