"""What an early-exit run did and what that saved, from what its parts took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tempo_mlx.exits.plan import OpenExit


class Account:
    """Seconds by kind of work, and how deep each pass went."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.passes = 0  # of a step
        self.depth = 0  # layers that those went through before the answer
        self.left = 0  # passes that left early
        self.drafted = self.accepted = 0  # rows run ahead, and those that were asked for
        self.ahead, self.ahead_seconds = 0, 0.0  # passes that guesses were run with, and what they took
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

    @property
    def spent(self) -> tuple[float, float, float, int]:
        """Seconds of layers, head and looks, and how often the head was run."""
        return self.layer_seconds, self.head_seconds, self.look_seconds, self.heads

    def ran_ahead(self, before: tuple[float, float, float, int]) -> None:
        """What was spent since `before` was for a pass and for guesses at those after it."""
        self.ahead += 1
        self.ahead_seconds += sum(self.spent[:3]) - sum(before[:3])
        self.layer_seconds, self.head_seconds, self.look_seconds, self.heads = before

    def timing(self) -> dict[str, float]:
        """Shares of the time of going all the way with every pass, as far as it can be told from this run: saved by
        layers (catching up taken off), by the vocabulary head (looks and audits taken off), and by running ahead.
        """
        if not (self.passes and self.heads and self._alone[0]):
            return {}
        layers, head = self.layers * self._alone[1] / self._alone[0], self.head_seconds / self.heads
        alone = self.passes - self.accepted - self.ahead  # passes that had nothing to do with guesses
        saved = {
            "layers": alone * layers - self.layer_seconds,
            "head": alone * head - self.head_seconds - self.look_seconds - self.audit_seconds,
            "lookup": (self.accepted + self.ahead) * (layers + head) - self.ahead_seconds,
        }
        full = self.passes * (layers + head)
        return {f"early_exit_saved_by_{name}": seconds / full for name, seconds in saved.items()}

    def report(self, exits: Sequence[OpenExit], **policy: Any) -> dict[str, Any]:
        """The `early_exit` section of a run: what happened, without times."""
        audited, agreed = sum(item.audited for item in exits), sum(item.agreed for item in exits)
        return {
            **policy,
            "passes": self.passes,
            "mean_layers": self.depth / self.passes if self.passes else None,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "agreement": agreed / audited if audited else None,
            "exits": [
                {
                    "layer": item.layer, "target": item.target, "least": item.least, "left": item.left,
                    "audited": item.audited, "agreed": item.agreed, "closed": item.closed,
                }
                for item in exits
            ],
        }  # fmt: skip
