"""The original's demonstration of early exit, as a few lines over `tempo-mlx generate`.

python scripts/early_exit_demo.py --prompt "The capital of France is" --compare
"""

from __future__ import annotations

import argparse
import sys

from tempo_mlx.cli.main import main
from tempo_mlx.load_config import DEFAULT_MODEL


def arguments() -> list[str]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--prompt", default="Once upon a time in a distant galaxy")
    parser.add_argument("--max-tokens", default="64")
    parser.add_argument("--exit-layers", help="Layers from 0, such as 3,7,11,15.")
    parser.add_argument("--confidence-thresholds", help="One for each of them, such as 0.7,0.75,0.8,0.9.")
    parser.add_argument("--raw-confidence", action="store_true", help="As the original did it: uncalibrated.")
    parser.add_argument("--compare", action="store_true", help="Beside full and lossless decoding.")
    given = parser.parse_args()
    result = ["generate", given.prompt, "--model", given.model, "--max-tokens", given.max_tokens]
    result += ["--default-mode", "--temperature", "0", "--early-exit"]
    for name in ("exit_layers", "confidence_thresholds"):
        if getattr(given, name) is not None:
            result += ["--" + name.replace("_", "-"), getattr(given, name)]
    for name in ("raw_confidence", "compare"):
        if getattr(given, name):
            result.append("--" + name.replace("_", "-"))
    return result


if __name__ == "__main__":
    sys.exit(main(arguments()))
