#!/bin/sh
# Prints the Python to use, PYTHON or the newest from 3.10 on that can make a virtual environment; else says what to do,
# and fails. So it does where MLX publishes no wheel: pip would only say that it found no version.

at_least() { # whether version $1 is $2.$3 or newer
    major=${1%%.*}
    rest=${1#"$major"}
    rest=${rest#.}
    minor=${rest%%.*}
    [ "$major" -gt "$2" ] || { [ "$major" -eq "$2" ] && [ "${minor:-0}" -ge "$3" ]; }
}

refuse() {
    echo "MLX needs macOS 14 or newer on Apple silicon, or Linux with glibc 2.35 or newer (from Debian 12, Ubuntu 22.04 on); this is $1." >&2
    exit 1
}

case "$(uname -s) $(uname -m)" in
    "Darwin arm64")
        version=$(sw_vers -productVersion)
        at_least "$version" 14 0 || refuse "macOS $version"
        ;;
    "Darwin "*) refuse "a Mac with another processor ($(uname -m))" ;;
    "Linux x86_64" | "Linux aarch64")
        glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || refuse "a Linux with another C library"
        at_least "${glibc#glibc }" 2 35 || refuse "a Linux with $glibc"
        ;;
    *) refuse "$(uname -s) on $(uname -m)" ;;
esac

without_venv=
for name in ${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3.10 python3}; do
    command -v "$name" >/dev/null 2>&1 || continue
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
        command -v "$name"
        exit 0
    fi
    without_venv=$name
done
if [ -n "$without_venv" ]; then
    echo "$without_venv cannot make virtual environments; install its venv package (Debian, Ubuntu: sudo apt install ${without_venv##*/}-venv) and try again." >&2
elif [ -n "${PYTHON:-}" ]; then
    echo "PYTHON=$PYTHON is no Python 3.10 or newer; give the path of one, or leave it out." >&2
else
    echo "No Python 3.10 or newer was found; install one (macOS: brew install python, Debian and Ubuntu: sudo apt install python3 python3-venv) and try again." >&2
fi
exit 1
