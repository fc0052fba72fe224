"""What is compared: each arm is an ordinary configuration and says what is read off its runs.

Readings of a run:

- `texts`: the five texts (one for greedy and tree search) that the decoder itself gives;
- `first`: the first of them;
- `best`: the most probable path of a lattice (Viterbi), what `final_text` says;
- `drawn`: paths drawn along the edges of a lattice (forward filtering, backward sampling);
- `random`: a member of each set, drawn uniformly: text that ignores the edges, the hardest test of pruning;
- `thinned: SIGNAL`: such random paths after a share of the removable members was removed, lowest scores first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TEXTS = 5
LATTICE = ("best", "drawn", "random")


@dataclass(frozen=True)
class Arm:
    """`prompts`: how many prompts of the split at most (None: all); studies of one factor take fewer. `worth`: of more
    than five texts five are kept as `best_of` keeps branches, a new pair of tokens being worth so many nats.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    readings: tuple[str, ...] = ("texts",)
    prompts: int | None = None
    label: str = ""
    worth: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)


OTHERS = 24  # prompts of decoders that no claim is about, and which are nobody's rival
STUDY = 18  # prompts of a study of one factor
COSTLY = 12  # prompts of what runs ten times as many rows


def _branches(name: str, label: str, prompts: int | None = OTHERS, **settings: Any) -> Arm:
    return Arm(name, {"branches": TEXTS, **settings}, prompts=prompts, label=label)


def _sample(name: str, label: str, prompts: int | None = OTHERS, **settings: Any) -> Arm:
    return Arm(name, {"decoder": "sample", **settings}, prompts=prompts, label=label)


def _diverse(strength: float, prompts: int | None = OTHERS) -> Arm:
    settings = {"decoder": "diverse-beam", "diversity_strength": strength}
    return Arm(f"diverse-beam-{strength:g}", settings, prompts=prompts, label=f"diverse beam {strength:g}")


def _diverse_of_eight(name: str, strength: float, prompts: int | None = OTHERS) -> Arm:
    settings = {"decoder": "diverse-beam", "diversity_strength": strength, "beam_width": 8}
    label = f"diverse beam {strength:g}, best of 8"
    return Arm(name, settings, prompts=prompts, label=label, worth=strength)


def _lattice(name: str, **settings: Any) -> Arm:
    return Arm(name, settings, LATTICE, STUDY, label=name.replace("-", " "))


GREEDY = Arm("greedy", {"decoder": "plain", "temperature": 0.0})
BEAM = Arm("beam", {"decoder": "beam"}, label="beam 5")
# As many rows as a lattice of the defaults has: what a lattice's best path is to be held against.
BEAM_OF_TWO = Arm("beam-2", {"decoder": "beam", "beam_width": 2}, ("first",), label="beam 2")
NUCLEUS = _sample("nucleus", "nucleus 0.9", None, top_p=0.9)
COOL = _sample("nucleus-cool", "nucleus 0.9, T 0.7", None, top_p=0.9, temperature=0.7)
THRESHOLD = _sample("threshold", "sampling at p >= 0.1", None)
MIN_P = _sample("min-p", "min-p 0.1", None, min_p=0.1)
BRANCHES = _branches("branches", "branches", None)
SAMPLED = _branches("branches-sample", "branches, sampled", None, branch_choice="sample")
DIVERSE = _branches("branches-diversity-1", "branches, diversity 1", None, branch_diversity=1.0)
DIVERSE_BEAM_OF_EIGHT = _diverse_of_eight("diverse-beam-5-of-8", 1.0, None)
FIVE_OF_EIGHT = _branches(
    "branches-5-of-8", "branches, diversity 1, best of 8", None, branch_diversity=1.0, best_of=8
)
LINEAGE = Arm("lineage", {}, (*LATTICE, "thinned: posterior", "thinned: probability"))

# What the claims are about comes first and is run on every prompt of the test split.
MAIN = (
    GREEDY,
    BEAM,
    _diverse(1.0, None),
    NUCLEUS,
    BRANCHES,
    SAMPLED,
    DIVERSE,
    FIVE_OF_EIGHT,
    DIVERSE_BEAM_OF_EIGHT,
    LINEAGE,
    BEAM_OF_TWO,
    _diverse(0.5, None),
    _branches("branches-diversity-0.5", "branches, diversity 0.5", branch_diversity=0.5),
    COOL,
    THRESHOLD,
    MIN_P,
    Arm("lineage-paths", {"paths": TEXTS}, prompts=COSTLY, label="lattice, 5 paths"),
    Arm(
        "mcts",
        {"use_mcts": True, "mcts_simulations": 8, "mcts_depth": 3},
        prompts=COSTLY,
        label="tree search",
    ),
)
# One factor of the lattice changed at a time.
STUDIES = (
    *(_lattice(f"attend-{rule}", attend=rule) for rule in ("all", "weighted", "best")),
    *(_lattice(f"combine-{rule}", combine=rule) for rule in ("last", "mean", "product", "max")),
    *(_lattice(f"threshold-{value}", threshold=value) for value in (0.05, 0.2)),
    *(_lattice(f"width-{cap}", max_parallel_tokens=cap) for cap in (2, 4)),
    _lattice("pruned-posterior", use_retroactive_pruning=True),
    _lattice("pruned-attention", attention_threshold=0.01),
    _lattice("preset-original", preset="original"),
)
# What draws: with another seed it gives other texts.
DRAWING = (NUCLEUS, SAMPLED, COOL, THRESHOLD, MIN_P)
# Those of the claims, where the model ends its texts itself.
LONG = (GREEDY, BEAM, _diverse(1.0, None), NUCLEUS, BRANCHES, SAMPLED, FIVE_OF_EIGHT, LINEAGE)
# What was tried to move the front, on the tuning split only: of ours, and of what they are held against.
TUNING = (
    GREEDY,
    BEAM,
    NUCLEUS,
    *(_diverse(strength) for strength in (0.5, 1.0)),
    BRANCHES,
    SAMPLED,
    _branches("branches-diversity-0.5", "branches, diversity 0.5", branch_diversity=0.5),
    DIVERSE,
    _branches("branches-diversity-2", "branches, diversity 2", branch_diversity=2.0),
    *(
        _branches(f"sample-T-{t}", f"branches, sampled, T {t}", branch_choice="sample", temperature=t)
        for t in (0.5, 0.7)
    ),
    *(_branches(f"branches-merge-{n}", f"branches, merge {n}", merge_length=n) for n in (0, 5)),
    *(
        Arm(f"paths-{name}", {"paths": TEXTS, **settings}, prompts=COSTLY, label=f"lattice, 5 paths{label}")
        for name, label, settings in (
            ("full", "", {}),
            ("pruned", ", pruned by posterior", {"use_retroactive_pruning": True}),
        )
    ),
    _branches("sample-5-of-8", "branches, sampled, best of 8", branch_choice="sample", best_of=8),
    *(
        _branches(
            f"diversity-{d:g}-5-of-8", f"branches, diversity {d:g}, best of 8", branch_diversity=d, best_of=8
        )
        for d in (0.5, 1.0)
    ),
    *(_diverse_of_eight(f"diverse-beam-{strength:g}-5-of-8", strength) for strength in (0.5, 1.0, 2.0)),
    *(_sample(f"nucleus-{p}", f"nucleus {p}", top_p=p) for p in (0.8, 0.95)),
    *(_sample(f"min-p-{p}", f"min-p {p}", min_p=p) for p in (0.05, 0.1, 0.2)),
    *(_sample(f"sampling-{p}", f"sampling at p >= {p}", threshold=p) for p in (0.05, 0.1, 0.2)),
)
