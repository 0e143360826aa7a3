"""Options of BurstCCN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bpfree import option

__all__ = ["BurstCCNConfig"]

APICAL = {"Y_learning": ("apical", "apical-events")}


@dataclass
class BurstCCNConfig:
    """Regimes of the two kinds of feedback weights, and the variants of both versions of the paper."""

    Y: Literal["random", "symmetric", "tied"] = option(
        "random",
        "facilitating feedback, which hears bursts: random, or the forward weights at the start (symmetric) or after every update (tied)",
    )
    Q: Literal["symmetric", "tied", "random", "forward"] = option(
        "symmetric",
        "depressing feedback, which hears events: p0 Y at the start (symmetric) or after every update (tied), random, or p0 times the "
        "forward weights at the start",
    )
    Y_learning: Literal["none", "apical", "apical-events", "kolen-pollack"] = option(
        "none",
        "Y learns to silence the apical potential (from bursts, as in the journal version, or from events), or as the forward weights do",
        unless={"Y": ("tied",)},
    )
    Q_learning: Literal["none", "apical", "kolen-pollack"] = option(
        "apical", "Q learns to silence the apical potential, or as p0 times the forward weights do", unless={"Q": ("tied",)}
    )
    Y_scale: float | None = option(
        None,
        "size of Y: of a random one, its deviation over that of Xavier's normal weights with gain 3.6 (none: 3); of another, a factor on "
        "the forward weights (none: 1)",
        gt=0,
    )
    Y_std: float | None = option(
        None, "deviation of a random Y, in place of Y_scale; 0.5 in the notebook of Greedy et al.", gt=0, needs={"Y": ("random",)}
    )
    Q_scale: float = option(
        1.0, "size of a Q that does not begin as p0 Y, over p0 times what Y_scale=1 is", gt=0, needs={"Q": ("random", "forward")}
    )
    Y_lr: float = option(4e-3, "rate of a Y that silences the apical potential", gt=0, needs=APICAL)
    Q_lr: float = option(7.31e-4, "rate of a Q that silences the apical potential", gt=0, needs={"Q_learning": ("apical",)})
    p0: float = option(0.5, "burst probability without apical input", gt=0, le=0.5)
    error_scale: float = option(1.0, "strength of the teacher at the output", gt=0)
    local_scales: list[float] = option(
        factory=list, help="factor on the apical potential of each hidden block, the last one repeats (none: 1)", gt=0
    )
    updates: Literal["raw", "gradient"] = option(
        "raw", "changes of burst rates as they are, or over p0, error_scale and the scales above: of the size of a gradient"
    )
    output: Literal["sigmoid", "softmax"] = option("sigmoid", "event rates of the output; softmax descends the cross-entropy")
    output_shift: float = option(
        1.0,
        "added to a softmax's event rates where bursts code its error, since an output that is hardly active can hardly burst",
        ge=0,
        needs={"output": ("softmax",)},
    )
    ramp: float = option(
        0.0,
        "units that are no sigmoids take min(ramp e, 1) of their apical input at an event rate of e, since silent ones cannot burst; 0: "
        "all of it; 5 for relu-rms in the journal version",
        ge=0,
    )
    noise: float = option(0.0, "deviation of normal noise on the input of each block in training", ge=0)
    rest_epochs: int = option(0, "epochs at the start without teacher, in which feedback weights alone learn to be silent", ge=0)
    rest_every: int = option(0, "every n-th step is without a teacher: only feedback weights learn from it; 0: none", ge=0)
    branches: int = option(1, "apical branches: each hears its share of the units above, and teaches its own part of Y", ge=1, needs=APICAL)
    measure_every: int = option(
        25, "steps between measurements of apical potential, rates, silence and the angle of feedback and forward weights; 0: never", ge=0
    )
