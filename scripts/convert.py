"""Thin entry to `tempo-mlx convert`, for those who look for it here: python scripts/convert.py SRC DST ..."""

import sys

from tempo_mlx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
