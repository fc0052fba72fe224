#!/bin/sh
# Whether the oldest versions that pyproject.toml allows do work with this Python: installs them (base and [server],
# the oldest that have a wheel) beside the newest test tools, runs `pytest --fast`, continues a prompt, asks a server.
# PYTHON: which Python; CI takes each of its matrix.
set -eu
cd "$(dirname "$0")/.."

python=$(scripts/find-python.sh)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM

"$python" -m venv "$folder/tools"
"$python" -m venv "$folder/oldest"
"$folder/tools/bin/python" -m pip install --quiet --disable-pip-version-check uv
oldest="$folder/oldest/bin"
install() {
    "$folder/tools/bin/uv" pip install --quiet --python "$oldest/python" --only-binary :all: --no-binary tempo-mlx "$@"
}

install --resolution lowest-direct -e '.[server]'
"$folder/tools/bin/uv" pip freeze --quiet --python "$oldest/python" --exclude-editable >"$folder/kept"
cat "$folder/kept"
install --constraint "$folder/kept" hatchling httpx hypothesis packaging pandas pyte pytest

"$oldest/python" -m pytest --fast -rfE
"$oldest/tempo-mlx" doctor
"$oldest/tempo-mlx" generate "The capital of France is" --max-tokens 8
"$oldest/python" scripts/ask_server.py
