"""What one loss trains: blocks in sequence, the noise on them, and the gradients that the noise turns into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bpfree.errors import UsageError
from bpfree.network import add_gradient
from bpfree.network.closed_form import input_gradient, norm_parameter_gradients, output_rows, parameter_gradients
from bpfree.network.perturb import PerturbedPass, Perturber, frozen_statistics, mixes_by_batch_norm
from bpfree.network.reach import Reach, channel_axis, probe
from bpfree.network.sites import Site, Source, find_sites
from bpfree_forward_gradient.losses import Head, own_derivatives, spread
from bpfree_forward_gradient.noise import Noise
from bpfree_forward_gradient.options import ForwardGradientConfig

__all__ = ["Scope"]

EVERYTHING = Reach(examples=False, tokens=False, groups=False)


class Scope:
    """Blocks that one loss trains, or several local losses at the same output.

    Args:
        blocks: name to module, in order.
        input_shape: of the first block's input, without the batch axis.
        config: how the gradient is estimated.
        scores: whether the last block makes scores; the linear map that makes them then takes its exact gradient.
        groups: of output channels with losses of their own.
        tokens: of the output, with losses of their own; 0: none has.

    Attributes:
        module: the blocks in sequence; parameters are named ``<block>.<...>``.
        sites: places of noise on activities.
        final: path of the linear map that makes the scores.
        reach: of each site, of the losses that there are.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        input_shape: torch.Size,
        config: ForwardGradientConfig,
        *,
        scores: bool,
        groups: int = 1,
        tokens: int = 0,
    ) -> None:
        self.config, self.input_shape = config, input_shape
        self.scores, self.groups, self.tokens = scores, groups, tokens
        self.module = nn.Sequential()
        for name, block in blocks.items():
            self.module.add_module(name, block)
        self._members = dict(self.module.named_parameters())
        self._parts: dict[str, nn.Module] = dict(self.module.named_modules())
        self._perturber = Perturber(self.module)
        self._planned: tuple[tuple[bool, ...], list[int], list[str]] | None = None
        first = next(iter(self.module.parameters()), torch.zeros(()))
        found = find_sites(self.module, torch.zeros(2, *input_shape, device=first.device, dtype=first.dtype), final=scores)
        self.final, self.others = found.final, found.others
        self.sites = found.sites if config.perturb == "activities" else tuple(_at_layers(found.sites))
        self.reach = self._probe()
        self._check()

    def _probe(self) -> list[Reach]:
        """Probe what each site reaches while the blocks train."""
        with self._as_in_training():
            found = probe(self.module, self.sites, self.input_shape, self.groups)
        return [Reach(reach.examples, reach.tokens and self.tokens > 0, reach.groups) for reach in found]

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """Set train mode, except for batch norms with frozen statistics; restore each part's own mode."""
        modes = {part: part.training for part in self.module.modules()}
        self.module.train()
        try:
            with self.statistics(None):
                yield
        finally:
            for part, mode in modes.items():
                part.training = mode

    def _check(self) -> None:
        if self.config.per_example and self.config.perturb == "activities":
            return
        apart = all(reach.examples for reach in self.reach)
        names = f"block {', '.join(self.module._modules)}"
        if self.config.per_example and (self._mixes_by_batch_norm() or not apart):
            raise UsageError(
                "where examples meet, as in batch norm in train mode, an example has no derivative of its own",
                where=f"rule.independent=true, {names}",
                fix="rule.independent=false, or with batch norm rule.batch_norm=frozen-statistics",
            )
        if self.config.perturb == "activities" and not apart:
            raise UsageError(
                "one derivative per batch needs independent noise for each example",
                where=f"rule.independent=false, {names}: examples meet behind the noise",
                fix="leave rule.independent unset, or with batch norm rule.batch_norm=frozen-statistics",
            )

    def _mixes_by_batch_norm(self) -> bool:
        """Tell whether a batch norm takes the batch's statistics as the blocks train, in front of the sites too."""
        with self._as_in_training():
            return mixes_by_batch_norm(self.module)

    def statistics(self, x: Tensor | None) -> AbstractContextManager[None]:
        """Use batch norm as configured; its running statistics follow the batch ``x``, if one is given."""
        return nullcontext() if self.config.batch_norm == "batch-scalar" else frozen_statistics(self.module, x)

    # --- one step ---------------------------------------------------------------------------------------------------

    def run(self, x: Tensor, noise: Callable[[str], Noise]) -> Pass:
        """Execute the blocks on (N, *input_shape), along fresh noise on whatever is trainable."""
        source = _Draws(self.config, noise, len(x))
        active, perturbed = self._plan()
        sites = [self.sites[index] for index in active]
        places = iter(_places(active, perturbed))
        drawn = [source.activities(next(places), site, x) for site in sites]
        weights = {name: source.weights(next(places), name, self._members[name]) for name in perturbed}
        record = {path for site in sites for path in self._recorded(site)} | ({self.final} if self.final is not None else set())
        with self.statistics(x):
            if self.perturbs_per_example and weights:
                execution = self._perturber.execute_per_example(x, weights, record=record)
            else:
                options = {"mask": self.config.mask, "together": self.config.together}
                execution = self._perturber.execute(x, sites, drawn, weights, record=record, **options)
        return Pass(self, execution, active, weights)

    @property
    def perturbs_per_example(self) -> bool:
        """Whether each example has noise of its own on the parameters."""
        return self.config.perturb == "weights" and self.config.per_example

    def perturbed_parameters(self) -> list[str]:
        """List the names of the trainable parameters that noise is put on."""
        return self._plan()[1]

    def _plan(self) -> tuple[list[int], list[str]]:
        """Return the sites and the parameters that get noise: those with something to learn. Kept while these parameters stay the same."""
        self._members = dict(self.module.named_parameters())  # looked up again: a phase may have replaced parameters
        learns = tuple(parameter.requires_grad for parameter in self._members.values())
        if self._planned is None or self._planned[0] != learns:
            names = [name for name, wanted in zip(self._members, learns, strict=True) if wanted]
            self._planned = (learns, self._active(set(names)), self._perturbed(names))
        return self._planned[1:]

    def _active(self, learns: set[str]) -> list[int]:
        if self.config.perturb == "weights":
            return []
        return [index for index, site in enumerate(self.sites) if self._parameters(site) & learns]

    def _perturbed(self, learns: list[str]) -> list[str]:
        if self.config.perturb == "activities":
            wanted = set(self.others) - self._from_estimate()
            return [name for name in learns if name in wanted]
        return [name for name in learns if self.final is None or not name.startswith(f"{self.final}.")]

    def parameter(self, name: str) -> nn.Parameter:
        """Return a parameter by its name, such as ``b1.0.weight``."""
        return self._members[name]

    def part(self, path: str) -> nn.Module:
        """Return a module by its path."""
        return self._parts[path]

    def _parameters(self, site: Site) -> set[str]:
        paths = [path for source in site.sources for path in (source.layer, source.norm) if path is not None]
        return {f"{path}.{name}" for path in paths for name, _ in self.part(path).named_parameters()}

    def _recorded(self, site: Site) -> Iterator[str]:
        for source in site.sources:
            yield source.layer
            if source.norm is not None:
                yield source.norm

    def _from_estimate(self) -> set[str]:
        """List the parameters of normalisations that take their gradient from the activities' estimate."""
        if self.config.norm_scales == "weights":
            return set()
        norms = [source.norm for site in self.sites for source in site.sources if source.norm is not None]
        return {f"{path}.{name}" for path in norms for name, _ in self.part(path).named_parameters()}

    def rows(self, name: str) -> Reach:
        """Return what a parameter's direction reaches, by rows: groups of its own only if each row makes one output channel."""
        path, _, _ = name.rpartition(".")
        for site, reach in zip(self.sites, self.reach, strict=True):
            rows = output_rows(self.part(path)) if _makes_channels(self.part(path), site.shape) else None
            if rows is not None and rows % self.groups == 0 and any(source.layer == path for source in site.sources):
                return Reach(examples=False, tokens=False, groups=reach.groups)
        return EVERYTHING


class Pass:
    """One perturbed execution of a scope, waiting for the cotangent of its output."""

    def __init__(self, scope: Scope, execution: PerturbedPass, active: list[int], weights: dict[str, Tensor]) -> None:
        self._scope, self._execution, self._active, self._weights = scope, execution, active, weights
        self.output = execution.output

    def credit(self, cotangent: Tensor, head: Head | None = None) -> None:
        """Add to ``.grad``: noise times the derivative of the loss along it, and the exact gradient of the final linear map.

        Args:
            cotangent: (N, ...) dLoss/dOutput of the scope, or of the head, with the 1/N of the mean.
            head: behind the scope.
        """
        scope, execution = self._scope, self._execution
        if scope.final is not None and scope.final in execution.inputs:
            self._add(scope.final, parameter_gradients(scope.part(scope.final), execution.inputs[scope.final], cotangent))
        if execution.tangent is None:
            return
        products = self._products(cotangent, execution.tangent, head)
        with scope.statistics(None):
            for index, noise in zip(self._active, execution.noise, strict=True):
                executed = [source for source in scope.sites[index].sources if source.layer in execution.inputs]
                if executed:  # else left out this time, by a random depth
                    signal = self._estimate(products, index, noise)
                for source in executed:
                    self._through(source, signal)
        for name, direction in self._weights.items():
            self._grad(name, _along(products, direction, scope.rows(name), scope.groups, scope.perturbs_per_example))

    def _products(self, cotangent: Tensor, tangent: Tensor, head: Head | None) -> Tensor:
        """Return (K, N, ...): products that sum to the derivatives, at the head's few scores or at output units that losses divide."""
        scope = self._scope
        if head is None:
            return cotangent * tangent
        if scope.groups == 1 and not scope.tokens and tangent.dim() == 3:
            return torch.matmul(tangent, head.linear.weight.t()).mul_(cotangent)
        return head.cotangent(cotangent) * tangent

    def _estimate(self, products: Tensor, index: int, noise: Tensor) -> Tensor:
        """Estimate the cotangent (N, *site.shape) at a site: the mean over directions of derivative times noise."""
        scope = self._scope
        derivatives = own_derivatives(products, scope.reach[index], scope.groups)
        scale, site = spread(derivatives, scope.sites[index].shape), scope.sites[index]
        own = site.masked and scope.config.mask and noise.shape[1] == products.shape[1]  # then the masked noise is not used elsewhere
        scaled = noise.mul_(scale) if own else noise * scale
        estimate = scaled[0] if len(scaled) == 1 else scaled.mean(0)
        return estimate.expand(products.shape[1], *estimate.shape[1:])

    def _through(self, source: Source, signal: Tensor) -> None:
        """Pass an estimate from a site back through the normalisation in front of it to the linear map's parameters."""
        scope, inputs = self._scope, self._execution.inputs
        if source.norm is not None:
            norm = scope.part(source.norm)
            if scope.config.norm_scales == "activities":
                self._add(source.norm, norm_parameter_gradients(norm, inputs[source.norm], signal))
            if scope.config.norm_gradient == "exact":
                signal = input_gradient(norm, inputs[source.norm], signal)
        self._add(source.layer, parameter_gradients(scope.part(source.layer), inputs[source.layer], signal))

    def _add(self, path: str, gradients: Mapping[str, Tensor]) -> None:
        for name, value in gradients.items():
            self._grad(f"{path}.{name}", value)

    def _grad(self, name: str, value: Tensor) -> None:
        add_gradient(self._scope.parameter(name), value)


def _along(products: Tensor, direction: Tensor, rows: Reach, groups: int, per_example: bool) -> Tensor:
    """Return a parameter's estimate: the mean over directions of derivative times direction, by row groups with own losses."""
    reach = replace(rows, examples=per_example and direction.dim() > 0)
    derivatives = own_derivatives(products, reach, groups).squeeze(2)  # (K, N or 1, G or 1)
    by_row = rows.groups and groups > 1
    if per_example:
        parts = direction.flatten(2).unflatten(2, (groups if by_row else 1, -1))
        estimate = torch.einsum("kng,kngr->gr", derivatives, parts)
    else:
        parts = direction.flatten(1).unflatten(1, (groups if by_row else 1, -1))
        estimate = torch.einsum("kg,kgr->gr", derivatives[:, 0], parts)
    shape = direction.shape[2:] if per_example else direction.shape[1:]
    return (estimate / len(direction)).reshape(shape)


class _Draws:
    """Noise for one step of a scope, each block's from its own stream."""

    def __init__(self, config: ForwardGradientConfig, noise: Callable[[str], Noise], examples: int) -> None:
        self._config, self._noise, self._examples = config, noise, examples
        self._streams: dict[str, Noise] = {}

    def _stream(self, path: str) -> Noise:
        block = path.partition(".")[0]
        if block not in self._streams:
            self._streams[block] = self._noise(block)
        return self._streams[block]

    def activities(self, place: int | None, site: Site, x: Tensor) -> Tensor:
        examples = self._examples if self._config.per_example else 1
        return self._stream(site.module).draw(
            (examples, *site.shape), place, x.device, torch.float32 if not x.is_floating_point() else x.dtype
        )

    def weights(self, place: int | None, name: str, parameter: Tensor) -> Tensor:
        own = self._config.perturb == "weights" and self._config.per_example
        shape = (self._examples, *parameter.shape) if own else tuple(parameter.shape)
        return self._stream(name).draw(shape, place, parameter.device, parameter.dtype)


def _places(sites: list[int], parameters: list[str]) -> list[int | None]:
    """Return a number for each site, and for each parameter that of its module; ``None`` if there would be one number only."""
    keys: list[int | str] = [*sites, *(name.rpartition(".")[0] for name in parameters)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] if len(numbers) > 1 else None for key in keys]


def _makes_channels(layer: nn.Module, shape: torch.Size) -> bool:
    """Tell whether the rows of a map's weight are the channels of its output.

    They are not for a linear map of an image's columns, nor for a convolution in one or three dimensions.
    """
    if isinstance(layer, nn.Linear):
        return channel_axis(shape) == len(shape) - 1
    return not isinstance(layer, _ConvNd) or channel_axis(shape) == 0


def _at_layers(sites: tuple[Site, ...]) -> Iterator[Site]:
    """List where noise on weights enters: at the outputs of the linear maps themselves."""
    for site in sites:
        for source in site.sources:
            yield Site((Source(source.layer),), source.layer, site.shape)
