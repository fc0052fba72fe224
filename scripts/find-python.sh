#!/bin/sh
# Prints the newest Python from 3.10 on that can make a virtual environment; else says what to do, and fails.
without_venv=
for name in python3.14 python3.13 python3.12 python3.11 python3.10 python3; do
    command -v "$name" >/dev/null 2>&1 || continue
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
        command -v "$name"
        exit 0
    fi
    without_venv=$name
done
if [ -n "$without_venv" ]; then
    echo "$without_venv cannot make virtual environments; install its venv package (Debian, Ubuntu: sudo apt install $without_venv-venv) and try again." >&2
else
    echo "No Python 3.10 or newer was found; install one (macOS: brew install python, Debian and Ubuntu: sudo apt install python3 python3-venv) and try again." >&2
fi
exit 1
