"""`python -m tempo_mlx` is `tempo-mlx`; Ctrl-C ends it without a traceback, even while it is being imported."""

import signal
import sys


def main() -> int:
    """The command line's exit code. Ctrl-C may end the program at once before it runs, and after."""
    before = signal.getsignal(signal.SIGINT)
    outside = signal.SIG_IGN if before is signal.SIG_IGN else signal.SIG_DFL
    signal.signal(signal.SIGINT, outside)
    from tempo_mlx.cli.main import main as run

    try:
        signal.signal(signal.SIGINT, before)
        return run()
    except KeyboardInterrupt:  # while it said what was wrong
        return 130
    finally:
        signal.signal(signal.SIGINT, outside)


if __name__ == "__main__":
    sys.exit(main())
