#!/bin/sh
# The web page's tests: formatting, types, lint, state logic, the build, and the page in Chromium against the real server.
# Needs Node.js and Chromium; on Debian it installs Chromium itself when it may. PYTHON: an environment with [server];
# TEMPO_WEB_CODE_MODEL: weights of a model that writes code, for the one test that needs it.
set -eu
cd "$(dirname "$0")/.."

if [ -z "${CHROMIUM:-}" ] && ! [ -x /usr/bin/chromium ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation >/dev/null
    else
        echo "Chromium was not found; install it (Debian: apt-get install chromium), or set CHROMIUM to its path." >&2
        exit 1
    fi
fi

(
    cd tempo_mlx/server/web
    npm run check
    npm run unit
    npm run build
    size=$(cat dist/assets/* | gzip -9 | wc -c)
    echo "The page is $size bytes, compressed."
    test "$size" -lt 300000
)
if [ -n "${CI:-}" ] && [ -n "$(git status --porcelain tempo_mlx/server/web/dist)" ]; then
    echo "tempo_mlx/server/web/dist is not what its sources build; run \`make web\` and commit it." >&2
    git diff --stat -- tempo_mlx/server/web/dist >&2
    exit 1
fi
nice node --test --test-concurrency=1 tests/web/*.test.mjs
