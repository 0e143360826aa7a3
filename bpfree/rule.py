"""The contract of a learning rule.

A rule is an ``nn.Module`` that owns its network as a submodule. Its base class determines how much it must implement:

- :class:`Streamed`: one scalar local loss per block, from that block's trace and the batch alone. One block's graph
  is alive at a time, so memory is flat in depth.
- :class:`Broadcast`: a teaching signal per hidden block, given the output error.
- :meth:`Rule.credit`: fill ``.grad`` in any way.
- :meth:`Rule.learn`: also decide when updates are applied, or apply them in place; a declared trait.

A *teaching signal* estimates dLoss/dOutput of a block, has its shape and sign, and carries the 1/N of the batch mean.
``.grad`` is what the optimiser descends: a Hebbian ascent adds minus its increment. Because every rule ends there or
declares that it does not, the core gives each of them any optimiser, schedules, clipping, accumulation and bf16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from bpfree import interface_v1
from bpfree.errors import BpfreeError, UsageError
from bpfree.network.network import Network, check_readout
from bpfree.network.receptive_fields import receptive_fields
from bpfree.network.split import split
from bpfree.network.trace import Trace, Traces
from bpfree.options import NoOptions, OptimizerConfig
from bpfree.step import Batch, Budget, Phase, Stage, Step
from bpfree.tasks.spec import has_own_loss
from bpfree.tasks.task import Examples, TaskSpec

__all__ = ["Broadcast", "Card", "Rule", "Streamed", "Traits", "always"]

Metrics = dict[str, Tensor]
Span = int | Literal["all"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Traits:
    """Properties that a rule declares of itself, and that the certificate measures.

    Attributes:
        dependence: whose parameters change a block's update: its own (``independent``), also those below
            (``upstream``), also the next one above (``neighbours``), or ``all``.
        downstream_weights: how many blocks above have weights that change a block's update while every forward value
            stays (weight transport): 0 is local, ``all`` is back-propagation.
        reverse_span: blocks that one reverse-mode call crosses: 0 none, 1 inside a block, ``all`` end to end.
        update: ``grad`` (credit fills ``.grad``), ``own-steps`` (``learn`` decides when to apply), or ``in-place``.
            The latter two exclude gradient accumulation, ``in-place`` also clipping.
        supervision: ``labels``, ``none``, or ``readout`` (only the readout sees labels).
        passes: forward passes per example through the block that has most, in a step of a phase in which it takes part; the tangent of
            forward mode is a pass of its own.
        chain: whether the rule needs a network that is a chain.
        readout: whether the rule needs a network with a readout: ``required``; ``optional``, where it works with and without one; or
            ``none``, where every block learns alike and predictions are made otherwise. A network's readout is left out then.
        targets: kinds of targets that it can learn from.
        inputs: ``real`` if it needs inputs that are one tensor of real numbers; ``any``: also integers, and inputs of several tensors.
        views: how many views of each example a batch has (``Batch.views``), drawn by the augmentations independently.
        own_loss: whether it learns from a loss that a task brings itself (``TaskSpec.loss`` of a subclass), through ``spec.loss`` or
            ``spec.error``; such a task may have no targets.
    """

    dependence: Literal["independent", "upstream", "neighbours", "all"] = "all"
    downstream_weights: Span = "all"
    reverse_span: Span = "all"
    update: Literal["grad", "own-steps", "in-place"] = "grad"
    supervision: Literal["labels", "none", "readout"] = "labels"
    passes: float = 1
    chain: bool = True
    readout: Literal["required", "optional", "none"] = "required"
    targets: tuple[str, ...] = ("classes", "multilabel", "soft", "real", "tokens")
    inputs: Literal["any", "real"] = "any"
    own_loss: bool = True
    views: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "readout", interface_v1.readout(self.readout))


@dataclass(frozen=True)
class Card:
    """A description of a method for its readers: shown by ``bpfree rules NAME``.

    Attributes:
        summary: one line.
        paper: authors, title, year, identifier.
        equation: the update, in plain text.
        notes: what differs from the paper, and what to beware of.
    """

    summary: str
    paper: str = ""
    equation: str = ""
    notes: str = ""


@dataclass(frozen=True)
class _Always(Generic[Value]):
    """A function that is not bound to a class or instance, so that a class can adopt it by name."""

    value: Value

    def __call__(self, config: Any, network: Network | None = None) -> Value:
        return self.value


def always(value: Value) -> Callable[..., Value]:
    """Make a function of options and network that returns this value: ``traits_of = always(Traits(...))``."""
    return _Always(value)


class Rule(nn.Module, ABC):
    """A learning rule: how a batch becomes an update of each block's parameters.

    All parameters are made in ``__init__`` (or in :meth:`start_phase`); ``prepare`` fills them.

    Args:
        network: becomes the submodule ``network``; another module than a :class:`Network` is split into one first, and a rule that
            declares ``readout="none"`` leaves its readout out.
        spec: shapes, number of outputs and loss of the task; no data.
        config: an instance of the class's ``Config``; its defaults if ``None``.

    Raises:
        UsageError: if the rule cannot work with this network or task.
    """

    Config: ClassVar[type] = NoOptions
    """Dataclass of the rule's options."""
    card: ClassVar[Card] = Card("a learning rule without a description")
    brings_network: ClassVar[bool] = False
    """Whether the rule brings its network, so that the common one of a comparison is not for it."""
    growing: ClassVar[tuple[str, ...]] = ()
    """Names of buffers that grow with the data, such as stored examples: a loaded rule gives them the size that they were saved in."""
    waivers: ClassVar[dict[str, str]] = {}
    """Checks of the certificate that are expected to fail, by id, each with its reason: they are shown as waived, never as passed."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        interface_v1.translate(cls, Rule)

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__()
        if isinstance(network, Network):
            self.network = network
        else:
            self.network = split(network, spec.input_shape, example=None if spec.takes_real_tensors else spec.example(2))
        self.spec = spec
        self.config = self.Config() if config is None else config
        if self.traits.readout == "none":
            self.network = self.network.without_readout()
        self._check_support()

    def _check_support(self) -> None:
        name, traits = type(self).__name__, self.traits
        if traits.chain and not self.network.chain:
            raise UsageError(f"{name} needs a network that is a chain of blocks", fix="use network=auto, mlp or vgg")
        if traits.readout == "required" and self.network.readout is None:
            raise UsageError(f"{name} needs a network with a readout", fix="name the last block as the network's readout")
        if traits.inputs == "real" and not self.spec.takes_real_tensors:
            raise UsageError(
                f"{name} needs inputs that are one tensor of real numbers",
                where=f"task {self.spec.name}",
                fix="choose a rule for other inputs (trait inputs=any)",
            )
        if has_own_loss(self.spec) and not traits.own_loss:
            raise UsageError(
                f"{name} learns from a loss of its own, but the task brings one: {type(self.spec).__name__}",
                where=f"task {self.spec.name}",
                fix="choose a rule that learns from the task's loss (trait own_loss)",
            )
        if self.spec.targets not in traits.targets and not (self.spec.targets == "none" and has_own_loss(self.spec)):
            raise UsageError(
                f"{name} cannot learn from targets of kind {self.spec.targets!r}",
                where=f"task {self.spec.name}",
                fix=f"it accepts: {', '.join(traits.targets)}",
            )
        if traits.readout == "required":
            check_readout(self.network, self.spec)

    # --- what the rule says of itself: asked of its class before it is built, where the network is not known, and of the rule after ---

    @classmethod
    def traits_of(cls, config: Any, network: Network | None = None) -> Traits:
        """Declare what the rule is with these options on this network.

        Without a network: what holds on every one (the largest number of passes, the longest span).
        """
        return Traits()

    @classmethod
    def optimizer_of(cls, config: Any, network: Network | None = None) -> OptimizerConfig:
        """Return the default optimiser; without a network, ``None`` for what only the network decides (and ``auto`` for a name)."""
        return OptimizerConfig("adam", lr=1e-3)

    @classmethod
    def optimizer_keys_of(cls, config: Any, network: Network | None = None) -> tuple[str, ...] | None:
        """Name the keys of ``optimizer`` that the rule reads; settings of others are refused.

        ``None``: all, or ``lr`` alone where the rule updates in place. Without ``lr`` it reads no ``schedule`` either.
        """
        return None

    @classmethod
    def shared_groups_of(cls, config: Any, network: Network | None = None) -> tuple[str, ...]:
        """Name the groups whose gradient is a sum of what single blocks add.

        Where blocks are dealt to several processes, each fills these for its own blocks (``Step.fills``), and the sum is taken over
        processes.
        """
        return ()

    @classmethod
    def draws_of(cls, config: Any, network: Network | None = None) -> int:
        """Return the number of draws of a stochastic ``predict`` over which the final evaluation averages."""
        return 1

    @property
    def traits(self) -> Traits:
        """Return :meth:`traits_of` this rule's options and network."""
        return self.traits_of(self.config, self.network)

    @property
    def optimizer(self) -> OptimizerConfig:
        """Return :meth:`optimizer_of` this rule's options and network."""
        return self.optimizer_of(self.config, self.network)

    @property
    def optimizer_keys(self) -> tuple[str, ...] | None:
        """Return :meth:`optimizer_keys_of` this rule's options and network."""
        return self.optimizer_keys_of(self.config, self.network)

    @property
    def shared_groups(self) -> tuple[str, ...]:
        """Return :meth:`shared_groups_of` this rule's options and network."""
        return self.shared_groups_of(self.config, self.network)

    @property
    def draws(self) -> int:
        """Return :meth:`draws_of` this rule's options and network."""
        return self.draws_of(self.config, self.network)

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        """Choose the rule's default network: options of the ``network`` section, with ``name``.

        A rule with a network of its own returns its builder's name and the sizes that its configuration implies.
        """
        return {"name": "vgg" if spec.is_image and spec.input_shape[0] > 1 else "mlp"}

    @classmethod
    def specimen(cls, kind: str, depth: int, width: int) -> dict[str, Any] | None:
        """Return settings of a small instance for the certificate to measure: flat keys of ``network`` and ``rule``.

        Without normalisation and dropout if the rule can do without, so that batches of one and random generators can be examined.
        Without a readout if the rule declares that it has none: it is left out as from any network.
        A rule with a network of its own returns the settings that make it so small. A rule that does not learn from images names a task
        too: ``{"task.name": "my-task", ...}``.

        Args:
            kind: ``dense`` or ``convolutional``.
            depth: number of hidden blocks; a rule whose number of blocks is given by something else ignores it.
            width: units, or channels, of each.

        Returns:
            ``None``: the rule has no network of this kind.
        """
        plain: dict[str, Any] = {"network.activation": "tanh", "network.norm": "none", "network.dropout": 0.0}
        if kind == "dense":
            return {"network.name": "mlp", "network.widths": [], "network.width": width, "network.depth": depth, **plain}
        return {"network.name": "vgg", "network.channels": [width] * depth, "network.pool_after": [], **plain}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters by group: one per block, and one per child of the rule (``heads.b1`` in containers)."""
        groups = {name: list(block.parameters()) for name, block in self.network.blocks.items()}
        for name, child in self.named_children():
            if child is self.network:
                continue
            if isinstance(child, (nn.ModuleDict, nn.ModuleList)):
                groups.update({f"{name}.{key}": list(part.parameters()) for key, part in child.named_children()})
            else:
                groups[name] = list(child.parameters())
        own = list(self.parameters(recurse=False))
        if own:
            groups["rule"] = own
        return {name: members for name, members in groups.items() if members}

    def group_options(self) -> dict[str, dict[str, Any]]:
        """Return options of the optimiser for single groups, such as ``{"head": {"lr": 0.01}}``."""
        return {}

    def freeze_features(self) -> None:
        """Become the own-prediction twin: everything but the readout recipe stays as initialised.

        Here: all hidden blocks are fixed. A rule with a network of its own fixes each block's body instead and lets its
        last linear map, heads and embeddings learn.
        """
        for name in self.network.hidden:
            self.network.blocks[name].requires_grad_(False)

    def prepare(self, data: Examples, generator: torch.Generator) -> None:
        """See the training split once before training, for data-dependent initialisation: fill, never create.

        Args:
            data: the training split, raw, of a stream the first stage's part; ``self.spec.normalise`` makes of it what the network sees.
            generator: the rule's stream, on the run's device.
        """

    def calibrate(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        """Choose on the validation split what is neither weight nor setting: a threshold, a temperature, a number of steps.

        Called once, after training and before the test, with the weights that will be tested, in eval mode under ``no_grad``; not at all
        where there is no validation split, so that buffers must hold defaults. Parameters may not change; what is chosen goes into buffers,
        which are saved.

        Args:
            data: the validation split, raw; ``self.spec.normalise`` makes of it what the network sees.
            generator: of this alone, on the run's device.

        Returns:
            What was chosen, as plain numbers: recorded in the run's result as ``calibration/<name>``.
        """
        return {}

    def finish_calibration(self, data: Examples, generator: torch.Generator) -> dict[str, float]:
        """Finish a cross-fitted calibration (``calibration.folds``) for the weights that will be tested.

        Called with the means of what was chosen on parts that were held out, in eval mode under ``no_grad``; as in :meth:`calibrate`,
        buffers may change.

        Args:
            data: the training split, raw. These weights have learned from its targets, so that errors on it say nothing.
            generator: of this alone, on the run's device.

        Returns:
            What was chosen, in place of means of the same names.
        """
        return {}

    def phases(self, budget: Budget) -> Iterable[Phase]:
        """Return the phases of a run, in order, perhaps endlessly; by default one, in which everything learns."""
        return [Phase("train", epochs=None if budget.samples is not None else budget.epochs)]

    def start_stage(self, stage: Stage) -> None:
        """Begin a stage of a stream: grow for its classes, say.

        Called before the stage's first phase, and again, on a freshly built rule, when a run is loaded or resumed: parameters and
        buffers that it makes get their saved values then. ``stage.train`` and its relatives are ``None`` in that case.
        """

    def start_phase(self, phase: Phase) -> None:
        """Reset or grow parameters at the start of a phase, without data: a resumed run replays it before loading its weights."""

    def end_phase(self, phase: Phase, step: Step) -> None:
        """End a phase, for example by solving for parameters from sums over its batches."""

    @abstractmethod
    def credit(self, batch: Batch, step: Step) -> Metrics:
        """Add to ``.grad`` of the parameters in ``groups``; return detached scalars as metrics.

        ``.grad`` is zero or ``None`` before. With accumulation it is called once per micro-batch, and the core scales
        each contribution by the micro-batch's share of the batch.
        """

    def objective(self, batch: Batch, step: Step) -> Tensor | None:
        """Return the scalar, differentiable by autograd, whose gradient ``credit`` estimates; for diagnostics and tests only.

        ``None``: the task's loss of the network's output. Noise is to be drawn from ``step`` as in ``credit``.
        """
        return None

    def compiled(self) -> Iterable[nn.Module]:
        """Name the modules that ``compile`` compiles, each as a whole: by default the blocks."""
        return self.network.blocks.values()

    def plan(self) -> str:
        """Describe in plain text how the rule uses this network: which layers, where noise goes, which path is used.

        Shown before training and kept with the run; the empty string if there is nothing to report.
        """
        return ""

    def pictures(self, count: int = 64) -> dict[str, Tensor]:
        """Return pictures of what has been learned: by name (a block's, usually), up to ``count`` images (K, C, H, W), C 1 or 3.

        Values are signed, zero is mid-grey, and each image is scaled by itself. Called after epochs, in eval mode under ``no_grad``;
        it must change nothing. Here: the linear receptive fields of hidden units, where the network is a chain on images.
        """
        return receptive_fields(self.network, count, image=self.spec.input_shape)

    def learn(self, batch: Batch, step: Step) -> Metrics:
        """Take one step of training: by default ``credit``, then ``step.apply()``."""
        metrics = self.credit(batch, step)
        step.apply()
        return metrics

    def before_update(self, groups: Sequence[str]) -> None:
        """Normalise or precondition gradients: ``.grad`` is complete (accumulated, averaged), clipping and the optimiser come next.

        Touch the parameters of these groups only: those of others are not applied now, and would be changed again at their own turn.

        Args:
            groups: names of the groups that are applied now; all of them at a plain ``step.apply()``.
        """

    def after_update(self, groups: Sequence[str]) -> None:
        """Project or renormalise the parameters of these groups, which alone have moved.

        Args:
            groups: names of the groups that were applied now.
        """

    def predict(self, inputs: Any, generator: torch.Generator) -> Tensor:
        """Predict scores (N, C), higher is better, or real outputs (N, ...); called in eval mode under ``no_grad``, never with targets."""
        scores: Tensor = self.network(inputs)
        return scores

    def sample(self, inputs: Any, draws: int, generator: torch.Generator) -> Tensor:
        """Draw real targets from what the rule believes of them, ``p(y|x)``: (draws, N, ...); in eval mode under ``no_grad``.

        What intervals, coverage and CRPS are made of. A rule that has no distribution leaves it out.

        Raises:
            UsageError: the rule has none (:meth:`cannot_sample`).
        """
        raise UsageError(self.cannot_sample(), where="sample", fix="choose a rule that has a distribution, such as noprop-dt")

    def cannot_sample(self) -> str:
        """Say why there is no distribution of real targets to draw from; the empty string where there is one.

        A rule whose distribution needs :meth:`calibrate` says so here as long as it has not been calibrated.
        """
        if self.spec.targets != "real":
            return f"the targets of task {self.spec.name} are no real values"
        return "" if type(self).sample is not Rule.sample else f"{type(self).__name__} predicts values, without a distribution of them"

    final_prediction: bool = True
    """Whether predictions made now are final; those after epochs are not, and a rule may spend less on them (fewer steps of a flow)."""

    @contextmanager
    def quick_predictions(self) -> Iterator[None]:
        """Make predictions inside that are not final: ``final_prediction`` is false."""
        before, self.final_prediction = self.final_prediction, False
        try:
            yield
        finally:
            self.final_prediction = before

    def features(self, inputs: Any) -> Tensor:
        """Return the features (N, ...) before the readout: the readout's input, deterministic in eval mode.

        Phases ``on_features`` and evaluation protocols (linear probe and so on, which flatten it) take it.
        """
        return self.network.features(inputs)

    def representations(self, inputs: Any) -> dict[str, Tensor]:
        """Return the output of each hidden block, (N, ...) by name, which the floor of a comparison reads.

        Deterministic in eval mode, and without labels. Here: the output of each hidden block of a chain; the empty mapping for other
        networks, whose rules override it.
        """
        if not self.network.chain:
            return {}
        found: dict[str, Tensor] = {}
        for name in self.network.hidden:
            inputs = found[name] = self.network.blocks[name](inputs)
        return found

    @property
    def fixed_features(self) -> bool:
        """Whether :meth:`features` is the same function all through training, such as that of a frozen stem.

        What is kept for one phase on features then serves the next, and processes that share the blocks may have such phases: each
        computes the features for itself.
        """
        return False

    def read(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Predict from features: ``read(features(x))`` is ``predict(x)``; needed for phases ``on_features`` only."""
        scores: Tensor = self.network.blocks[self.network.readout or ""](features)
        return scores

    def alternatives(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return further predictions to report besides ``predict``, by name (single blocks, ensembles): scores (N, C)."""
        return {}

    def effort(self, inputs: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Return what ``predict`` takes for each example where that differs: (N,) by name; means are reported as ``effort/<name>``.

        Such as the blocks that are executed, where an early exit leaves out the rest. Asked for where alternatives are.
        """
        return {}


interface_v1.install(Rule, Step)


class Streamed(Rule):
    """A rule that is given by one scalar local loss per block.

    The blocks are executed in order, each from its predecessor's detached output, and one backward per block reaches
    the block and the rule's local heads. Two small hooks adapt what flows: ``encode`` makes the first block's input,
    ``hand_over`` the next one's. What they draw comes from ``step.generator_for(...)`` or ``step.generator``.
    """

    traits_of = always(Traits(dependence="upstream", downstream_weights=0, reverse_span=1))

    @abstractmethod
    def local_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor | None:
        """Return the scalar loss of a hidden block, a mean over the batch; ``None`` if it does not learn from this batch.

        A teaching signal is the loss ``(trace.output * signal.detach()).sum()``.
        """

    def readout_loss(self, trace: Trace, batch: Batch, step: Step) -> Tensor | None:
        """Return the readout's loss; by default the task's. Not called where the rule has no readout."""
        if len(trace.output) != len(batch):
            raise BpfreeError(
                f"the readout gives outputs for {len(trace.output)} examples of a batch of {len(batch)}",
                where=f"{type(self).__name__}.readout_loss",
                fix='hand over as many as there are targets, override readout_loss, or declare Traits(readout="none")',
            )
        return self.spec.loss(trace.output, batch)

    def encode(self, batch: Batch, step: Step) -> Tensor:
        """Make the first block's input, such as positive and negative examples; by default the batch's."""
        return batch.inputs  # type: ignore[no-any-return]

    def hand_over(self, trace: Trace, batch: Batch, step: Step) -> Tensor:
        """Make the next block's input; by default the trace's detached output. Not called after the last block."""
        return trace.output.detach()

    def credit(self, batch: Batch, step: Step) -> Metrics:
        metrics: Metrics = {}
        readout = self.network.readout
        for trace in self.network.stream(self.encode(batch, step), hand_over=lambda trace: self.hand_over(trace, batch, step)):
            loss = self.readout_loss(trace, batch, step) if trace.name == readout else self.local_loss(trace, batch, step)
            if loss is not None:
                if loss.requires_grad:
                    loss.backward()
                metrics["loss" if trace.name == readout else f"{trace.name}/loss"] = loss.detach()
        return metrics


interface_v1.install_hooks(Streamed)


class Broadcast(Rule):
    """A rule that is given by a teaching signal per hidden block, made with the output error at hand.

    All blocks are executed once, each with a graph of its own; the readout learns from the output error.
    """

    traits_of = always(Traits(dependence="all", downstream_weights=0, reverse_span=1))

    @abstractmethod
    def signals(self, traces: Traces, batch: Batch, error: Tensor, step: Step) -> Sequence[Tensor | None]:
        """Return a teaching signal for each hidden block, of its output's shape; ``None``: the block does not learn.

        Args:
            traces: of all blocks, the readout's last.
            batch: the batch.
            error: dLoss/dOutputs of the outputs' shape, such as (N, C), with the 1/N of the mean.
            step: the step.
        """

    perturb: Callable[[Trace], Tensor | None] | None = None
    """Directions for ``Network.traces``; ``None``: no tangent is computed."""

    def credit(self, batch: Batch, step: Step) -> Metrics:
        traces = self.network.traces(batch.inputs, perturb=self.perturb)
        scores = traces[-1].output.detach()
        error = self.spec.error(scores, batch)
        for trace, signal in zip(traces[:-1], self.signals(traces, batch, error, step), strict=True):
            if signal is not None:
                trace.backward(signal)
        traces[-1].backward(error)
        return {"loss": self.spec.loss(scores, batch)}
