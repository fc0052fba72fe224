"""`python -m tempo_mlx` is `tempo-mlx`."""

import sys

from tempo_mlx.cli.main import main

sys.exit(main())
