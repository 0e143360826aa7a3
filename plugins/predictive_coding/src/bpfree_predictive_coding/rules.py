"""The rules: one relaxation, five ways to use it."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bpfree import Batch, Card, Network, OptimizerConfig, Rule, Step, TaskSpec, Traits, UsageError
from bpfree.tasks.spec import has_own_loss
from bpfree_predictive_coding.execution import Executor
from bpfree_predictive_coding.options import (
    EPCConfig,
    FixedPredictionConfig,
    IPCConfig,
    OutputConfig,
    PredictiveCodingConfig,
    RelaxedConfig,
    ZILConfig,
)
from bpfree_predictive_coding.output import Output, TaskOutput
from bpfree_predictive_coding.profile import Profile
from bpfree_predictive_coding.relaxation import ErrorRelaxation, Relaxation
from bpfree_predictive_coding.scaling import mupc

__all__ = ["ZIL", "ErrorPC", "FixedPrediction", "IncrementalPC", "PredictiveCoding", "Relaxed"]

WHITTINGTON = (
    "Whittington, Bogacz: An approximation of the error backpropagation algorithm in a predictive coding network. Neural Computation 2017"
)
PCX = "Pinchetti et al.: Benchmarking predictive coding networks, made simple. ICLR 2025, arXiv 2407.01163"


class Relaxed(Rule):
    """Base of the rules: the output's energy, the relaxation's loop, its profile, and the weights' gradients at its end."""

    Config: ClassVar[type[OutputConfig]] = RelaxedConfig
    weight_lr: ClassVar[float] = 1e-3
    """Adam's default rate; with muPC's scaling it is the paper's, 0.1."""
    config: Any

    def __init__(self, network: Network | nn.Module, spec: TaskSpec, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.factors = mupc(self.network) if getattr(self.config, "scaling", "none") == "mupc" else {}
        self.profile = Profile(self.network.names)

    @classmethod
    def network_options(cls, spec: TaskSpec, config: Any) -> dict[str, Any]:
        if getattr(config, "scaling", "none") == "mupc":
            return {"name": "residual-mlp"}
        if spec.is_image and spec.input_shape[0] > 1:
            return {"name": "pc-vgg"}
        return {"name": "mlp"}

    @classmethod
    def optimizer_of(cls, config: Any, network: Network | None = None) -> OptimizerConfig:
        return OptimizerConfig("adam", lr=0.1 if getattr(config, "scaling", "none") == "mupc" else cls.weight_lr)

    @property
    def output_kind(self) -> Literal["squared", "cross-entropy", "task"]:
        """Kind of the output's energy."""
        kind: Literal["squared", "cross-entropy", "task"] = self._task_kind if self.config.output == "auto" else self.config.output
        return kind

    @property
    def _task_kind(self) -> Literal["squared", "cross-entropy", "task"]:
        if has_own_loss(self.spec) or self.spec.targets in ("multilabel", "tokens"):
            return "task"
        return "squared" if self.spec.targets == "real" else "cross-entropy"

    def plan(self) -> str:
        executor = Executor(self.network, self.config.path)
        generic = [name for name in self.network.names if name not in executor.closed]
        lines = [f"output: {self.output_kind} energy with precision {self.config.precision:g}", *self._steps()]
        lines.append(f"derivatives in closed form: {', '.join(executor.closed) or 'none'}")
        if generic:
            lines.append(f"derivatives by autograd within the block: {', '.join(generic)}")
        if any(isinstance(part, _DropoutNd) and part.p > 0 for part in self.network.modules()):
            lines.append("dropout draws a new mask whenever a block is executed, so at each inference step")
        lines += [f"  {path}: multiplier {factor:.3g}" for path, factor in self.factors.items()]
        return "\n".join(lines)

    def _steps(self) -> list[str]:
        config, hidden = self.config, len(self.network.hidden)
        lines = [f"relaxation: {config.T} steps at rate {config.state_lr:g} over {hidden} hidden blocks"]
        if hidden > self.reach:
            lost = f"the first {hidden - self.reach} get no credit; rule.T={hidden + config.T - self.reach} reaches all"
            lines.append(f"  an error reaches one more block with each step: {lost}")
        return lines

    @property
    def reach(self) -> int:
        """Number of hidden blocks, from the last one down, that learn from a batch."""
        return int(self.config.T)

    @staticmethod
    def _span(config: OutputConfig, network: Network | None) -> int:
        """Count the blocks that a reverse-mode call crosses: 0 if all derivatives are taken in closed form, else 1."""
        return int(network is None or len(Executor(network, config.path).closed) < len(network.blocks))

    def _output(self, batch: Batch, scores: Tensor) -> Output | TaskOutput:
        if self.output_kind == "task":
            return TaskOutput(self.spec, batch, self.config.precision)
        dtype = scores.dtype if scores.dtype.itemsize >= 4 else torch.float32
        return Output(self.output_kind, self.spec.target_rows(batch, dtype), self.config.precision)

    def _begin(self, batch: Batch, step: Step) -> Relaxation:
        """Return the states of a batch before the first inference step."""
        config = self.config
        return self._relaxation(batch, lr=config.state_lr, momentum=config.state_momentum)

    def _relaxation(self, batch: Batch, kind: type[Relaxation] = Relaxation, **options: Any) -> Relaxation:
        output = options.pop("output", partial(self._output, batch))
        return kind(Executor(self.network, self.config.path), batch.inputs, output, **options)

    @torch.no_grad()
    def relax(self, batch: Batch, step: Step) -> tuple[Relaxation, dict[str, Tensor]]:
        """Return the states of a batch after the last inference step, and metrics."""
        relaxation = self._begin(batch, step)
        metrics = {"loss": relaxation.output.loss(relaxation.scores)}
        sampled = self.config.profile_every > 0 and step.index % self.config.profile_every == 0
        if sampled:
            self.profile.note(relaxation)
        for t in range(1, self.config.T + 1):
            self._infer(relaxation, step, watched=sampled or t < self.config.T)
            if sampled:
                self.profile.note(relaxation)
        if sampled:
            metrics |= self.profile.end(relaxation)
        return relaxation, metrics

    def _infer(self, relaxation: Relaxation, step: Step, *, watched: bool) -> None:
        """Take one inference step; unless ``watched``, no predictions are needed after it."""
        relaxation.step()

    def _weight_scale(self, step: Step) -> float:
        """Return the factor on the weights' gradients."""
        return 1.0

    @torch.no_grad()
    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        relaxation, metrics = self.relax(batch, step)
        scale = self._weight_scale(step)
        for index in range(len(relaxation.executions)):
            relaxation.backward(index, scale)
        return metrics

    def objective(self, batch: Batch, step: Step) -> Tensor | None:
        """Return the output's energy of the forward pass with precision one: what back-propagation would descend."""
        if self.output_kind == self._task_kind:  # the task's loss needs no second name
            return None
        scores = self.network(batch.inputs)
        return self._output(batch, scores).loss(scores)


class PredictiveCoding(Relaxed):
    """States relax, then the weights learn from the errors that are left."""

    Config = PredictiveCodingConfig
    config: PredictiveCodingConfig
    card = Card(
        "predictive coding: states relax to lower the prediction errors, which then teach the weights",
        paper=f"{WHITTINGTON}; defaults and networks after {PCX}",
        equation="F = sum_l |h_l - f_l(h_{l-1})|^2 / 2 + E_out;  T times h_l -= lr dF/dh_l;  then dW_l ~ -dF/dW_l",
        notes="T steps reach min(T, L - 1) blocks. At equilibrium the update is not back-propagation's, unless precision -> 0. "
        "nudge=centred alternates by epoch. The published benchmark's code sets beta to +1 once |beta| reaches 1, for negative "
        "nudging too: ours stays at -1.",
    )

    @classmethod
    def traits_of(cls, config: PredictiveCodingConfig, network: Network | None = None) -> Traits:
        return Traits("all", downstream_weights=config.T, reverse_span=cls._span(config, network), passes=1 + config.T)

    def beta(self, epoch: int) -> float:
        """Return the signed strength of the nudging; 1 clamps."""
        if self.config.nudge == "none":
            return 1.0
        size = min(1.0, self.config.beta + self.config.beta_ramp * epoch)
        negative = self.config.nudge == "negative" or (self.config.nudge == "centred" and epoch % 2 == 1)
        return -size if negative else size

    def _begin(self, batch: Batch, step: Step) -> Relaxation:
        config, beta = self.config, self.beta(step.epoch)

        def output(scores: Tensor) -> Output | TaskOutput:
            clamped = self._output(batch, scores)
            return clamped if beta == 1.0 else clamped.nudged(scores, beta)

        zeros = None
        if config.init == "zeros":
            zeros = [batch.inputs.new_zeros(len(batch), *self.network.shapes[name]) for name in self.network.hidden]
        return self._relaxation(batch, output=output, lr=config.state_lr, momentum=config.state_momentum, states=zeros)

    def _weight_scale(self, step: Step) -> float:
        return 1 / self.beta(step.epoch)


class IncrementalPC(Relaxed):
    """States and weights step together, T times per batch."""

    Config = IPCConfig
    weight_lr = 3e-4
    config: IPCConfig
    card = Card(
        "incremental predictive coding: states and weights both step at each inference step",
        paper="Salvatori et al.: A stable, fast, and fully automatic learning algorithm for predictive coding networks. 2022, "
        "arXiv 2212.00720",
        equation="T times: h_l -= lr dF/dh_l and W_l -= eta dF/dW_l, at the same states and weights",
        notes="T optimiser steps per batch. Some codes move the weights after the states within a step; here both see the same point. "
        "Gradients cannot be accumulated over micro-batches.",
    )

    @classmethod
    def traits_of(cls, config: IPCConfig, network: Network | None = None) -> Traits:
        return Traits("all", config.T - 1, reverse_span=cls._span(config, network), update="own-steps", passes=config.T)

    @property
    def reach(self) -> int:
        """Number of hidden blocks that learn: T - 1, since the first weight gradients precede the first move of the states."""
        return self.config.T - 1

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        raise UsageError("ipc applies its updates itself", fix="call learn(batch, step)")

    @torch.no_grad()
    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        return self.relax(batch, step)[1]

    def _infer(self, relaxation: Relaxation, step: Step, *, watched: bool) -> None:
        gradients = relaxation.gradients()
        for index in range(len(relaxation.executions)):
            relaxation.backward(index, 1.0)
        for parameter in self.network.parameters():  # blocks without an error yet step too: momentum and decay continue
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        relaxation.move(gradients)
        step.apply()
        if watched:
            relaxation.refresh_all()


class FixedPrediction(Relaxed):
    """Errors relax while predictions and Jacobians stay those of the forward pass."""

    Config = FixedPredictionConfig
    config: FixedPredictionConfig
    card = Card(
        "predictive coding with predictions held at the forward pass: relaxes to back-propagation's errors",
        paper="Millidge, Tschantz, Buckley: Predictive coding approximates backprop along arbitrary computation graphs. 2020, "
        "arXiv 2006.04182; defaults of Rosenbaum's Torch2PC, 2022",
        equation="T times: e_l -= lr (e_l - J_{l+1}(forward)^T e_{l+1});  then dW_l ~ (df_l/dW_l)^T e_l",
        notes="With state_lr=1 and T at least the number of hidden blocks it is back-propagation. All Jacobians are those of the forward "
        "pass, whose values have to be remembered.",
    )

    @classmethod
    def traits_of(cls, config: FixedPredictionConfig, network: Network | None = None) -> Traits:
        return Traits("all", downstream_weights=config.T, reverse_span=cls._span(config, network), passes=1)

    def _begin(self, batch: Batch, step: Step) -> Relaxation:
        return self._relaxation(batch, lr=self.config.state_lr, hold=True)


class ZIL(Relaxed):
    """Zero-divergence inference learning: predictive coding that is back-propagation, exactly.

    Three conditions: states begin as predictions; the rate is 1; block l learns at inference step L - l and only then.
    What lies above that block has learned already and no longer reaches what lies below in time, so it is not relaxed further.
    """

    Config = ZILConfig
    config: ZILConfig
    card = Card(
        "Z-IL: predictive coding whose updates are back-propagation's, exactly",
        paper="Song, Lukasiewicz, Xu, Bogacz: Can the brain do backpropagation? Exact implementation of backpropagation in predictive "
        "coding networks. NeurIPS 2020",
        equation="forward initialisation; h_l -= dF/dh_l (rate 1); W_l learns at inference step t = L - l only",
        notes="Local calls, global dependence: chained products of single blocks are back-propagation. An oracle, not a proposal.",
    )

    @classmethod
    def traits_of(cls, config: ZILConfig, network: Network | None = None) -> Traits:
        return Traits("all", "all", reverse_span=cls._span(config, network), update="own-steps")

    def _steps(self) -> list[str]:
        return ["relaxation: rate 1, from the forward pass; each block learns when the error has reached it"]

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        raise UsageError("z-il applies its updates itself", fix="call learn(batch, step)")

    @torch.no_grad()
    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        relaxation = self._relaxation(batch, lr=1.0)
        groups = self.groups()
        for index in reversed(range(len(relaxation.executions))):
            gradient = relaxation.gradient(index - 1) if index else None  # before this block's weights move
            relaxation.backward(index, 1.0)
            if self.network.names[index] in groups:
                step.apply(self.network.names[index])
            if gradient is not None:
                relaxation.move({index - 1: gradient})
                relaxation.compare([index - 1])
        return {"loss": relaxation.output.loss(relaxation.scores)}


class ErrorPC(Relaxed):
    """The errors relax instead of the states."""

    Config = EPCConfig
    config: EPCConfig
    card = Card(
        "error-based predictive coding: relaxes errors, which an end-to-end pass reaches at once",
        paper="Goemaere, Oliviers, Bogacz, Demeester: Error optimization: overcoming exponential signal decay in deep predictive coding "
        "networks. 2025, arXiv 2505.20137",
        equation="h_l = f_l(h_{l-1}) + e_l;  T times e_l -= lr (e_l + dE_out/dh_l);  then dW_l ~ (df_l/dW_l)^T e_l",
        notes="The same equilibria as predictive-coding, without its decay with depth, at the price of locality: each step pulls the "
        "output's error through all blocks.",
    )

    @classmethod
    def traits_of(cls, config: EPCConfig, network: Network | None = None) -> Traits:
        return Traits("all", "all", reverse_span=cls._span(config, network), passes=1 + config.T)

    @property
    def reach(self) -> int:
        """Number of hidden blocks that learn: all of them."""
        return len(self.network.hidden)

    def _begin(self, batch: Batch, step: Step) -> Relaxation:
        return self._relaxation(batch, ErrorRelaxation, lr=self.config.state_lr, momentum=self.config.state_momentum)
