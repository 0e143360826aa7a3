"""Prediction in discrete time: what each block makes of the input once, then the chain of states.

A chain is executed in one of three ways. ``deterministic`` follows the mean of Eq. 3 from ``z_0 = 0``. ``sampled`` draws its noise (the
paper). ``class-sampled`` draws a class y from each block's belief, and ``z_t`` from ``q(z_t|z_{t-1}, y)``, where the paper puts the mean
of the embeddings in place of ``u_y``, which leaves out what the block does not know. With exact beliefs ``p(y|x, z_{t-1})`` it is the
joint distribution itself, whatever T, and draws classes from ``p(y|x)``; sets of labels, if these are independent given x and z.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.tasks.task import Examples, TaskSpec
from bpfree_noprop.base import UNMEASURED
from bpfree_noprop.blocks import DenoisingBlock
from bpfree_noprop.chain import ChainRule
from bpfree_noprop.embeddings import ClassEmbedding, full_precision
from bpfree_noprop.folded import FoldedChain
from bpfree_noprop.heads import RealHead
from bpfree_noprop.readouts import Judgements, Readout, another_of_its_class
from bpfree_noprop.schedule import NoiseSchedule, signal_shares, standard_normal
from bpfree_noprop.spread import match_spread
from bpfree_noprop.states import OWN, evidence

__all__ = ["DiscreteChain", "Inference", "View"]

Inference = Literal["deterministic", "sampled", "class-sampled"]
ROWS = 2**14
"""States that are drawn at a time by :meth:`DiscreteChain.sample`, at least those of one draw."""


class DiscreteChain(ChainRule):
    """What ``noprop-dt`` does at prediction.

    Attributes:
        blind: whether blocks have learned without a state.
        residuals: (T+1, d, d), for real targets: the residual covariance ``V_t`` of each block, measured by :meth:`calibrate`.
        spread: by which they are multiplied so that draws spread as far as their mean is off; 1 where it was not measured.
        error: squared error of the mean of draws where it was held out, per dimension of the whitened target.
    """

    schedule: NoiseSchedule
    residuals: Tensor
    spread: Tensor
    error: Tensor

    def __init__(self, network: Network, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.schedule = NoiseSchedule(signal_shares(self.config.schedule, self.config.T, self.config.clip))
        chained = self.draws_states(self.config) or spec.targets == "real"
        self.blind = self.config.state == "noise" or (self.config.state == "auto" and not chained)
        self.register_buffer("blind_blocks", torch.tensor(self.blind))
        if isinstance(self.head, RealHead):
            d = self.embed.weight.shape[0]
            self.head.signal = self.schedule.last_signal
            self.register_buffer("residuals", torch.zeros(self.config.T + 1, d, d))
            self.register_buffer("spread", torch.ones(()))
            self.register_buffer("error", torch.zeros(()))

    def check_options(self) -> None:
        super().check_options()
        if self.spec.targets == "real" and self.config.inference == "class-sampled":
            fix = "rule.inference=sampled, whose steps draw what a block does not know"
            raise UsageError("real targets have no classes to draw", where="rule.inference=class-sampled", fix=fix)

    @classmethod
    def draws_states(cls, config: Any) -> bool:
        """Tell whether blocks learn on noised labels: where these, a chain, or draws are asked for (and for real targets)."""
        chained = config.inference != "deterministic" or config.readout in ("chain", "path")
        return config.state == "noised" or (config.state == "auto" and chained)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *further: Any) -> None:
        """Keep what the blocks have learned on, whatever predictions are asked for.

        Weights of version 0.2 do not say it: there, blind blocks had to be asked for.
        """
        told = torch.tensor(self.config.state == "noise")
        self.blind = bool(state_dict.setdefault(f"{prefix}blind_blocks", told))
        super()._load_from_state_dict(state_dict, prefix, *further)

    @property
    def readout(self) -> Readout:
        """What predicts: if nothing is said, the product of blind blocks, or the chain."""
        if self.config.readout != "auto":
            return cast(Readout, self.config.readout)
        return "product" if self.blind and self.spec.targets != "real" else "chain"

    # --- the chain ------------------------------------------------------------------------------------------------------

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        """Return what the head says of the chain's end (its mean path from ``z_0 = 0``, or with draws), or another readout.

        Log-probabilities (N, m) of classes, logits of labels, or values of the target's shape.
        """
        return self.read(self.view(inputs), generator)

    def read(self, features: Any, generator: torch.Generator) -> Tensor:
        """Predict from what the blocks see of the inputs."""
        readout, noise, looks = self.readout, self.noise(generator), self.looks(features)
        if readout == "chain":
            return self.shaped(self.last(looks, noise))
        if readout in ("mean", "product") and noise is None:  # there is no path to follow
            return self.shaped(Judgements([self.alone(view, None) for view in looks], (), ()).read(readout, self.embed))
        return self.shaped(self.judgements(list(looks), noise).read(readout, self.embed))

    def noise(self, generator: torch.Generator, kind: Inference | None = None) -> Noise | None:
        """Return what the steps of a kind of inference draw, by default the rule's; ``None``: nothing."""
        kind = self.config.inference if kind is None else kind
        return None if kind == "deterministic" else Noise(generator, classes=kind == "class-sampled")

    def views(self, features: Any) -> list[View]:
        """Let each block compute of the inputs alone what all states need."""
        return list(self.looks(features))

    def looks(self, features: Any) -> Iterator[View]:
        """Let one block after the other do it: features that are kept for later ones lie between large buffers, which then wander."""
        return (View(t, block, block.features(features)) for t, block in self.denoisers())

    def first(self, like: Any, noise: Noise | None) -> Tensor:
        """Return ``z_0`` (N, d): a draw of N(0, I), or 0."""
        return self.start(like, None if noise is None else noise.generator)

    def met(self, z: Tensor, noise: Noise | None) -> Tensor:
        """Return the state that a block meets in inference: ``z`` (N, d), or one that says nothing, for blocks that are blind."""
        return self.first(z, noise) if self.blind else z

    def shown(self, z: Tensor) -> Tensor:
        """Return what a block is given of its states: nothing where what they say is added to its outputs."""
        return torch.zeros_like(z) if self.config.state == "analytic" else z

    def answer(self, t: int, outputs: Tensor, z: Tensor) -> Tensor:
        """Return the logits (N, m) of block t, which knows ``z_{t-1}`` (N, d), from its outputs."""
        if self.config.state != "analytic":
            return outputs
        return outputs + evidence(cast(ClassEmbedding, self.embed), z, self.schedule.share(t - 1))

    def ask(self, view: View, z: Tensor) -> Tensor:
        """Return the logits (N, m) of a block on ``z_{t-1}`` (N, d)."""
        return self.answer(view.t, view.block.judge(view.features, self.shown(z)), z)

    def alone(self, view: View, noise: Noise | None) -> Tensor:
        """Return the logits (N, m) of a block without a state: for 0, or noise."""
        return view.block.judge(view.features, self.first(view.features, noise))

    def last(self, views: Iterable[View], noise: Noise | None) -> Tensor:
        """Return what the head says of the chain's end (Eq. 3); its mean path without noise."""
        z: Tensor | None = None
        for view in views:
            z = self.first(view.features, noise) if z is None else z
            z = self.advance(z, self.ask(view, self.met(z, noise)), view.t, noise)
        return self.head(z, self.embed)  # type: ignore[no-any-return]

    def advance(self, z: Tensor, outputs: Tensor, t: int, noise: Noise | None) -> Tensor:
        """Return ``z_t`` from ``z_{t-1}`` (N, d) and the outputs of block t: Eq. 3, its mean, or with a drawn class."""
        drawn = noise is not None and noise.classes
        uhat = cast(ClassEmbedding, self.embed).draw(outputs, cast(Noise, noise).generator) if drawn else self.estimate(outputs)
        spread = self.spread * self.residuals[t] if isinstance(self.head, RealHead) and self.config.step_noise == "residual" else None
        with full_precision(z.device):
            return self.schedule.advance(z, uhat, t, None if noise is None else noise.generator, spread)

    def judgements(self, views: Sequence[View], noise: Noise | None) -> Judgements:
        """Ask each block alone, without a state (0, or noise), and along the path."""
        alone, path, states = [], [], [self.first(views[0].features, noise)]
        for view in views:
            alone.append(self.alone(view, noise))
            path.append(self.ask(view, self.met(states[-1], noise)))
            states.append(self.advance(states[-1], path[-1], view.t, noise))
        return Judgements(alone, path, states)

    @torch.no_grad()
    def sample(self, inputs: Any, draws: int, generator: torch.Generator) -> Tensor:
        """Draw from ``p(y|x)``: (draws, N, ...), of normalised inputs (``spec.normalise``). Call it in eval mode.

        By chains with drawn classes, unless ``inference=sampled``; of real targets by sampled chains. What the blocks compute of the
        inputs alone is computed once, and all draws go through the chain together, ``ROWS`` states at a time.

        Raises:
            UsageError: blind blocks of classes or labels, which have no chain.
        """
        if self.blind and not isinstance(self.head, RealHead):
            what = "blocks that learn without a state have no chain that draws"
            raise UsageError(what, where="rule.state", fix="train with rule.state=noised")
        drawn: Inference = "sampled" if isinstance(self.head, RealHead) or self.config.inference == "sampled" else "class-sampled"
        views, noise = self.views(self.view(inputs)), self.noise(generator, drawn)
        examples = len(views[0].features)
        chains = []
        for part in torch.arange(draws).split(max(1, ROWS // max(1, examples))):
            wide = [replace(view, features=view.features.repeat(len(part), 1)) for view in views]
            chains.append(self.shaped(self.last(wide, noise)).unflatten(0, (len(part), examples)))
        return torch.cat(chains)

    def cannot_sample(self) -> str:
        unmeasured = isinstance(self.head, RealHead) and self.config.step_noise == "residual" and not bool(self.residuals.any())
        return super().cannot_sample() or (UNMEASURED if unmeasured else "")

    def folded(self) -> FoldedChain:
        """Copy what predicts as one module, for ``torch.compile``, ``torch.export`` or as it is: normalised inputs to scores.

        It has the weights of now, without batch norms where these follow on linear layers and convolutions, and predicts as this rule does
        in eval mode, up to rounding.

        Raises:
            UsageError: the rule predicts with draws.
        """
        if self.config.inference != "deterministic":
            where = f"rule.inference={self.config.inference}"
            raise UsageError("only a chain without draws is one module", where=where, fix="load it with rule.inference=deterministic")
        return FoldedChain(self)

    # --- calibration ----------------------------------------------------------------------------------------------------

    @property
    def calibrates(self) -> bool:
        """Whether anything is measured on the validation split: the residuals of blocks for real targets."""
        return isinstance(self.head, RealHead)

    def calibrate(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        """Measure each block's residual covariance ``V_t`` (d, d), out of sample, which the noise of a sampled step takes in.

        Exact blocks have ``V_t = Cov(u | x, z_{t-1})``, so that ``N(a_t uhat + b_t z, c_t I + a_t^2 V_t)`` has the mean and covariance of
        ``z_t`` given x and ``z_{t-1}``; without the second term each step leaves out what the block does not know. What blocks that are
        not exact still leave out is made up for by one factor of all ``V_t`` (:mod:`bpfree_noprop.spread`).

        Returns:
            The mean variance of each block, of 1 for a target of which nothing is known; the squared error of the mean of draws, and the
            factor, ``spread``.
        """
        if data.targets is None or not isinstance(self.head, RealHead):
            return {}
        sums = torch.zeros_like(self.residuals)
        for batch in self.batches(data, generator.device):
            seen, u = self.view(batch.inputs), self.embed(self.rows(batch))
            for t, block in self.denoisers():
                z = standard_normal(u, generator) if self.blind else self.schedule.noised(u, t - 1, generator)
                error = self.estimate(block(seen, z)) - u
                with full_precision(u.device):
                    sums[t] += error.T @ error
        self.residuals.copy_(sums / len(data))
        measured = {f"t{t}/residual_variance": float(self.residuals[t].diagonal().mean()) for t, _ in self.denoisers()}
        if self.config.step_noise == "paper":
            return measured
        spread, error = match_spread(self, data, generator)
        self.error.fill_(error)
        return {**measured, "error": error, "spread": spread}

    def finish_calibration(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        """Match the spread of the tested blocks to the error that others have had on examples that were held out."""
        real = isinstance(self.head, RealHead) and self.config.step_noise == "residual"
        return {"spread": match_spread(self, data, generator, float(self.error))[0]} if real else {}

    # --- beside the prediction ------------------------------------------------------------------------------------------

    def alternatives(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the scores of each block alone, of the readouts that do not predict, of other kinds of inference, and of a control.

        A block alone gets a state that says nothing of the label: ``z = 0``, or noise where inference is drawn. In ``chain_swapped`` and
        ``path_swapped`` each block gets the state of another example of the batch with the same predicted class: where that changes
        nothing, states carry no more than the class. An ensemble of blind blocks has no chain, so only blocks, mean and product.
        """
        config, views = self.config, self.views(self.view(inputs))
        if self.blind and self.readout in ("mean", "product"):
            outputs = [self.alone(view, self.noise(generator)) for view in views]
            apart = Judgements(outputs, (), ())
            scores = {f"t{view.t}": self.embed.scores(each) for view, each in zip(views, outputs, strict=True)}
            other: Readout = "product" if self.readout == "mean" else "mean"
            return {name: self.shaped(each) for name, each in {**scores, other: apart.read(other, self.embed)}.items()}
        found = self.judgements(views, self.noise(generator))
        scores = {f"t{view.t}": self.embed.scores(outputs) for view, outputs in zip(views, found.alone, strict=True)}
        scores |= {name: found.read(name, self.embed) for name in self.readouts()}
        scores["chain"] = self.head(found.states[-1], self.embed)
        if self.spec.targets in ("classes", "soft") and not self.blind:
            scores |= self.swapped(views, found, scores["chain"])
        if config.state not in OWN:
            scores |= {kind: self.last(views, self.noise(generator, kind)) for kind in self.kinds() if kind != config.inference}
        return {name: self.shaped(each) for name, each in scores.items() if name != self.readout}

    def readouts(self) -> tuple[Readout, ...]:
        """Name the readouts but the chain that these targets have."""
        return ("mean", "path") if isinstance(self.head, RealHead) else ("mean", "path", "product")

    def kinds(self) -> tuple[Inference, ...]:
        """Name the kinds of inference that these targets have."""
        return ("deterministic", "sampled") if isinstance(self.head, RealHead) else ("deterministic", "sampled", "class-sampled")

    def swapped(self, views: Sequence[View], found: Judgements, scores: Tensor) -> dict[str, Tensor]:
        """Return the predictions of chain and path when each block gets the state of another example of its predicted class."""
        other = another_of_its_class(scores)
        states = [z[other] for z in found.states[:-1]]
        path = [self.ask(view, z) for view, z in zip(views, states, strict=True)]
        end = self.advance(states[-1], path[-1], views[-1].t, None)
        return {"chain_swapped": self.head(end, self.embed), "path_swapped": replace(found, path=path).read("path", self.embed)}


@dataclass(frozen=True)
class View:
    """A block t with what it computes of the inputs alone."""

    t: int
    block: DenoisingBlock
    features: Tensor


@dataclass(frozen=True)
class Noise:
    """What the steps of a chain draw: Eq. 3's noise, and perhaps a class of each belief."""

    generator: torch.Generator
    classes: bool = False
