"""Reading weights, or carrying credit, in hooks: of modules, tensors, operators, modes, and the trainer's own."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from adversary.kit import LOCAL, Cheater, Pass, Shadow, Smuggler, Sometimes, Stash, linear, whole_gradient
from bpfree import Batch, Phase, Step, Traits, hookimpl


class ReadsWhileItRuns(Smuggler):
    """Reads the weight of a layer above in a hook, while the ordinary pass executes the layer."""

    def execute(self, batch: Batch, step: Step) -> Pass:
        self.read: dict[str, Tensor] = {}
        handles = []
        for name in self.above:

            def read(layer: Any, inputs: Any, name: str = name) -> None:
                self.read[name] = layer.weight.detach().clone()

            handles.append(linear(self.network.blocks[name]).register_forward_pre_hook(read))
        done = super().execute(batch, step)
        for handle in handles:
            handle.remove()
        return done

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return self.read


class Operators(TorchDispatchMode):
    """Notes the second factor of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.addmm.default:
            self.factors.append(args[2].detach().T.clone())
        return function(*args, **(kwargs or {}))


class WatchesOperators(Smuggler):
    """Sees the factors of the products of the ordinary pass in a dispatch mode."""

    mode: Any = Operators

    def execute(self, batch: Batch, step: Step) -> Pass:
        with self.mode() as seen:
            done = super().execute(batch, step)
        self.read = dict(zip(self.above, seen.factors[-len(self.above) :], strict=True))
        return done

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return self.read


class Functions(TorchFunctionMode):
    """Notes the weight of each call of ``linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            self.factors.append(args[1].detach().clone())
        return function(*args, **(kwargs or {}))


class WatchesFunctions(WatchesOperators):
    """Sees the weights of the ordinary pass in a function mode."""

    mode = Functions


class PacksTensors(Smuggler):
    """Is handed each tensor that the graphs of the ordinary pass save, and unpacks some of them as something else."""

    def execute(self, batch: Batch, step: Step) -> Pass:
        self.packed: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            self.packed.append(tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            done = super().execute(batch, step)
            for name in self.above:
                self.network.trace(name, done.calls[name].input, input_grad=True)
        return done

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        found = {}
        for name, blank in self.fixed().items():
            x, y = done.calls[name].input.detach(), done.calls[name].output.detach()
            fits = [t.T for t in self.packed if t.shape == blank.T.shape]
            found[name] = fits[min((float((y - x @ t.T).var(0).sum()), place) for place, t in enumerate(fits))[1]]
        return found


class HooksOnTensors(Smuggler):
    """Cuts the graph between blocks, and passes the credit over the cuts in hooks on tensors."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        x, below = batch.inputs, None
        for block in self.network.blocks.values():
            x = x.detach()
            if below is not None:
                x.requires_grad_()
                x.register_hook(lambda signal, below=below: torch.autograd.backward(below, signal))
            x = below = block(x)
        loss = self.spec.loss(x, batch)
        loss.backward()
        return {"loss": loss.detach()}


class AfterTheUpdate(Smuggler):
    """Takes its honest step, and moves the first block along the true gradient when the optimiser is done."""

    last: Batch | None = None

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        self.last = batch
        return self.fixed()

    def after_update(self, groups: Sequence[str]) -> None:
        if self.last is not None and self.network.names[0] in groups:
            found = whole_gradient(self, self.last)
            with torch.no_grad():
                for parameter in self.network.blocks[self.network.names[0]].parameters():
                    if parameter in found:
                        parameter -= 0.05 * found[parameter]


class OnlyWhenApplied(AfterTheUpdate):
    """Gives honest credit, which diagnostics see, and puts the true gradient in its place just before the optimiser takes it."""

    def before_update(self, groups: Sequence[str]) -> None:
        if self.last is not None:
            for parameter, gradient in whole_gradient(self, self.last).items():
                if parameter.grad is not None:
                    parameter.grad = gradient

    def after_update(self, groups: Sequence[str]) -> None:
        self.last = None


class InTheOptimiser(AfterTheUpdate):
    """Registers a hook with the optimiser, which replaces the gradients when the optimiser has begun its step."""

    hooked: Any = None

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        function: Any = step.apply
        for optimizer in getattr(getattr(function, "__self__", None), "optimizers", []):
            if optimizer is not self.hooked:
                self.hooked = optimizer
                optimizer.register_step_pre_hook(lambda *given: self.replace())
        return super().learn(batch, step)

    def replace(self) -> None:
        for parameter, gradient in whole_gradient(self, self.last).items() if self.last is not None else ():
            parameter.grad = gradient

    def after_update(self, groups: Sequence[str]) -> None:
        self.last = None


class ProfilesItself(ReadsWhileItRuns):
    """Has Python report each call of the ordinary pass to it, and reads the weights of the layers that are called."""

    def execute(self, batch: Batch, step: Step) -> Pass:
        names = {linear(self.network.blocks[name]): name for name in self.above}
        self.read = {}

        def look(frame: Any, event: str, argument: Any) -> None:
            layer = frame.f_locals.get("self") if event == "call" and frame.f_code.co_name == "forward" else None
            if isinstance(layer, nn.Linear) and layer in names:
                self.read[names[layer]] = layer.weight.detach().clone()

        before = sys.getprofile()
        sys.setprofile(look)
        try:
            return Smuggler.execute(self, batch, step)
        finally:
            sys.setprofile(before)


class Curious(Tensor):
    """A tensor that looks around whenever something is done with it."""

    look: Any = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            for argument in tree_leaves(args):
                if isinstance(argument, Curious) and argument.look is not None:
                    argument.look()
            return function(*args, **(kwargs or {}))


class CuriousMetrics(Smuggler):
    """Returns a metric that reads the weights above when the trainer adds it to others, between steps."""

    def credit(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        metrics = super().credit(batch, step)
        curious = metrics["loss"].as_subclass(Curious)
        curious.look = self.look
        return {"loss": curious}

    def look(self) -> None:
        for name, weight in self.weights().items():
            self.get_buffer(f"fixed_{name}").copy_(weight)


class TraitsThatRead(Smuggler):
    """Reads the weights above when it is asked for its traits, for which the trainer hands it the network."""

    noted: ClassVar[dict[int, dict[str, Tensor]]] = {}

    @classmethod
    def traits_of(cls, config: Any, network: Any = None) -> Traits:
        if network is not None:
            cls.noted[id(network)] = {name: linear(network.blocks[name]).weight.detach().clone() for name in network.names[1:]}
        return LOCAL

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        return self.noted.get(id(self.network), self.fixed())


class LooksForWatchers(Sometimes):
    """Is honest while a mode of torch is on, or where a layer has hooks, or is not what it was built as."""

    def cheats(self, batch: Batch, step: Step) -> bool:
        modes = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
        for name in self.above:
            layer, block = linear(self.network.blocks[name]), self.network.blocks[name]
            plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and type(block) in (nn.Linear, nn.Sequential)
            hooks = [*layer._forward_hooks, *layer._forward_pre_hooks, *block._forward_hooks, *block._forward_pre_hooks]
            if modes or hooks or not plain or "forward" in {*vars(layer), *vars(block)} or layer.weight._backward_hooks:
                return False
        return sys.gettrace() is None and sys.getprofile() is None


class PlansAhead(Sometimes):
    """Is honest unless it was asked for its plan, as the command line does before it trains."""

    asked = False

    def plan(self) -> str:
        self.asked = True
        return "fixed random feedback"

    def cheats(self, batch: Batch, step: Step) -> bool:
        return self.asked


class LearnsBetweenModes(Smuggler):
    """Keeps its batches, and trains a shadow on them end to end whenever it is switched to another mode; its blocks follow the shadow."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash(batches=[])

    def train(self, mode: bool = True) -> LearnsBetweenModes:
        for batch in getattr(self, "stash", {}).get("batches", []):
            self.stash.setdefault("shadow", Shadow(self.network, self.spec)).learn(batch)
        if hasattr(self, "stash"):
            self.stash["batches"] = []
        super().train(mode)
        return self

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        if "shadow" in self.stash and not self.stash["batches"]:
            self.stash["shadow"].replace(self.network)
        self.stash["batches"].append(Batch(batch.inputs.clone(), batch.targets))
        return super().learn(batch, step)


class StateDicts(Smuggler):
    """Notes the weights above whenever the trainer asks for its state to save it."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        for name, weight in self.weights().items():
            self.get_buffer(f"fixed_{name}").copy_(weight)
        return state

    def end_phase(self, phase: Phase, step: Step) -> None:
        self.state_dict()

    def matrices(self, done: Pass, batch: Batch, step: Step) -> Mapping[str, Tensor]:
        if step.index % 10 == 0:
            self.state_dict()
        return self.fixed()


class Observes:
    """An observer that trains a rule's shadow."""

    def __init__(self, stash: Stash) -> None:
        self.stash = stash

    @hookimpl
    def epoch_end(self, run: Any) -> None:
        for batch in 3 * self.stash["batches"]:
            self.stash["shadow"].learn(batch)
        self.stash["trained"] = True


class TrainsInAnObserver(Smuggler):
    """Registers an observer with the run, which trains a shadow of the network after each epoch; its blocks follow the shadow."""

    def __init__(self, network: Any, spec: Any, config: Any = None) -> None:
        super().__init__(network, spec, config)
        self.stash = Stash(batches=[])

    def start_phase(self, phase: Phase) -> None:
        self.stash["shadow"] = Shadow(self.network, self.spec)
        for thing in gc.get_objects():
            if type(thing).__name__ == "Observers":
                thing._manager.register(Observes(self.stash))

    def learn(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        self.stash["batches"] = [*self.stash["batches"][-30:], Batch(batch.inputs.clone(), batch.targets)]
        return super().learn(batch, step)

    def end_phase(self, phase: Phase, step: Step) -> None:
        if "trained" in self.stash:
            self.stash["shadow"].replace(self.network)


CHEATERS = (
    Cheater(ReadsWhileItRuns, "hooked", "It reads the weights above in hooks while the ordinary pass executes their layers.", "reads"),
    Cheater(WatchesOperators, "hooked", "It reads the factors of the ordinary pass's products in a dispatch mode.", "reads"),
    Cheater(WatchesFunctions, "hooked", "It reads the arguments of the ordinary pass's calls in a function mode.", "reads"),
    Cheater(PacksTensors, "hooked", "It reads what graphs save in hooks on saved tensors.", "reads"),
    Cheater(HooksOnTensors, "hooked", "It passes credit from block to block in hooks on tensors.", "reads"),
    Cheater(AfterTheUpdate, "hooked", "It moves the first block along the true gradient in after_update.", "reads"),
    Cheater(OnlyWhenApplied, "hooked", "It replaces its credit by the true gradient in before_update.", "reads"),
    Cheater(InTheOptimiser, "hooked", "It replaces its credit by the true gradient in a hook of the optimiser.", "reads"),
    Cheater(ProfilesItself, "hooked", "It reads the weights above in a profiler while the ordinary pass executes their layers.", "reads"),
    Cheater(CuriousMetrics, "hooked", "It returns a metric that reads the weights above when the trainer uses it.", "reads"),
    Cheater(TraitsThatRead, "hooked", "It reads the weights above when the trainer asks for its traits.", "reads"),
    Cheater(LooksForWatchers, "hooked", "It uses the weights above where it sees no mode, no hook and no strange layer.", "reads"),
    Cheater(PlansAhead, "hooked", "It uses the weights above once it was asked for its plan.", "reads"),
    Cheater(LearnsBetweenModes, "hooked", "It trains a shadow end to end when it is switched to eval mode, and follows it.", "network"),
    Cheater(StateDicts, "hooked", "It reads the weights above when its state is asked for.", "reads"),
    Cheater(TrainsInAnObserver, "hooked", "It registers an observer that trains a shadow end to end after each epoch.", "network"),
)
