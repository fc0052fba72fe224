"""Verification: everything that a run file says, computed anew.

`recompute` puts the parts together: `claims` reads what the run claims to be, `arithmetic` checks what follows from the
file alone, `dense` is the one forward pass, `lattice`, `tree` and `search` replay the decoders on it, `choices` holds
sets against the selection rule, `texts` reads every text anew. `book` keeps what they find. `rerun` compares two runs.
"""

from tempo_mlx.report.verify.book import KV_TOLERANCES, Difference, Verification, tolerance_for
from tempo_mlx.report.verify.claims import decode_settings, require_settings
from tempo_mlx.report.verify.recompute import verify
from tempo_mlx.report.verify.rerun import Comparison, compare

__all__ = [
    "KV_TOLERANCES",
    "Comparison",
    "Difference",
    "Verification",
    "compare",
    "decode_settings",
    "require_settings",
    "tolerance_for",
    "verify",
]
