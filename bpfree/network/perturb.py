"""Directional derivatives of a module by forward mode: along noise on its activities, on its parameters, or both.

No graph is recorded and nothing is called in reverse. One execution gives the output, its derivative along every direction, and
the inputs that closed forms (:mod:`bpfree.network.closed_form`) turn into gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap

from bpfree.errors import UsageError
from bpfree.network.closed_form import is_batch_norm, is_linear
from bpfree.network.forward_mode import Products, differentiable_kernels, dual, prepare, where_active
from bpfree.network.sequential_jvp import Chain
from bpfree.network.sites import Site

__all__ = ["PerturbedPass", "Perturber", "frozen_statistics", "mixes_by_batch_norm"]


@dataclass
class PerturbedPass:
    """Results of one perturbed execution, for K directions on N examples.

    Attributes:
        output: (N, ...).
        tangent: (K, N, ...) derivative of the output along each direction; ``None`` if there was no direction.
        inputs: of the modules that were to be recorded, by path.
        noise: (K, N or 1, ...) per site, as it was added: zero on inactive units where the site is masked.
    """

    output: Tensor
    tangent: Tensor | None
    inputs: dict[str, Tensor]
    noise: list[Tensor]


class Perturber:
    """Executes a module along directions.

    Args:
        module: a block, or several in sequence; it is kept, not copied.
        quick: use :class:`bpfree.network.sequential_jvp.Chain` where it fits, which calls no function of torch for a ReLU's derivative.
    """

    def __init__(self, module: nn.Module, *, quick: bool = True) -> None:
        prepare()
        self.module = module
        self._parts = dict(module.named_modules())
        attends = any(isinstance(part, nn.MultiheadAttention) for part in self._parts.values())  # its path for inference has no derivative
        self._chain = Chain(module) if quick else None
        self._products = attends or sum(is_linear(part) for part in self._parts.values()) > 1

    def execute(
        self,
        x: Tensor,
        sites: Sequence[Site] = (),
        noise: Sequence[Tensor] = (),
        weights: Mapping[str, Tensor] | None = None,
        *,
        record: Collection[str] = (),
        mask: bool = True,
        together: bool = True,
    ) -> PerturbedPass:
        """Execute once, with the derivative along K directions.

        Args:
            x: (N, ...) the module's input.
            sites: places of noise on activities.
            noise: (K, N or 1, *site.shape) for each site.
            weights: (K, *shape) directions of parameters, by name.
            record: paths of modules whose inputs are wanted.
            mask: leave noise out on inactive units, at the sites that allow it.
            together: several directions at once by ``vmap``. One by one where batch norm updates its running statistics, which
                ``vmap`` excludes; these are then updated once, and all directions meet the same dropout masks.
        """
        weights = weights or {}
        directions = next((len(value) for value in [*noise, *weights.values()]), 0)
        if not directions:
            return self._plain(x, record)
        at_once = directions == 1 or (together and not mixes_by_batch_norm(self.module))
        if at_once and self._chain is not None and self._chain.fits(sites, weights, record):
            return PerturbedPass(*self._chain.execute(x, sites, noise, weights, record, mask))
        if directions == 1:
            return self._once(x, sites, noise, weights, record, mask, 0)
        if at_once:
            return self._together(x, sites, noise, weights, record, mask)
        results = _repeated(self.module, x, lambda k: self._once(x, sites, noise, weights, record, mask, k), directions)
        tangent = torch.cat([result.tangent for result in results if result.tangent is not None])
        used = [torch.cat(parts) for parts in zip(*(result.noise for result in results), strict=True)]
        return PerturbedPass(results[0].output, tangent, results[0].inputs, used)

    def execute_per_example(self, x: Tensor, weights: Mapping[str, Tensor], *, record: Collection[str] = ()) -> PerturbedPass:
        """Execute along parameters with a direction of its own for each example; otherwise like :meth:`execute`.

        Args:
            x: (N, ...).
            weights: (K, N, *shape) by parameter name.
            record: paths of modules whose inputs are wanted.

        Raises:
            UsageError: batch norm in train mode, where an example has no output of its own.
        """
        if mixes_by_batch_norm(self.module):
            raise UsageError(
                "with batch norm in train mode there is no derivative per example", fix="freeze its statistics, or share the directions"
            )
        parameters = self._values(weights)

        def one(example: Tensor, moves: dict[str, Tensor]) -> Any:
            def run(moved: dict[str, Tensor]) -> tuple[Tensor, Any]:
                inputs: dict[str, Tensor] = {}
                with self._hooked((), _unchanged, record, inputs.__setitem__):
                    output = functional_call(self.module, moved, (example.unsqueeze(0),))[0]
                return output, (output, {path: value[0] for path, value in inputs.items()})

            return jvp(run, (parameters,), (moves,), has_aux=True)[1:]

        with torch.no_grad(), differentiable_kernels(self.module), Products():
            batched = vmap(one, in_dims=(0, 0), randomness="different")
            each: Any = vmap(batched, in_dims=(None, 0), out_dims=(0, None), randomness="same")  # type: ignore[arg-type]
            tangent, (output, inputs) = each(x, dict(weights))
        return PerturbedPass(output, tangent, inputs, [])

    def _values(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.module.get_parameter(name).detach() for name in weights}

    def _plain(self, x: Tensor, record: Collection[str]) -> PerturbedPass:
        if self._chain is not None and self._chain.fits((), (), record):
            return PerturbedPass(*self._chain.execute(x, (), (), {}, record, mask=False))
        inputs: dict[str, Tensor] = {}
        with torch.no_grad(), self._hooked((), _unchanged, record, inputs.__setitem__):
            return PerturbedPass(self.module(x), None, inputs, [])

    def _once(
        self,
        x: Tensor,
        sites: Sequence[Site],
        noise: Sequence[Tensor],
        weights: Mapping[str, Tensor],
        record: Collection[str],
        mask: bool,
        k: int,
    ) -> PerturbedPass:
        """Execute along direction k alone, by dual numbers."""
        used = [n[k : k + 1] for n in noise]
        inputs: dict[str, Tensor] = {}

        def inject(index: int, value: Tensor) -> Tensor:
            primal, moved = forward_ad.unpack_dual(value)
            if mask and sites[index].masked:
                used[index] = where_active(used[index], primal)
            direction = used[index][0].to(primal.dtype).expand_as(primal)
            # A copy, because layers that work in place overwrite the tangent too.
            return dual(primal, direction.clone() if moved is None else moved + direction)

        def keep(path: str, value: Tensor) -> None:
            inputs[path] = forward_ad.unpack_dual(value).primal

        products = Products() if weights or self._products else nullcontext()
        with (
            torch.no_grad(),
            differentiable_kernels(self.module),
            forward_ad.dual_level(),
            products,
            self._hooked(sites, inject, record, keep),
        ):
            duals = {name: forward_ad.make_dual(value, weights[name][k]) for name, value in self._values(weights).items()}
            moved = functional_call(self.module, duals, (x,)) if duals else self.module(x)
            output, tangent = forward_ad.unpack_dual(moved)
        return PerturbedPass(output, (torch.zeros_like(output) if tangent is None else tangent).unsqueeze(0), inputs, used)

    def _together(
        self,
        x: Tensor,
        sites: Sequence[Site],
        noise: Sequence[Tensor],
        weights: Mapping[str, Tensor],
        record: Collection[str],
        mask: bool,
    ) -> PerturbedPass:
        """Execute along all directions at once: the output is computed once, and only derivatives are batched."""
        parameters = self._values(weights)
        zeros = [torch.zeros(n.shape[1:], dtype=n.dtype, device=n.device) for n in noise]

        def run(shifts: list[Tensor], moved: dict[str, Tensor]) -> tuple[Tensor, Any]:
            inputs: dict[str, Tensor] = {}
            active: dict[int, Tensor] = {}

            def inject(index: int, value: Tensor) -> Tensor:
                if mask and sites[index].masked:  # the ReLU itself stops the noise on inactive units; what was used is masked below
                    active[index] = value
                return value + shifts[index].to(value.dtype)

            with self._hooked(sites, inject, record, inputs.__setitem__):
                output = functional_call(self.module, moved, (x,)) if moved else self.module(x)
            return output, (output, inputs, active)

        def along(shifts: list[Tensor], moves: dict[str, Tensor]) -> Any:
            return jvp(run, (zeros, parameters), (shifts, moves), has_aux=True)[1:]

        with torch.no_grad(), differentiable_kernels(self.module), Products():
            each: Any = vmap(along, out_dims=(0, None), randomness="same")  # type: ignore[arg-type]
            tangent, (output, inputs, active) = each(list(noise), dict(weights))
        used = [where_active(n, active[i]) if i in active else n for i, n in enumerate(noise)]
        return PerturbedPass(output, tangent, inputs, used)

    @contextmanager
    def _hooked(
        self,
        sites: Sequence[Site],
        inject: Callable[[int, Tensor], Tensor],
        record: Collection[str],
        keep: Callable[[str, Tensor], None],
    ) -> Iterator[None]:
        """Add noise at the sites and record the inputs, during one execution."""
        handles = []
        sums: dict[str, dict[int, int]] = {}
        for path in record:
            handles.append(self._parts[path].register_forward_pre_hook(lambda part, args, path=path: keep(path, args[0])))
        for index, site in enumerate(sites):
            if site.before:
                sums.setdefault(site.module, {})[site.call] = index
            else:
                handles.append(self._parts[site.module].register_forward_hook(lambda part, args, out, index=index: inject(index, out)))
        for path, indices in sums.items():
            handles.append(self._parts[path].register_forward_pre_hook(_in_front(indices, inject)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _in_front(indices: Mapping[int, int], inject: Callable[[int, Tensor], Tensor]) -> Callable[..., Any]:
    """Make a hook that adds noise to the input of a module, in some of its calls."""
    calls = itertools.count()

    def hook(part: nn.Module, args: Any) -> Any:
        call = next(calls)
        return (inject(indices[call], args[0]), *args[1:]) if call in indices else None

    return hook


def _unchanged(index: int, value: Tensor) -> Tensor:
    return value


def _repeated(module: nn.Module, x: Tensor, run: Callable[[int], PerturbedPass], times: int) -> list[PerturbedPass]:
    """Execute several times with the effects of one: the same dropout masks, running statistics updated once."""
    devices = [x.device] if x.is_cuda else []
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    cpu, cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    results = [run(0)]
    for k in range(1, times):
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(cpu)
            for device, state in zip(devices, cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            for buffer, before in buffers:
                buffer.copy_(before)
            results.append(run(k))
    return results


# --- batch norm -----------------------------------------------------------------------------------------------------


def mixes_by_batch_norm(module: nn.Module) -> bool:
    """Tell whether a batch norm of the module, in its present mode, uses the batch's statistics."""
    return any(is_batch_norm(part) and (part.training or part.running_mean is None) for part in module.modules())


@contextmanager
def frozen_statistics(module: nn.Module, x: Tensor | None) -> Iterator[None]:
    """Let batch norms use their running statistics inside, so that each example has an output of its own.

    The statistics follow the batch first, which takes one more forward pass.

    Args:
        module: whose batch norms in train mode are frozen.
        x: (N, ...) the batch that comes; ``None``: the statistics stay as they are.
    """
    parts: list[Any] = [part for part in module.modules() if is_batch_norm(part) and part.training and part.running_mean is not None]
    for part in parts:
        part.training = False
    try:
        if parts and x is not None:
            _follow(module, parts, x)
        yield
    finally:
        for part in parts:
            part.training = True


def _follow(module: nn.Module, parts: Sequence[Any], x: Tensor) -> None:
    handles = [part.register_forward_pre_hook(lambda part, args: _update(part, args[0])) for part in parts]
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            module(x)
    finally:
        for handle in handles:
            handle.remove()


def _update(part: Any, x: Tensor) -> None:
    """Update running statistics as torch does in train mode: exponential (or, without momentum, cumulative) averages, unbiased variance.

    One value per channel has no such variance: where torch would refuse to train, the statistics stay as they are.
    """
    if x.numel() <= x.shape[1]:
        return
    part.num_batches_tracked.add_(1)
    momentum = part.momentum if part.momentum is not None else 1.0 / float(part.num_batches_tracked)
    variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), [0, *range(2, x.dim())])
    part.running_mean.lerp_(mean.to(part.running_mean.dtype), momentum)
    part.running_var.lerp_(variance.to(part.running_var.dtype), momentum)
