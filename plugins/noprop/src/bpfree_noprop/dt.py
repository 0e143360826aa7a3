"""NoProp in discrete time: T blocks, each of which learns on its own to recover a noised label from the input.

Li, Teh, Pascanu: NoProp (arXiv 2503.24322), Eq. 3, 6, 8 and Algorithm 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.network.network import Network
from bpfree.options import option
from bpfree.rule import Card, Metrics, Traits
from bpfree.step import Batch, Budget, Phase, Step
from bpfree.tasks.task import Examples, TaskSpec
from bpfree_noprop.base import PAPER, learned_stem
from bpfree_noprop.blocks import DenoisingBlock, PairedBlock
from bpfree_noprop.chain import ChainConfig
from bpfree_noprop.early_exit import ExitingChain
from bpfree_noprop.embeddings import RealEmbedding, full_precision
from bpfree_noprop.heads import SoftmaxHead
from bpfree_noprop.inference import Inference
from bpfree_noprop.schedule import prior_divergence, standard_normal
from bpfree_noprop.stacked import Execution, Stack
from bpfree_noprop.states import OWN, KeptPaths, OwnStates
from bpfree_noprop.stems import StemNetwork, shared_stem

__all__ = ["NoPropDT", "NoPropDTConfig"]

TARGETS = ("classes", "soft", "multilabel", "real")
STATES = {
    "noised": "noised labels",
    "noise": "no state but noise (they are blind)",
    "own": "the states that blocks before them last made of an example",
    "crossfit": "the states that twins of blocks before them made, which never learn from the example",
    "analytic": "noised labels, with what these say added in closed form",
}
READOUTS = {
    "chain": "the chain's last state",
    "path": "the mean of blocks along the path",
    "mean": "the mean of blocks without a state",
    "product": "the product of blocks without a state",
}


@dataclass
class NoPropDTConfig(ChainConfig):
    """Options of NoProp in discrete time."""

    inference: Inference = option(  # type: ignore[assignment]  # one more kind than of other chains
        "deterministic",
        "the chain's mean path from z_0 = 0, or (the paper) with its noise, or with a class drawn from each block's belief, not its mean",
    )
    early_exit: float | None = option(
        None,
        "of the mean path: an example's chain stops when its answer is settled, so that at most this much of the task's metric is lost on "
        "validation, where it is measured after training; none: it never stops",
        ge=0,
        needs={"inference": ("deterministic",)},
    )
    eta: float = option(0.1, "weight of the denoising loss; without effect under Adam unless the embedding is learned", gt=0)
    schedule: Literal["cosine", "cosine-interior", "linear"] = option("cosine", "how the label's share of the state grows with t")
    clip: float = option(1e-4, "the share stays within [clip, 1 - clip]", gt=0, lt=0.5)
    updates: Literal["simultaneous", "sequential"] = option(
        "simultaneous", "every block learns from each batch, or (Algorithm 1) one block per pass over the data, T passes an epoch"
    )
    execution: Literal["auto", "loop", "stacked"] = option(
        "auto",
        "of simultaneous updates: blocks one after the other, or dense blocks as one by batched products, which holds all their "
        "activations; auto: as one on a CPU, where that is faster",
    )
    step_noise: Literal["residual", "paper"] = option(
        "residual",
        "of a sampled step, for real targets: c_t + a_t^2 v_t with the block's residual variance v_t, measured on validation; or c_t alone",
    )
    state: Literal["auto", "noised", "noise", "own", "crossfit", "analytic"] = option(
        "auto",
        "what a block sees beside the input in training: the noised label (the paper); noise that says nothing of it (blind blocks); the "
        "state that the blocks before it last made of this very example (own), or twins of theirs that never learn from it (crossfit); or "
        "the noised label, with what that says added to its logits in closed form (analytic); auto: noise, but the noised label for real "
        "targets, for draws (inference), and for readouts of a chain",
    )
    loss: Literal["squared", "cross-entropy"] = option(
        "squared", "of a block: distance of its estimate from the embedding (the paper), or cross-entropy of its probabilities"
    )
    readout: Literal["auto", "chain", "path", "mean", "product"] = option(
        "auto",
        "what predicts: the last state (the paper); the mean of the blocks' probabilities on the states along the path; that of each block "
        "alone, without a state (mean), or their product; auto: the product for blind blocks, else the chain",
    )


class NoPropDT(ExitingChain):
    """Blocks share nothing but the class embedding and the head; neither activations nor gradients pass between them.

    The loss (Eq. 8, squared norm summed over d, batch mean) is ``E[-log p_out(y|z_T)] + KL(q(z_0|y) || N(0, I)) +
    T/2 eta E_t[(SNR(t) - SNR(t-1)) |uhat_t(z_{t-1}, x) - u_y|^2]`` with t uniform over the blocks that learn in the phase:
    all of them make the exact expectation, one makes Algorithm 1's ``L_t``.
    """

    Config = NoPropDTConfig
    config: NoPropDTConfig
    growing = ("kept.states",)
    card = Card(
        "NoProp, discrete time: each block alone learns to denoise a noised label",
        paper=PAPER,
        equation="z_{t-1} ~ N(sqrt(abar_{t-1}) u_y, 1 - abar_{t-1});  "
        "L_t = T/2 eta (SNR(t) - SNR(t-1)) |softmax(f_t(x, z_{t-1})) W - u_y|^2;  "
        "inference: z_t = a_t uhat_t + b_t z_{t-1} + sqrt(c_t) eps from z_0 ~ N(0, I)",
        notes="Inside each block the gradient is ordinary back-propagation (the title of the paper's second version says so). "
        "By default all blocks learn from each batch, which is the exact mean over t; updates=sequential is Algorithm 1. "
        "Algorithm 1 samples z_t but its loss uses z_{t-1}: we sample z_{t-1}. The paper gives no formula for its schedule: ours is the "
        "time-reversed cosine, clipped. A learned embedding is shared: its gradient goes through every block, so that through it the "
        "blocks learn from each other's weights. "
        "By default blocks are blind and their product predicts, as no chain of ours did better at equal operations; real targets, draws "
        "(inference) and readout=chain have the paper's noised labels. "
        "The paper's chain (inference=sampled, Eq. 3) draws a class from the blocks' beliefs where the mean path (state=noised) takes the "
        "likeliest: 0.6 to 0.7 points on digits and MNIST. It puts a belief's mean in place of a class, which favours the likeliest (0.97 "
        "becomes 0.986 at T = 10, with exact blocks); inference=class-sampled draws a class, and is exact for exact blocks. "
        "The head starts as a nearest-embedding classifier. "
        "Beyond the paper: states that blocks make themselves, or in closed form (state); any model in blocks "
        "(network=noprop network.stem=NAME); several labels, as sums of embeddings; real targets, "
        "whitened, as their own embedding, whose sampled steps take in what a block does not know (step_noise).",
    )

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        """Declare independent blocks, unless they learn on states that blocks before them have made, or share a learned embedding or stem.

        Without a network: one whose blocks share no stem, as all are but ``noprop`` with ``network.shared=true``.
        """
        inputs: Literal["any", "real"] = "any" if isinstance(network, StemNetwork) else "real"
        reach: Literal["independent", "upstream"] = "upstream" if config.state in OWN else "independent"
        alone = Traits(reach, 0, 1, chain=False, readout="none", targets=TARGETS, inputs=inputs, own_loss=False)
        stem, drawn = learned_stem(network) is not None, cls.draws_states(config)
        embeds = drawn or config.state == "analytic" or config.loss == "squared"  # it is in the blocks' losses
        if not stem and (config.embedding == "one-hot" or not embeds):
            return alone
        through = stem or drawn  # a shared stem, and the embedding in noised labels, get gradients through the weights of blocks
        return replace(alone, dependence="all", downstream_weights="all" if through else 0)

    def __init__(self, network: Network, spec: TaskSpec, config: NoPropDTConfig | None = None) -> None:
        super().__init__(network, spec, config)
        self.execution = Execution(self.config.execution, [cast(DenoisingBlock, block) for block in self.network.blocks.values()])
        if self.config.state in OWN:
            self.kept = KeptPaths(self.config.T, self.embed.weight.shape[1])
            # of this rule alone: several processes cannot share a rule whose class has an end of its phases
            self.end_phase = self._forget  # type: ignore[method-assign]

    def check_options(self) -> None:
        """Refuse states, losses and readouts that these targets, or the other options, do not have.

        Raises:
            UsageError: names the option.
        """
        super().check_options()
        config, targets = self.config, self.spec.targets
        if targets == "real" and (config.state in (*OWN, "analytic") or config.loss != "squared" or config.readout == "product"):
            what = "real targets have no states of one's own or in closed form, no cross-entropy and no product of probabilities"
            raise UsageError(what, where="rule.state, rule.loss, rule.readout", fix="leave them out")
        if config.state in OWN and config.inference != "deterministic":
            what = f"blocks that learn on states of their own (rule.state={config.state}) have never met the noise of sampled steps"
            raise UsageError(what, where="rule.inference", fix="rule.inference=deterministic")
        if targets == "multilabel" and config.state == "analytic" and config.embedding != "one-hot":
            what = "what a state says of sets of labels is known in closed form for one-hot embeddings alone"
            raise UsageError(what, where="rule.state", fix="rule.embedding=one-hot")

    def check_network(self, network: Network, d: int) -> None:
        super().check_network(network, d)
        wanted = 2 if self.config.state == "crossfit" else 1
        if any(len(cast(DenoisingBlock, block).singles()) != wanted for block in network.blocks.values()):
            what = f"rule.state={self.config.state} needs blocks of {wanted} member{'s' if wanted > 1 else ''}"
            raise UsageError(what, where="network.members", fix=f"set network.members={wanted}")

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        return super().network_options(spec, config) | ({"members": 2} if config.state == "crossfit" else {})

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        small = super().specimen(kind, depth, width)
        # Certificates observe each block's own modules and parameters, which a stack of copies passes by.
        return small and {"rule.execution": "loop", **small}

    def plan(self) -> str:
        how = "" if self.config.updates == "sequential" else f"a step computes {self.execution}"
        config = self.config
        state = config.state if config.state != "auto" else "noise" if self.blind else "noised"
        what = f"blocks learn by {config.loss.replace('squared', 'squared error')} on {STATES[state]}; {READOUTS[self.readout]} predicts"
        return "\n".join(filter(None, [super().plan(), what, how]))

    @property
    def keeps_features(self) -> bool:
        """Whether training is on kept features of a frozen stem."""
        stem = shared_stem(self.network)
        return stem is not None and stem.frozen and cast(StemNetwork, self.network).keep

    @property
    def fixed_features(self) -> bool:
        return self.keeps_features

    def phases(self, budget: Budget) -> Iterable[Phase]:
        if self.config.updates == "simultaneous":
            return [replace(phase, on_features=self.keeps_features) for phase in super().phases(budget)]
        return self._block_by_block(budget.epochs)

    def prepare(self, data: Examples, generator: torch.Generator) -> None:
        """Also make room for the states of the training examples, if the rule keeps them.

        Raises:
            UsageError: several processes, each of which would keep states of other examples.
        """
        super().prepare(data, generator)
        if self.config.state in OWN:
            if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                what = "the states of training examples are kept in one process"
                raise UsageError(what, where=f"rule.state={self.config.state}", fix="train in one process, or with rule.state=noised")
            self.kept.open(len(data))

    def _forget(self, phase: Phase, step: Step) -> None:
        if self.config.updates == "simultaneous":  # it was the only phase
            self.kept.close()

    def features(self, inputs: Any) -> Tensor:
        """Return the features of a stem that are kept, or else the last hidden activities of all blocks side by side, for a state z = 0."""
        return cast(Tensor, self.view(inputs)) if self.keeps_features else super().features(inputs)

    def _block_by_block(self, epochs: int | None) -> Iterator[Phase]:
        shared = [name for name in ("head", "embed", "stem") if name in self.groups()]
        names = self.network.names
        for _ in itertools.count() if epochs is None else range(epochs):
            for name in names:
                yield Phase(name, epochs=1, groups=(name, *shared), evaluate=name == names[-1], on_features=self.keeps_features)

    def credit(self, batch: Batch, step: Step) -> Metrics:
        groups = step.phase.groups
        learning = [t for t, name in enumerate(self.network.names, start=1) if groups is None or name in groups]
        rows = self.rows(batch)
        metrics: Metrics = {}
        if step.fills("head"):  # the other processes of a parallel run fill other groups
            total = self.label_loss(rows, step)
            if total.requires_grad:  # that of real targets is a constant
                total.backward()  # type: ignore[no-untyped-call]
            metrics["head/loss"] = total.detach()
        filled = [t for t in learning if step.fills(f"t{t}")]
        stack = self.execution.stack(len(filled))
        own = self.own_states(batch, rows, step, whole=len(filled) == self.config.T)
        with self.seen(batch, step) as inputs:
            if stack is not None and not (own and own.within_step):
                metrics |= self.credit_stacked(stack, inputs, rows, step, own)
            else:
                for t in filled:
                    loss = self.block_loss(t, inputs, rows, step, share=1 / len(learning), own=own)
                    loss.backward()  # type: ignore[no-untyped-call]
                    metrics[f"t{t}/loss"] = loss.detach()
        return {"loss": torch.stack([rows.new_zeros(()), *metrics.values()]).sum(), **metrics}

    def own_states(self, batch: Batch, rows: Tensor, step: Step, *, whole: bool) -> OwnStates | None:
        """Return the states that blocks have made of these examples; ``None`` where states are drawn.

        Raises:
            UsageError: they are not known, because examples have no positions in a training split, or differ from stage to stage.
        """
        if self.config.state not in OWN:
            return None
        own = OwnStates(self.schedule, self.kept, batch.indices, self.start(rows, None))
        if step.stage is not None or (own.within_step and not whole):
            what = "states of one's own are kept for each example of a training split that stays the same"
            raise UsageError(what, where=f"rule.state={self.config.state}", fix="rule.state=noised, or train with bpfree.Trainer")
        return own

    def credit_stacked(self, stack: Stack, inputs: Tensor, rows: Tensor, step: Step, own: OwnStates | None = None) -> Metrics:
        """Take :meth:`block_loss` of all blocks and one backward pass of their sum, with the same noise."""
        T, u = self.config.T, self.embed(rows)
        states = torch.stack([self.state(t, u, step) for t in range(1, T + 1)]) if own is None else own.all()
        raw = stack.forward(inputs, self.shown(states)).unbind()
        outputs = [self.answer(t, each, states[t - 1]) for t, each in enumerate(raw, start=1)]
        losses = torch.stack([self.distance(each, u, rows) for each in outputs])
        weights = [self.weight(t, len(rows), share=1 / T) for t in range(1, T + 1)]
        losses = losses * torch.tensor(weights, device=u.device, dtype=u.dtype)
        stack.backward(losses.sum())
        if own is not None:
            for t, each in enumerate(outputs, start=1):
                own.after(t, self.estimate(each.detach()))
        return {f"t{t}/loss": loss for t, loss in enumerate(losses.detach().unbind(), start=1)}

    def block_loss(self, t: int, inputs: Any, rows: Tensor, step: Step, *, share: float, own: OwnStates | None = None) -> Tensor:
        """Return block t's term of Eq. 8 with a fresh ``z_{t-1} ~ q(z_{t-1}|y)``, for targets as ``rows`` (N, m).

        ``inputs`` is what the block sees of them, ``share`` the probability of t in the expectation, and ``own`` the states of earlier
        passes, which it gets in place of a draw, and to which its estimate is added.
        """
        u, block = self.embed(rows), cast(DenoisingBlock, self.network.blocks[f"t{t}"])
        z = self.state(t, u, step) if own is None else own.before(t)
        with block.masks(step.generator_for, f"t{t}"):
            if own is not None and isinstance(block, PairedBlock):
                outputs, foreign = block.crossed(inputs, z, own.halves(inputs))
            else:
                outputs = foreign = self.answer(t, block(inputs, self.shown(z)), z)
        if own is not None:
            own.after(t, self.estimate(foreign.detach()))
        return self.distance(outputs, u, rows) * self.weight(t, len(rows), share=share)

    def distance(self, outputs: Tensor, u: Tensor, rows: Tensor) -> Tensor:
        """Return what a block's outputs (N, m) lack, summed over the batch: the estimate's squared error, or a cross-entropy."""
        if self.config.loss == "squared":
            return F.mse_loss(self.estimate(outputs), u, reduction="sum")
        with full_precision(u.device):
            logits = outputs.to(rows.dtype)
            if self.spec.targets == "multilabel":
                return F.binary_cross_entropy_with_logits(logits, rows, reduction="sum")
            return F.cross_entropy(logits, rows, reduction="sum")

    def state(self, t: int, u: Tensor, step: Step) -> Tensor:
        """Return block t's state: a fresh draw of ``z_{t-1}`` for the embeddings ``u`` (N, d), or pure noise."""
        generator = step.generator_for(f"t{t}")
        return standard_normal(u, generator) if self.blind else self.schedule.noised(u, t - 1, generator)

    def weight(self, t: int, examples: int, *, share: float) -> float:
        """Return the weight of block t's summed squared error in the loss."""
        return share * self.config.T / 2 * self.config.eta * self.schedule.gain(t) / examples

    def label_loss(self, rows: Tensor, step: Step) -> Tensor:
        """Return the terms of Eq. 8 without blocks: the head's cross-entropy on ``z_T ~ q(z_T|y)``, and the KL divergence."""
        u = self.embed(rows)
        z = self.schedule.noised(u, self.config.T, step.generator_for("head"))
        divergence = prior_divergence(u, self.schedule.abar[0])
        return divergence if isinstance(self.embed, RealEmbedding) else cast(SoftmaxHead, self.head).loss(z, self.embed, rows) + divergence
