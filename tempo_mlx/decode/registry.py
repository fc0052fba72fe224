"""The decoders there are, by the name that `--decoder` and a run's file give them."""

from __future__ import annotations

from collections.abc import Mapping

from tempo_mlx.decode.beam import BEAM, DIVERSE_BEAM
from tempo_mlx.decode.branches import TREE
from tempo_mlx.decode.decoder import DecoderSpec
from tempo_mlx.decode.enumeration import ENUMERATE
from tempo_mlx.decode.mcts import MCTS
from tempo_mlx.decode.sampling import SAMPLE
from tempo_mlx.decode.tempo import PLAIN, SUPERPOSED

DECODERS: Mapping[str, DecoderSpec] = {
    spec.name: spec for spec in (SUPERPOSED, TREE, ENUMERATE, MCTS, BEAM, DIVERSE_BEAM, SAMPLE, PLAIN)
}
