"""The rules of continuous time and the paper's two baselines: objectives, embeddings, inference, what is computed how often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_noprop import blocks, timed
from bpfree_noprop.adjoint import NoPropAdjoint
from bpfree_noprop.backprop import NoPropBackprop, NoPropBackpropConfig
from bpfree_noprop.base import NoPropRule
from bpfree_noprop.ct import NoPropCT
from bpfree_noprop.fm import NoPropFM
from torch import Tensor

from bpfree.errors import UsageError
from bpfree.network.network import evaluating
from bpfree.options import OptimizerConfig
from bpfree.step import Batch, Step
from bpfree.tasks.task import Split, TaskSpec
from bpfree.training.stepper import new_step

EMBEDDINGS = ["one-hot", "learned", "prototype"]
RULES = {"ct": NoPropCT, "fm": NoPropFM, "backprop": NoPropBackprop, "adjoint": NoPropAdjoint}
SMALL: dict[str, dict[str, Any]] = {
    "ct": {"steps": 30, "validation_steps": 4},
    "fm": {"steps": 30, "validation_steps": 4},
    "backprop": {"T": 3},
    "adjoint": {"steps": 30, "validation_steps": 4, "training_steps": 4},
}
Make = Callable[..., Any]


@pytest.fixture
def make(device: torch.device, spec: TaskSpec) -> Make:
    """A rule by its short name on ``spec``; keywords are its options."""

    def build(name: str, *, seed: int = 0, **options: Any) -> NoPropRule:
        torch.manual_seed(seed)
        cls = RULES[name]
        config = cls.Config(**{**SMALL[name], **options})
        wanted = cls.network_options(spec, config) | {"width": 64}
        builder = {**blocks.NETWORKS, **timed.NETWORKS}[wanted.pop("name")]
        return cls(builder.build(spec, builder.Config(**wanted)), spec, config).to(device)

    return build


def ct_by_hand(rule: NoPropCT, batch: Batch, step: Step) -> Tensor:
    """Eq. 9 written out with central differences for SNR'."""
    rule.double()
    u = rule.embed.weight[batch.targets]
    t = torch.rand(16, generator=step.generator_for("time"), dtype=u.dtype, device=u.device)

    def snr(times: Tensor) -> Tensor:
        return torch.exp(-rule.noise(times)[0])

    slope = (snr(t + 1e-6) - snr(t - 1e-6)) / 2e-6
    abar = (snr(t) / (1 + snr(t)))[:, None]
    eps = torch.randn(u.shape, generator=step.generator_for("block"), dtype=u.dtype, device=u.device)
    logits = rule.network.blocks["block"](batch.inputs, abar.sqrt() * u + (1 - abar).sqrt() * eps, t)
    uhat = logits.softmax(1) @ rule.embed.weight
    denoising = rule.config.eta / 2 * (slope * ((uhat - u) ** 2).sum(1)).mean()
    first, last = (s / (1 + s) for s in snr(t.new_tensor([0.0, 1.0])))
    eps = torch.randn(u.shape, generator=step.generator_for("head"), dtype=u.dtype, device=u.device)
    anchor = F.cross_entropy(rule.head.linear(last.sqrt() * u + (1 - last).sqrt() * eps), batch.targets)
    d = u.shape[1]
    divergence = 0.5 * (first * (u**2).sum(1).mean() - d * first - d * torch.log(1 - first))
    return denoising + anchor + divergence


def doubled(batch: Batch) -> Batch:
    return Batch(batch.inputs.double(), batch.targets)


# --- objectives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_ct_is_equation_9(embedding: str, make: Make, batch: Batch) -> None:
    # Oracle: the equation written out with the same draws, SNR' by differences; gradients by finite differences of it are autograd's.
    rule = make("ct", embedding=embedding, eta=0.7, times="uniform").double()
    batch = doubled(batch)
    loss, parts = rule.objective(batch, new_step(rule, seed=3)), rule.losses(batch, new_step(rule, seed=3))
    torch.testing.assert_close(loss, ct_by_hand(rule, batch, new_step(rule, seed=3)), rtol=1e-6, atol=1e-7)
    assert list(parts) == ["block/loss", "head/loss", "noise/loss"]
    metrics = rule.credit(batch, new_step(rule, seed=3))
    torch.testing.assert_close(metrics["loss"], loss.detach())
    learning = [rule.noise.gamma_0, rule.noise.raw_distance, rule.noise.raw_in, *rule.embed.parameters()]
    wanted = torch.autograd.grad(ct_by_hand(rule, batch, new_step(rule, seed=3)), learning)
    for parameter, value in zip(learning, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_fm_is_equation_12_with_its_anchor(embedding: str, spread: float, make: Make, batch: Batch) -> None:
    # Oracle: the equations written out with the same draws; the anchor only where the embedding is learned.
    rule = make("fm", embedding=embedding, spread=spread)
    loss, parts = rule.objective(batch, new_step(rule, seed=3)), rule.losses(batch, new_step(rule, seed=3))
    step = new_step(rule, seed=3)
    u = rule.embed.weight[batch.targets]
    t = torch.rand(16, generator=step.generator_for("time"), device=u.device)[:, None]
    generator = step.generator_for("block")
    z0 = torch.randn(u.shape, generator=generator, device=u.device)
    z = t * u + (1 - t) * z0
    if spread:
        z = z + spread * torch.randn(u.shape, generator=generator, device=u.device)
    v = rule.network.blocks["block"](batch.inputs, z, t[:, 0]) @ rule.embed.weight
    wanted = ((v - (u - z0)) ** 2).sum(1).mean()
    if embedding != "one-hot":
        wanted = wanted + F.cross_entropy(rule.head.linear(z + (1 - t) * v), batch.targets)
    torch.testing.assert_close(loss, wanted)
    for parameter in (*rule.embed.parameters(), rule.block.out.bias):
        torch.testing.assert_close(*(torch.autograd.grad(x, parameter, retain_graph=True)[0] for x in (loss, wanted)))
    assert ("head/loss" in parts) == (embedding != "one-hot")
    assert ("head" in rule.groups()) == (embedding != "one-hot")


def test_backprop_is_the_papers_chain(make: Make, batch: Batch) -> None:
    # Oracle: z_t = (1 - alpha_t) z_{t-1} + alpha_t uhat_t written out; every block gets a gradient through those above.
    rule = make("backprop", embedding="learned")
    with torch.no_grad():
        rule.mix.weight.copy_(torch.tensor([-0.3, 0.2, 0.9]))
    loss = rule.objective(batch, new_step(rule, seed=3))
    z = torch.randn(16, 20, generator=new_step(rule, seed=3).generator_for("start"), device=batch.inputs.device)
    for t in (1, 2, 3):
        alpha = torch.tanh(rule.mix.weight[t - 1])
        z = (1 - alpha) * z + alpha * (rule.network.blocks[f"t{t}"](batch.inputs, z).softmax(1) @ rule.embed.weight)
    torch.testing.assert_close(loss, F.cross_entropy(rule.head.linear(z), batch.targets))
    wanted = torch.autograd.grad(F.cross_entropy(rule.head.linear(z), batch.targets), rule.network.blocks["t1"].out.weight)
    rule.credit(batch, new_step(rule, seed=3))
    torch.testing.assert_close(rule.network.blocks["t1"].out.weight.grad, wanted[0])
    assert bool((rule.mix.weight.grad.abs() > 0).all())


def test_alpha_starts_where_it_is_told(make: Make) -> None:
    torch.testing.assert_close(make("backprop", share=0.3).mix.weight.tanh().cpu(), torch.full((3,), 0.3))


def test_adjoint_gradients_are_those_of_back_propagation_in_the_limit(make: Make, batch: Batch) -> None:
    # Oracle: autograd through the same solver, in double precision; the continuous adjoint differs by the order of its step.
    from torchdiffeq import odeint

    differences = []
    for steps in (20, 80):
        rule = make("adjoint", training_steps=steps, embedding="learned").double()
        rule.block.time[0].frequencies /= 300  # smooth within a step of 1/20
        data = doubled(batch)
        rule.credit(data, new_step(rule, seed=3))
        found = {name: p.grad.clone() for name, p in rule.named_parameters()}
        features = rule.block.features(data.inputs)
        start = rule.start(data.inputs, new_step(rule, seed=3).generator_for("start"))
        ends = start.new_tensor([0.0, 1.0])

        def field(t: Tensor, z: Tensor, rule: Any = rule, features: Tensor = features) -> Tensor:
            return rule.block.judge(features, z, rule.block.moments(t.reshape(1))).softmax(1) @ rule.embed.weight - z

        z = odeint(field, start, ends, method="euler", options={"step_size": 1 / steps})[-1]
        loss = F.cross_entropy(rule.head.linear(z), data.targets)
        torch.testing.assert_close(rule.objective(data, new_step(rule, seed=3)), loss)
        wanted = dict(zip(found, torch.autograd.grad(loss, list(rule.parameters())), strict=True))
        differences.append({name: float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in found})
    first, second = differences
    assert all(value < 0.4 for value in first.values())
    assert all(second[name] < 0.5 * value for name, value in first.items() if value > 0.01)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_every_rule_learns_with_every_embedding(name: str, embedding: str, make: Make, spec: TaskSpec, batch: Batch) -> None:
    # Oracle: the same 16 examples again and again are fitted: above 3 of 4 where chance is 1 of 4.
    rule = make(name, embedding=embedding)
    rule.prepare(Split(batch.inputs.cpu(), batch.targets.cpu()), torch.Generator())
    step = new_step(rule, OptimizerConfig("adam", lr=3e-3))
    for step.index in range(150):
        rule.learn(batch, step)
    with evaluating(rule), torch.no_grad():
        scores = rule.predict(batch.inputs, torch.Generator(batch.inputs.device).manual_seed(0))
    assert float((scores.argmax(1) == batch.targets).float().mean()) > 0.75
    assert bool(torch.isfinite(scores).all())


@pytest.mark.parametrize("name", ["ct", "fm"])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_states_and_times_are_exact_under_autocast(name: str, embedding: str, make: Make, batch: Batch) -> None:
    # Oracle: bit by bit what the block sees without autocast; scores in full precision.
    rule, seen = make(name, embedding=embedding), []
    rule.block.register_forward_pre_hook(lambda block, args: seen.extend(args[1:]))
    rule.losses(batch, new_step(rule, seed=3))
    with torch.autocast(batch.inputs.device.type, torch.bfloat16):
        rule.losses(batch, new_step(rule, seed=3))
        with torch.no_grad():
            assert rule.predict(batch.inputs, torch.Generator(batch.inputs.device)).dtype is torch.float32
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen[:2], seen[2:], strict=True))


def test_the_learned_embedding_gets_a_gradient_from_every_term(make: Make, batch: Batch) -> None:
    # Oracle: each term alone.
    for name in ("ct", "fm"):
        rule = make(name, embedding="learned")
        for loss in rule.losses(batch, new_step(rule, seed=3)).values():
            assert torch.autograd.grad(loss, rule.embed.weight, retain_graph=True)[0].abs().sum() > 0


# --- inference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ct", "fm", "adjoint"])
def test_features_once_per_image_and_few_steps_after_epochs(name: str, make: Make, batch: Batch) -> None:
    # Oracle: counted calls.
    rule = make(name).eval()
    calls = {"stem": 0, "label": 0}

    def count(path: str) -> Callable[..., None]:
        def add(*_: object) -> None:
            calls[path] += 1

        return add

    for path in calls:
        getattr(rule.block, path).register_forward_hook(count(path))
    generator = torch.Generator(batch.inputs.device)
    with torch.no_grad():
        rule.predict(batch.inputs, generator)
        assert calls == {"stem": 1, "label": 30}
        with rule.quick_predictions():
            rule.predict(batch.inputs, generator)
    assert calls == {"stem": 2, "label": 34}
    assert rule.final_prediction


def test_the_adjoint_takes_as_many_steps_as_it_is_told(make: Make, batch: Batch) -> None:
    # Oracle: counted calls, for numbers whose reciprocal is rounded so that a grid of steps of that size has one more.
    rule, calls = make("adjoint", steps=61, training_steps=115), []
    rule.block.label.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        rule.predict(batch.inputs, torch.Generator(batch.inputs.device))
    assert len(calls) == 61
    rule.credit(batch, new_step(rule))
    assert len(calls) == 61 + 115 + 115


def test_sampled_baselines_start_from_noise(make: Make, batch: Batch) -> None:
    # Oracle: scores depend on the generator where, and only where, z_0 is drawn.
    for name in ("adjoint", "backprop"):
        for inference in ("sampled", "deterministic"):
            rule = make(name, inference=inference).eval()
            with torch.no_grad():
                first, second = (rule.predict(batch.inputs, torch.Generator(batch.inputs.device).manual_seed(k)) for k in (0, 1))
            assert torch.equal(first, second) == (inference == "deterministic")


def test_one_step_of_the_flow_is_the_whole_way(make: Make, batch: Batch) -> None:
    # Oracle: a prediction of one step from the same noise.
    rule = make("fm", inference="flow", steps=1).eval()
    with torch.no_grad():
        wanted = rule.predict(batch.inputs, torch.Generator(batch.inputs.device).manual_seed(2))
        found = rule.alternatives(batch.inputs, torch.Generator(batch.inputs.device).manual_seed(2))["one_step"]
    torch.testing.assert_close(found, wanted)


def test_alternatives_share_the_features(make: Make, batch: Batch) -> None:
    # Oracle: counted calls.
    for name in ("ct", "fm"):
        rule, calls = make(name).eval(), []
        rule.block.stem.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            rule.alternatives(batch.inputs, torch.Generator(batch.inputs.device))
        assert len(calls) == 1


def test_heun_takes_two_estimates_a_step(make: Make, batch: Batch) -> None:
    for name in ("ct", "fm"):
        rule, calls = make(name, stepper="heun").eval(), []
        rule.block.label.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            rule.predict(batch.inputs, torch.Generator(batch.inputs.device))
        assert len(calls) == 60


def test_fm_predicts_the_nearest_embedding(make: Make, batch: Batch) -> None:
    # Oracle: argmin of Euclidean distances of the end of an Euler path written out.
    rule = make("fm", embedding="learned", inference="flow", steps=3).eval()
    with torch.no_grad():
        scores = rule.predict(batch.inputs, torch.Generator(batch.inputs.device).manual_seed(4))
        z = torch.randn(16, 20, generator=torch.Generator(batch.inputs.device).manual_seed(4), device=batch.inputs.device)
        for k in range(3):
            z = z + rule.network.blocks["block"](batch.inputs, z, torch.full((16,), k / 3, device=z.device)) @ rule.embed.weight / 3
        distances = (z[:, None] - rule.embed.weight[None]).norm(dim=2)
    assert torch.equal(scores.argmax(1), distances.argmin(1))
    torch.testing.assert_close(scores, -(distances**2) / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "inference", "draws", "others"),
    [
        ("ct", "deterministic", 1, ["one_step", "flow", "sampled"]),
        ("ct", "flow", 5, ["one_step", "deterministic", "sampled"]),
        ("ct", "sampled", 5, ["one_step", "deterministic", "flow"]),
        ("fm", "deterministic", 1, ["one_step", "flow"]),
        ("fm", "flow", 5, ["one_step", "deterministic"]),
    ],
)
def test_kinds_of_inference(name: str, inference: str, draws: int, others: list[str], make: Make, batch: Batch) -> None:
    rule = make(name, inference=inference).eval()

    def scores(seed: int) -> Tensor:
        with torch.no_grad():
            return rule.predict(batch.inputs, torch.Generator(batch.inputs.device).manual_seed(seed))

    assert rule.draws == draws
    assert torch.equal(scores(1), scores(1))
    assert torch.equal(scores(1), scores(2)) == (inference == "deterministic")
    used, start = (torch.Generator(batch.inputs.device).manual_seed(1) for _ in range(2))
    with torch.no_grad():
        rule.predict(batch.inputs, used)
    if inference != "deterministic":
        rule.start(batch.inputs, start)
    assert torch.equal(used.get_state(), start.get_state()) == (inference != "sampled")  # beyond z_0 the flow draws nothing
    with torch.no_grad():
        found = rule.alternatives(batch.inputs, torch.Generator(batch.inputs.device).manual_seed(1))
    assert list(found) == others
    with rule.quick_predictions(), torch.no_grad():
        again = make(name, inference=others[1])
        with again.quick_predictions():
            again.eval()
            alone = again.predict(batch.inputs, torch.Generator(batch.inputs.device).manual_seed(1))
    if others[1] == "deterministic":
        torch.testing.assert_close(found["deterministic"], alone)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(make: Make, spec: TaskSpec) -> None:
    with pytest.raises(UsageError, match=r"rule\.head"):
        make("fm", head="radial")
    chain = blocks.NETWORKS["noprop-mlp"]
    with pytest.raises(UsageError, match="noprop-timed"):
        NoPropCT(chain.build(spec, chain.Config(blocks=1)), spec)
    with pytest.raises(UsageError, match=r"network\.blocks=10"):
        NoPropBackprop(chain.build(spec, chain.Config(blocks=2)), spec, NoPropBackpropConfig())
    block = timed.NETWORKS["noprop-timed-mlp"]
    with pytest.raises(UsageError, match=r"network\.state_dim=4"):
        NoPropFM(block.build(spec, block.Config(state_dim=7)), spec)


def test_without_torchdiffeq_the_error_says_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from bpfree.errors import BpfreeError

    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(BpfreeError, match="pip install torchdiffeq"):
        make("adjoint")
