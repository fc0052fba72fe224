"""`python -m tempo_mlx` is `tempo-mlx`; Ctrl-C ends it without a traceback, even while it is being imported."""

import signal
import sys


def main() -> int:
    """The command line's exit code. Nothing is under way before it is there, so Ctrl-C may end the program at once."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tempo_mlx.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    return run()


if __name__ == "__main__":
    sys.exit(main())
