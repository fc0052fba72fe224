"""What an early-exit run did and what that saved, from what its parts took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tempo_mlx.decode.exit_plan import OpenExit


class Account:
    """Seconds by kind of work, and how deep each pass went."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.passes = self.depth = (
            0  # passes of a step, and the layers that they went through before the answer
        )
        self.left = 0  # passes that left early
        self.layer_seconds = self.head_seconds = self.look_seconds = self.audit_seconds = 0.0
        self._alone = (0, 0.0)  # layers that ran one pass's rows alone, and their seconds
        self.heads = 0  # times that the full head was run for a pass

    def ran(self, layers: int, alone: bool, seconds: float) -> None:
        self.layer_seconds += seconds
        if alone:
            self._alone = self._alone[0] + layers, self._alone[1] + seconds

    def headed(self, seconds: float) -> None:
        self.heads += 1
        self.head_seconds += seconds

    def looked(self, seconds: float) -> None:
        self.look_seconds += seconds

    def audited(self, seconds: float) -> None:
        self.audit_seconds += seconds

    def passed(self, depth: int) -> None:
        self.passes += 1
        self.depth += depth

    def timing(self) -> dict[str, float]:
        """Shares of the time of going all the way with every pass, as far as it can be told from this run: saved by
        layers (catching up taken off), saved by the vocabulary head (looks and audits taken off).
        """
        if not (self.passes and self.heads and self._alone[0]):
            return {}
        layers = self.passes * self.layers * self._alone[1] / self._alone[0]
        heads = self.passes * self.head_seconds / self.heads
        return {
            "early_exit_saved_by_layers": (layers - self.layer_seconds) / (layers + heads),
            "early_exit_saved_by_head": (heads - self.head_seconds - self.look_seconds - self.audit_seconds)
            / (layers + heads),
        }

    def report(self, exits: Sequence[OpenExit], **policy: Any) -> dict[str, Any]:
        """The `early_exit` section of a run: what happened, without times."""
        audited, agreed = sum(item.audited for item in exits), sum(item.agreed for item in exits)
        return {
            **policy,
            "passes": self.passes,
            "mean_layers": self.depth / self.passes if self.passes else None,
            "agreement": agreed / audited if audited else None,
            "exits": [
                {
                    "layer": item.layer, "target": item.target, "least": item.least, "left": item.left,
                    "audited": item.audited, "agreed": item.agreed, "closed": item.closed,
                }
                for item in exits
            ],
        }  # fmt: skip
