"""A predictive-coding step of PCX, for predictive_coding_step.py beside it. Runs in PCX's environment, without torch or bpfree.

``python -m venv PCX && PCX/bin/pip install pcx==0.6.3 jax==0.4.38 equinox==0.11.12 optax==0.2.5``; then ``--pcx PCX/bin/python``.

An MLP of vodes with a squared error each, initialised by a forward pass; T gradient steps on the states' summed energy, then one
AdamW step on the weights' mean energy, all of it in one jit, as in PCX's own examples.

Once compiled, it prints a line of JSON about itself, and answers each line on its standard input with another:

- ``run K``: K steps; seconds of the clock and of processors, in all threads.
- ``check IN OUT``: one step after another from the weights, inputs and one-hot targets in the npz file IN, as many as there are
  batches, with a new optimiser; writes the weights to OUT. For comparing the arithmetic, not the time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES, BATCH = (784, 300, 300, 10), 64
DISTRIBUTIONS = ("pcx", "jax", "jaxlib", "equinox", "optax", "numpy")
OWN_BATCHES = 32
"""Random ones that ``run`` goes through again and again, as the other side does."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="cores that the process may use (default 1)")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="units of every layer, inputs and outputs too")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--activation", choices=["gelu", "gelu-tanh", "relu", "tanh"], default="gelu", help="gelu: exact, as torch's")
    parser.add_argument("--output", choices=["squared", "cross-entropy"], default="squared", help="energy of the clamped output")
    parser.add_argument("--T", type=int, default=8, help="steps of inference")
    parser.add_argument("--state-lr", type=float, default=0.01)
    parser.add_argument("--state-momentum", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=3e-4, help="rate of AdamW on the weights")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="weight decay of AdamW (default 0.01, torch's)")
    parser.add_argument("--loop", choices=["unrolled", "scan"], default="unrolled", help="form of the loop over inference steps")
    parser.add_argument("--warm", type=int, default=20, help="steps before the first line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accuracy", type=Path, metavar="FILE.npz", help="train on its x_train, y_train and test on x_test, y_test")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of --accuracy")
    return parser.parse_args(arguments)


def limit(threads: int) -> None:
    """Restrict the process to this many cores, before jax is imported, which starts a thread for each core that it sees."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if threads == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()


@dataclass
class Trainer:
    """What PCX has built."""

    train: Callable[[Any, Any], None]
    """One step on inputs and one-hot targets."""
    evaluate: Callable[[Any], Any]
    """Classes of inputs."""
    restart: Callable[[Sequence[tuple[Any, Any]]], None]
    """Take these weights and biases, with a new optimiser."""
    wait: Callable[[], None]
    """Until all steps are done."""
    layers: Sequence[Any]


def build(options: argparse.Namespace) -> Trainer:
    """Build the network, its optimisers and its step."""
    import jax
    import jax.numpy as jnp
    import optax
    import pcx
    import pcx.functional as pxf
    import pcx.nn as pxnn
    import pcx.predictive_coding as pxc
    import pcx.utils as pxu

    pcx.RKG.seed(options.seed)
    activations = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu-tanh": jax.nn.gelu, "relu": jax.nn.relu, "tanh": jnp.tanh}
    energy_of_output = {"squared": pxc.se_energy, "cross-entropy": pxc.ce_energy}[options.output]
    per_example = pxu.M(pxc.VodeParam | pxc.VodeParam.Cache).to((None, 0))
    free_states = pxu.M_hasnot(pxc.VodeParam, frozen=True)

    class Net(pxc.EnergyModule):
        def __init__(self) -> None:
            super().__init__()
            self.activation = pcx.static(activations[options.activation])
            self.layers = [pxnn.Linear(a, b) for a, b in zip(options.sizes[:-1], options.sizes[1:], strict=True)]
            self.vodes = [*(pxc.Vode() for _ in self.layers[1:]), pxc.Vode(energy_of_output)]
            self.vodes[-1].h.frozen = True

        def __call__(self, x: Any, y: Any = None) -> Any:
            for layer, vode in zip(self.layers[:-1], self.vodes[:-1], strict=True):
                x = vode(self.activation(layer(x)))
            self.vodes[-1](self.layers[-1](x))
            if y is not None:
                self.vodes[-1].set("h", y)
            return self.vodes[-1].get("u")

    @pxf.vmap(per_example, in_axes=(0, 0), out_axes=0)
    def forward(x: Any, y: Any, *, model: Any) -> Any:
        return model(x, y)

    @pxf.vmap(per_example, in_axes=(0,), out_axes=None, axis_name="batch")
    def energy(x: Any, *, model: Any) -> Any:
        model(x)
        return jax.lax.psum(model.energy(), "batch")

    of_states = pxf.value_and_grad(pxu.M_hasnot(pxc.VodeParam, frozen=True).to((False, True)))(energy)
    of_weights = pxf.value_and_grad(pxu.M(pxnn.LayerParam).to((False, True)))(energy)

    def relax(x: Any, *, model: Any, optim_h: Any) -> None:
        with pxu.step(model, clear_params=pxc.VodeParam.Cache):
            _, gradient = of_states(x, model=model)
        optim_h.step(model, gradient["model"])

    @pxf.jit()
    def train(x: Any, y: Any, *, model: Any, optim_w: Any, optim_h: Any) -> None:
        model.train()
        with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
            forward(x, y, model=model)
        optim_h.init(free_states(model))
        if options.loop == "scan":
            with pxu.step(model, pxc.STATUS.NONE):  # the status is static, so it has to be the same before and after a scanned step
                pass

            def body(_: Any, inputs: Any, *, model: Any, optim_h: Any) -> Any:
                relax(inputs, model=model, optim_h=optim_h)
                return inputs, None

            pxf.scan(body, length=options.T)(x, model=model, optim_h=optim_h)
        else:
            for _ in range(options.T):
                relax(x, model=model, optim_h=optim_h)
        optim_h.clear()
        with pxu.step(model, clear_params=pxc.VodeParam.Cache):
            _, gradient = of_weights(x, model=model)
        optim_w.step(model, gradient["model"], scale_by=1 / x.shape[0])

    @pxf.jit()
    def evaluate(x: Any, *, model: Any) -> Any:
        model.eval()
        with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
            return forward(x, None, model=model).argmax(axis=-1)

    model = Net()
    with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
        forward(jnp.zeros((options.batch, options.sizes[0])), None, model=model)  # so that all states exist
    optim_h = pxu.Optim(lambda: optax.sgd(options.state_lr, momentum=options.state_momentum or None))
    optim_w = pxu.Optim(lambda: optax.adamw(options.lr, weight_decay=options.weight_decay), pxu.M(pxnn.LayerParam)(model))

    def restart(values: Sequence[tuple[Any, Any]]) -> None:
        for layer, (weight, bias) in zip(model.layers, values, strict=True):
            layer.nn.weight.set(jnp.asarray(weight))
            layer.nn.bias.set(jnp.asarray(bias))
        optim_w.init(pxu.M(pxnn.LayerParam)(model))

    return Trainer(
        train=lambda x, y: train(x, y, model=model, optim_w=optim_w, optim_h=optim_h),
        evaluate=lambda x: evaluate(x, model=model),
        restart=restart,
        wait=lambda: jax.block_until_ready([(layer.nn.weight.get(), layer.nn.bias.get()) for layer in model.layers]),
        layers=model.layers,
    )


# --- what is asked of it ----------------------------------------------------------------------------------------------


def random_batches(options: argparse.Namespace) -> list[tuple[Any, Any]]:
    """Make random batches on the device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    chance = np.random.default_rng(options.seed)
    inputs = chance.standard_normal((OWN_BATCHES, options.batch, options.sizes[0]), dtype=np.float32)
    classes = chance.integers(options.sizes[-1], size=(OWN_BATCHES, options.batch))
    return [(jnp.asarray(x), jax.nn.one_hot(c, options.sizes[-1])) for x, c in zip(inputs, classes, strict=True)]


def run(trainer: Trainer, batches: Sequence[tuple[Any, Any]], count: int) -> dict[str, float]:
    """Return the cost of ``count`` steps."""
    wall, processor = time.perf_counter(), time.process_time()
    for number in range(count):
        trainer.train(*batches[number % len(batches)])
    trainer.wait()
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def check(trainer: Trainer, source: Path, target: Path) -> dict[str, int]:
    """Take steps from given weights, on given batches."""
    import numpy as np

    given = np.load(source)
    trainer.restart([(given[f"weight{i}"], given[f"bias{i}"]) for i in range(len(trainer.layers))])
    for x, y in zip(given["inputs"], given["targets"], strict=True):
        trainer.train(x, y)
    trainer.wait()
    weights = {f"weight{i}": np.asarray(layer.nn.weight.get()) for i, layer in enumerate(trainer.layers)}
    biases = {f"bias{i}": np.asarray(layer.nn.bias.get()) for i, layer in enumerate(trainer.layers)}
    np.savez(target, **weights, **biases)
    return {"steps": len(given["inputs"])}


def accuracy(trainer: Trainer, source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the accuracy on all test examples, after training on shuffled whole batches."""
    import numpy as np

    data = np.load(source)
    chance = np.random.default_rng(options.seed)
    one_hot = np.eye(options.sizes[-1], dtype=np.float32)
    size, began, accuracies = options.batch, time.perf_counter(), []
    x_test, tested = data["x_test"], len(data["y_test"])
    x_test = np.concatenate([x_test, x_test[: -tested % size]])  # up to whole batches: the states have the batch's size
    for _ in range(options.epochs):
        order = chance.permutation(len(data["x_train"]))
        x_train, y_train = data["x_train"][order], data["y_train"][order]
        for start in range(0, len(order) - size + 1, size):
            trainer.train(x_train[start : start + size], one_hot[y_train[start : start + size]])
        classes = np.concatenate([np.asarray(trainer.evaluate(part)) for part in np.split(x_test, len(x_test) // size)])[:tested]
        accuracies.append(float((classes == data["y_test"]).mean()))
    return {"test_accuracy": accuracies, "tested": tested, "seconds": time.perf_counter() - began}


def facts(options: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"versions": versions, "threads": options.threads, "cores": cores, "loop": options.loop}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    limit(options.threads)
    trainer = build(options)
    if options.accuracy is not None:
        print(json.dumps(accuracy(trainer, options.accuracy, options)), flush=True)
        return
    batches = random_batches(options)
    run(trainer, batches, options.warm)
    print(json.dumps(facts(options)), flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        if command == "run":
            answer: dict[str, Any] = run(trainer, batches, int(words[0]))
        elif command == "check":
            answer = check(trainer, Path(words[0]), Path(words[1]))
        else:
            raise ValueError(f"unknown command {command!r}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
