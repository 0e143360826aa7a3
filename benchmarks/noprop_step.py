"""NoProp-DT's simultaneous step against the raw forward and backward passes of its blocks. Target: at most 1.05.

Ours is ``credit``: noise, embeddings, the T block losses and the head's loss, and their backward passes. The other side is a
loop over the same block modules with the same inputs and loss (in its cheapest form) on noised labels made beforehand: no
rule code, no noise, no head. Dropping ``.grad`` is in both, the optimiser's step in neither. The head's loss and the noise
are thus part of what is called overhead. Dense blocks are also computed as one, by batched products, which is less work than the raw
passes.

Also, in separate pairs: ``credit`` under bf16 autocast (as ``precision=bf16``) against itself in fp32, for the paper's block at
most 1/1.6 where the processor has bf16 units. Without them bf16 is emulated, and slower.

Of convolutional networks, the image paths (what comes before ``Flatten``) of all blocks at once, by grouped convolutions and by
``vmap``, against one after the other, forward and backward, without dropout. Neither pays on a CPU, so rules do not do it.

Any model as the blocks' stems (``network=noprop``): torchvision's ResNet-18 in CIFAR form, a quarter of the width, T=4.

Also reported: milliseconds of a whole step (``learn``, with the optimiser) of each network; for the paper's own block at
T=10 and batch 128 that is the cost per step that the README quotes. Random inputs of the tasks' shapes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import measure
import torch
import torch.nn.functional as F
from bpfree_noprop.dropout import KeyedDropout
from torch import Tensor, nn

from bpfree import Batch
from bpfree.config import parse_words, resolve
from bpfree.rule import Rule
from bpfree.training.environment import autocast
from bpfree.training.stepper import new_step

TARGET, BF16_TARGET = 1.05, 1 / 1.6


@dataclass(frozen=True)
class Case:
    """A network at the sizes of a task, with further settings; ``repeat`` steps make one measurement."""

    network: str
    task: str
    batch: int
    repeat: int
    settings: tuple[str, ...] = ()
    about: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.network, self.about, self.task, f"batch {self.batch}"]))

    @property
    def has_image_paths(self) -> bool:
        """Whether the blocks' stems are chains of layers up to a ``Flatten``."""
        return self.network in ("noprop-cnn", "noprop-paper")


CASES = (
    Case("noprop-mlp", "digits", 64, 40),
    Case("noprop-mlp", "digits", 64, 40, ("rule.execution=stacked",), "stacked"),
    Case("noprop-cnn", "mnist", 64, 4),
    Case("noprop-paper", "mnist", 128, 1),
    Case("noprop", "cifar10", 128, 1, ("network.stem=torchvision:resnet18", "network.options={width: 0.25}", "rule.T=4"), "ResNet-18 / 4"),
)


def make(case: Case, device: torch.device, batch_size: int) -> tuple[Rule, Batch]:
    """Build the rule on noised labels, by default of ten blocks, with the case's settings, and a random batch."""
    settings = [
        "rule=noprop-dt",
        "rule.state=noised",
        "rule.execution=loop",
        f"task={case.task}",
        f"network={case.network}",
        *case.settings,
    ]
    recipe = resolve(parse_words(settings))
    spec = recipe.registry.get("tasks", case.task).spec(recipe.options["task"], None)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch_size, *spec.input_shape, generator=generator)
    targets = torch.randint(spec.outputs, (batch_size,), generator=generator)
    return recipe.build_rule(spec).to(device).train(), Batch(inputs.to(device), targets.to(device))


def raw_passes(rule: Any, batch: Batch) -> Callable[[], None]:
    """Return the forward and backward passes of each block on labels that are noised in advance."""
    blocks = list(rule.network.blocks.values())
    u = F.one_hot(batch.targets, rule.spec.outputs).float()
    states = [rule.schedule.signal[t] * u + rule.schedule.noise[t] * torch.randn_like(u) for t in range(len(blocks))]
    weights = [0.5 * rule.config.eta * float(rule.schedule.dsnr[t + 1]) / len(u) for t in range(len(blocks))]
    parameters = list(rule.parameters())

    def work() -> None:
        for block, z, weight in zip(blocks, states, weights, strict=True):
            loss = F.mse_loss(block(batch.inputs, z).softmax(1), u, reduction="sum") * weight
            loss.backward()
        drop(parameters)

    return work


def credit_only(rule: Rule, batch: Batch, step: Any, *, bf16: bool = False) -> Callable[[], None]:
    """Return the rule's own part of a step."""
    parameters = list(rule.parameters())

    def work() -> None:
        with autocast(batch.inputs.device, "bf16" if bf16 else "fp32"):
            rule.credit(batch, step)
        step.index += 1
        drop(parameters)

    return work


def drop(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def image_paths(rule: Any, batch: Batch) -> dict[str, Callable[[], None]]:
    """Return passes through the image paths of all blocks: in a loop, as grouped convolutions, by ``vmap``.

    All start from the same weights, see the same images, and add up what comes out. Running statistics move in all of them.
    """
    paths = [
        nn.Sequential(*itertools.takewhile(lambda layer: not isinstance(layer, nn.Flatten), block.stem))
        for block in rule.network.blocks.values()
    ]
    paths = [nn.Sequential(*(layer for layer in path if not isinstance(layer, KeyedDropout))) for path in copy.deepcopy(paths)]
    grouped = nn.Sequential(*(at_once(layers, first=place == 0) for place, layers in enumerate(zip(*paths, strict=True))))
    weights, buffers = torch.func.stack_module_state(paths)  # type: ignore[arg-type]
    model = copy.deepcopy(paths[0])

    def one(weights: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (weights, buffers), (x,))  # type: ignore[no-any-return]

    of_all = torch.func.vmap(one, in_dims=(0, 0, None))
    leaves = [*weights.values(), *grouped.parameters(), *(p for path in paths for p in path.parameters())]

    def passes(outputs: Callable[[], Iterable[Tensor]]) -> Callable[[], None]:
        def work() -> None:
            for output in outputs():
                output.square().sum().backward()
            drop(leaves)

        return work

    return {
        "loop": passes(lambda: (path(batch.inputs) for path in paths)),
        "grouped": passes(lambda: [grouped(batch.inputs)]),
        "mapped": passes(lambda: [of_all(weights, buffers, batch.inputs)]),
    }


def at_once(layers: Sequence[Any], *, first: bool) -> nn.Module:
    """Join the layers of T blocks at one place into one with T times the channels; the ``first`` reads one image for all."""
    example, T = layers[0], len(layers)
    whole: nn.Module
    if isinstance(example, nn.Conv2d):
        sizes = {"stride": example.stride, "padding": example.padding, "groups": 1 if first else T}
        whole = nn.Conv2d(example.in_channels * (1 if first else T), example.out_channels * T, example.kernel_size, **sizes)  # type: ignore[arg-type]
    elif isinstance(example, nn.BatchNorm2d):
        whole = nn.BatchNorm2d(example.num_features * T)
    else:
        return copy.deepcopy(example)  # type: ignore[no-any-return]
    whole.to(example.weight.device, example.weight.dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(torch.cat([getattr(layer, name) for layer in layers]))
    return whole


def bf16_units(device: torch.device) -> bool | None:
    """Tell whether the device multiplies in bf16; ``None`` if torch does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    tests = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    found = [bool(test()) for test in tests if test is not None]
    return any(found) if found else None


def measure_case(case: Case, device: torch.device, pairs: int, *, quick: bool) -> dict[str, Any]:
    """Measure the ratio to the raw passes, the ratio of bf16 to fp32, and the cost of a whole step."""
    torch.manual_seed(0)
    repeat = 1 if quick else case.repeat * (10 if device.type == "cuda" else 1)
    rule, batch = make(case, device, 8 if quick else case.batch)
    step = new_step(rule)
    ours, half, raw = (
        measure.timed(work, device, repeat=repeat)
        for work in (credit_only(rule, batch, step), credit_only(rule, batch, step, bf16=True), raw_passes(rule, batch))
    )
    measure.interleaved(ours, raw, 1)
    result = measure.compared(measure.interleaved(ours, raw, pairs), TARGET)
    measure.interleaved(half, ours, 1)
    target = BF16_TARGET if case.network == "noprop-paper" and bf16_units(device) else None
    result["bf16"] = measure.compared(measure.interleaved(half, ours, pairs), target)
    if case.has_image_paths:
        ways = {way: measure.timed(work, device, repeat=repeat) for way, work in image_paths(rule, batch).items()}
        for way in ("grouped", "mapped"):
            measure.interleaved(ways[way], ways["loop"], 1)
            result[way] = measure.compared(measure.interleaved(ways[way], ways["loop"], pairs), None)
    whole = measure.timed(lambda: rule.learn(batch, step), device, repeat=repeat)
    whole()
    times = sorted(whole().wall for _ in range(1 if quick else 5))
    return result | {"batch": len(batch), "T": rule.config.T, "learn_seconds": times, "learn_median_ms": 1000 * times[len(times) // 2]}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = measure.Benchmark("noprop_step", __doc__, pairs=11)
    benchmark.parser.add_argument("--network", choices=sorted({case.network for case in CASES}), help="measure only this network")
    options = benchmark.start(arguments)
    results = {
        str(case): measure_case(case, benchmark.device, options.pairs, quick=options.quick)
        for case in CASES
        if options.network in (None, case.network)
    }
    measure.show_ratios(results)
    print("bf16 (ours) against fp32 (bare); units for bf16:", bf16_units(benchmark.device))
    measure.show_ratios({label: result["bf16"] for label, result in results.items()})
    print("image paths of all blocks at once, as grouped convolutions or mapped by vmap (ours), against one after the other (bare)")
    measure.show_ratios(
        {f"{label}, {way}": result[way] for label, result in results.items() for way in ("grouped", "mapped") if way in result}
    )
    for label, result in results.items():
        print(f"{label}: {result['learn_median_ms']:.2f} ms per step with the optimiser (T={result['T']})")
    suffix = f"_{options.network}" if options.network else ""
    benchmark.finish({"bf16_units": bf16_units(benchmark.device), "cases": results}, suffix=suffix)


if __name__ == "__main__":
    main()
