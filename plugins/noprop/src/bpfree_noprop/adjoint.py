"""The adjoint-sensitivity baseline of the NoProp paper: one block as a neural ordinary differential equation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bpfree.errors import BpfreeError
from bpfree.network.network import Network
from bpfree.options import OptimizerConfig, option
from bpfree.rule import Card, Metrics, Traits, always
from bpfree.step import Batch, Step
from bpfree.tasks.task import TaskSpec
from bpfree_noprop.base import PAPER, TARGETS, inputs_of
from bpfree_noprop.timed_rules import TimedConfig, TimedRule

__all__ = ["NoPropAdjoint", "NoPropAdjointConfig"]


@dataclass
class NoPropAdjointConfig(TimedConfig):
    """Options of the adjoint baseline."""

    training_steps: int = option(50, "of the solver in training, forwards and backwards (the paper: 1000)", ge=1)
    solver: Literal["euler", "midpoint", "heun2", "rk4"] = option("euler", "fixed-step method of torchdiffeq")
    inference: Literal["deterministic", "sampled"] = option("deterministic", "from z_0 = 0, or (the paper) from noise")


class Velocity(nn.Module):
    """``dz/dt = uhat(z, x, t) - z`` for one batch, as torchdiffeq calls it: f(t, z).

    Args:
        rule: gives the block and the embedding.
        features: (N, F) of the batch's inputs.
    """

    def __init__(self, rule: NoPropAdjoint, features: Tensor) -> None:
        super().__init__()
        self._rule = (rule,)  # no child: its parameters are named one by one
        self._features = features

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        (rule,) = self._rule
        return rule.estimate(rule.block.judge(self._features, z, rule.block.moments(t.reshape(1)))) - z


class NoPropAdjoint(TimedRule):
    """``dz/dt = uhat(z, x, t) - z`` on [0, 1] from ``z(0) ~ N(0, I)``, cross-entropy of the head at 1.

    The paper names the method and gives no equation: this is our reading. Gradients come from the adjoint equation, solved backwards
    in time with memory that does not grow with the number of steps (Chen et al. 2018). The image's features enter as a parameter of
    the equation: computed once per batch, with one dropout mask for the whole path, and their gradient continues into the stem.
    """

    Config = NoPropAdjointConfig
    config: NoPropAdjointConfig
    card = Card(
        "adjoint sensitivity: NoProp's time-conditioned block as a neural ODE, the NoProp paper's own baseline",
        paper=f"{PAPER}. Chen, Rubanova, Bettencourt, Duvenaud: Neural Ordinary Differential Equations. NeurIPS 2018, arXiv 1806.07366",
        equation="dz/dt = softmax(f(x, z, t)) W - z, z(0) ~ N(0, I);  L = CE(head(z(1)), y)",
        notes="Back-propagation through time by torchdiffeq's odeint_adjoint, for comparison. The paper gives no equations: ours is a "
        "reading. Each update takes many steps forwards and as many backwards (1000 in the paper, which trains for two to four epochs).",
    )
    optimizer_of = always(OptimizerConfig("adamw", lr=1e-3, weight_decay=1e-3))
    waivers: ClassVar[dict[str, str]] = {"no-host-sync": "torchdiffeq reads its grid of times on the host, at each call"}

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropAdjointConfig | None = None) -> None:
        super().__init__(network, spec, config)
        import_torchdiffeq()

    @classmethod
    def traits_of(cls, config: NoPropAdjointConfig, network: Network | None = None) -> Traits:
        """Declare the traits of one block: credit crosses no other block, but passes through all steps inside it."""
        return Traits(
            "independent",
            0,
            1,
            passes=config.training_steps,
            chain=False,
            readout="none",
            targets=TARGETS,
            inputs=inputs_of(network),
            own_loss=False,
        )

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        small = super().specimen(kind, depth, width)
        return small and {"rule.training_steps": 5, "rule.steps": 5, "rule.validation_steps": 5, **small}

    def objective(self, batch: Batch, step: Step) -> Tensor:
        """Return the loss, with a graph through every step of the solver."""
        return self.loss(
            self.solve("odeint", self.features_of(batch, step), self.noise_for(batch, step), self.config.training_steps), batch
        )

    def credit(self, batch: Batch, step: Step) -> Metrics:
        features = self.features_of(batch, step)
        start = self.noise_for(batch, step)
        # A leaf: the adjoint equation differentiates at each of its steps, not through the stem; gradients sum over steps.
        leaf = features.detach().to(start.dtype).requires_grad_(features.requires_grad)
        parameters = [p for p in (*self.block.parameters(), *self.embed.parameters(), leaf) if p.requires_grad]
        z = self.solve("odeint_adjoint", leaf, start, self.config.training_steps, adjoint_params=tuple(parameters))
        loss = self.loss(z, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if leaf.grad is not None:
            features.backward(leaf.grad.to(features.dtype))  # type: ignore[no-untyped-call]
        return {"loss": loss.detach()}

    def features_of(self, batch: Batch, step: Step) -> Tensor:
        """Return the input features (N, F) with one dropout mask for the whole path."""
        with self.block.masks(step.generator_for, "block"):
            return self.block.features(batch.inputs)

    def noise_for(self, batch: Batch, step: Step) -> Tensor:
        """Draw z(0) (N, d) of a training step."""
        return self.start(batch.inputs, step.generator_for("start"))

    def loss(self, z: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the head on z(1)."""
        return self.head_loss(z, self.rows(batch))

    def solve(self, name: str, features: Tensor, start: Tensor, steps: int, **options: Any) -> Tensor:
        """Integrate from z(0) to z(1) (N, d) by a function of torchdiffeq."""
        shares = torch.linspace(0, 1, steps + 1, dtype=start.dtype, device=start.device)
        ends = torch.linspace(0, 1, 2, dtype=start.dtype, device=start.device)
        integrate = getattr(import_torchdiffeq(), name)
        grid = {"grid_constructor": lambda f, y, t: torch.lerp(t[0], t[-1], shares)}  # its own, of a step's size, has one too many for some
        path = integrate(Velocity(self, features), start, ends, method=self.config.solver, options=grid, **options)
        return path[-1]  # type: ignore[no-any-return]

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        """Return scores (N, m), or real values of the target's shape, of the head at t = 1."""
        start = self.start(inputs, generator if self.config.inference == "sampled" else None)
        z = self.solve("odeint", self.block.features(inputs), start, self.steps)
        return self.shaped(self.head(z, self.embed))


def import_torchdiffeq() -> Any:
    """Import torchdiffeq, the library of solvers, when it is needed.

    Raises:
        BpfreeError: it is not installed.
    """
    try:
        import torchdiffeq
    except ImportError as error:
        raise BpfreeError(
            f"the adjoint baseline needs torchdiffeq ({error})", where="rule noprop-adjoint", fix="pip install torchdiffeq"
        ) from error
    return torchdiffeq
