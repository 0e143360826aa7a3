"""The rule: objective, independence of the blocks, phases, inference."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_noprop.blocks import NETWORKS
from bpfree_noprop.dt import NoPropDT, NoPropDTConfig
from torch import Tensor

from bpfree.config import parse_words, resolve
from bpfree.errors import UsageError
from bpfree.network.builders import MLPConfig, mlp
from bpfree.options import OptimizerConfig
from bpfree.step import Batch, Budget, Phase
from bpfree.tasks.task import Split, TaskSpec
from bpfree.training.stepper import new_step

MakeRule = Callable[..., NoPropDT]
EMBEDDINGS = ["one-hot", "learned", "prototype"]


def gradients(rule: NoPropDT, batch: Batch, phase: Phase | None = None) -> dict[str, Tensor]:
    rule.zero_grad(set_to_none=True)
    step = new_step(rule, seed=3)
    if phase is not None:
        step.phase = phase
    rule.credit(batch, step)
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def parameters(rule: NoPropDT) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in rule.named_parameters()}


def predictions(rule: NoPropDT, inputs: Tensor, seed: int = 5) -> Tensor:
    rule.eval()
    with torch.no_grad():
        return rule.predict(inputs, torch.Generator(inputs.device).manual_seed(seed))


# --- the objective --------------------------------------------------------------------------------------------------


def test_loss_is_equation_8(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: Eq. 8 written out for one-hot labels with the same draws of noise; norm summed over d, mean over the batch.
    rule = make_rule(eta=0.7).eval()
    step, schedule = new_step(rule, seed=3), rule.schedule
    u = F.one_hot(batch.targets, 4).float()
    wanted = 0.0
    for t in (1, 2, 3):
        eps = torch.randn(16, 4, generator=step.generator_for(f"t{t}"), device=u.device)
        z = schedule.abar[t - 1].sqrt() * u + (1 - schedule.abar[t - 1]).sqrt() * eps
        p = rule.network.blocks[f"t{t}"](batch.inputs, z).softmax(1)
        wanted += 0.5 * 0.7 * (schedule.snr[t] - schedule.snr[t - 1]) * ((p - u) ** 2).sum() / 16
    eps = torch.randn(16, 4, generator=step.generator_for("head"), device=u.device)
    z = schedule.abar[3].sqrt() * u + (1 - schedule.abar[3]).sqrt() * eps
    wanted += F.cross_entropy(rule.head.linear(z), batch.targets)
    abar = schedule.abar[0]
    wanted += 0.5 * (abar - 4 * abar - 4 * torch.log(1 - abar))
    metrics = rule.credit(batch, step)
    torch.testing.assert_close(metrics["loss"], wanted.detach(), rtol=2e-4, atol=1e-5)
    assert set(metrics) == {"loss", "head/loss", "t1/loss", "t2/loss", "t3/loss"}
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_simultaneous_gradient_is_the_mean_of_algorithm_1s(embedding: str, make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: Eq. 8's expectation over t: the mean over t of the gradients of L_t.
    rule = make_rule(embedding=embedding).double()
    batch = Batch(batch.inputs.double(), batch.targets)
    whole = gradients(rule, batch)
    single = [gradients(rule, batch, Phase(f"t{t}", groups=(f"t{t}", "head", "embed"))) for t in (1, 2, 3)]
    for name, found in whole.items():
        wanted = torch.stack([part[name] if name in part else torch.zeros_like(found) for part in single]).mean(0)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_soft_labels_at_the_corners_are_hard_labels(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: the same classes as integers.
    for embedding in ("one-hot", "learned"):
        rule = make_rule(embedding=embedding)
        hard = gradients(rule, batch)
        soft = gradients(rule, Batch(batch.inputs, F.one_hot(batch.targets, 4).float()))
        assert all(torch.equal(hard[name], soft[name]) for name in hard)


def test_soft_labels_mix_embeddings(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: u = sum_y p_y u_y, seen in the state of which block t3 is fed (its noise is known).
    rule = make_rule(embedding="learned")
    rows = torch.full((16, 4), 0.25, device=batch.inputs.device)
    seen: list[Tensor] = []
    rule.network.blocks["t3"].register_forward_pre_hook(lambda block, args: seen.append(args[1]))
    step = new_step(rule, seed=3)
    rule.credit(Batch(batch.inputs, rows), step)
    eps = torch.randn(16, 20, generator=step.generator_for("t3"), device=rows.device)
    torch.testing.assert_close(seen[0], rule.schedule.signal[2] * rule.embed.weight.mean(0) + rule.schedule.noise[2] * eps)


def test_learned_embedding_learns_from_every_term(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: each term alone has a gradient at the embedding; for the KL term it is abar_0 * mean of the rows' u in closed form.
    rule = make_rule(embedding="learned")
    step = new_step(rule, seed=3)
    terms = [rule.block_loss(t, batch.inputs, rule.rows(batch), step, share=1 / 3) for t in (1, 2, 3)] + [
        rule.label_loss(rule.rows(batch), step)
    ]
    for term in terms:
        assert torch.autograd.grad(term, rule.embed.weight)[0].abs().sum() > 0


# --- independence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_a_blocks_gradient_depends_on_no_other_block(embedding: str, make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: an intervention: new weights in all other blocks leave the gradient equal bit by bit.
    rule = make_rule(embedding=embedding)
    before = gradients(rule, batch)
    with torch.no_grad():
        for name in ("t1", "t3"):
            for p in rule.network.blocks[name].parameters():
                p.normal_()
    after = gradients(rule, batch)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    mine = {name for name in before if name.startswith("network.blocks.t2.")}
    assert mine
    assert not mine & changed
    assert any(name.startswith("network.blocks.t1.") for name in changed)  # the intervention was seen by its own block


def test_order_of_blocks_changes_nothing(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: the same blocks' losses asked for in reverse.
    rule = make_rule()
    step = new_step(rule, seed=3)
    forward = [rule.block_loss(t, batch.inputs, rule.rows(batch), step, share=1 / 3) for t in (1, 2, 3)]
    backward = [rule.block_loss(t, batch.inputs, rule.rows(batch), step, share=1 / 3) for t in (3, 2, 1)]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))


def test_blocks_see_different_noise_and_steps_too(make_rule: MakeRule, batch: Batch) -> None:
    rule = make_rule()
    step = new_step(rule, seed=3)
    draws = []
    for index, name in itertools.product((0, 1), ("t1", "t2", "head")):
        step.index = index
        draws.append(torch.randn(4, generator=step.generator_for(name), device=batch.inputs.device))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


# --- phases and updates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("embedding", "shared"), [("one-hot", ("head",)), ("learned", ("head", "embed"))])
def test_sequential_updates_are_algorithm_1s_loops(embedding: str, shared: tuple[str, ...], make_rule: MakeRule) -> None:
    # Oracle: Algorithm 1: for each epoch, for each t, one pass over the data.
    rule = make_rule(updates="sequential", embedding=embedding)
    phases = list(rule.phases(Budget(epochs=2)))
    assert [phase.name for phase in phases] == ["t1", "t2", "t3"] * 2
    assert all(phase.epochs == 1 and phase.groups == (phase.name, *shared) for phase in phases)
    assert [phase.evaluate for phase in phases] == [False, False, True] * 2
    assert {name for phase in phases for name in phase.groups or ()} == set(rule.groups())
    endless = list(itertools.islice(rule.phases(Budget(seconds=1.0)), 100))
    assert len(endless) == 100


def test_a_sequential_step_moves_its_block_and_what_is_shared(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: Algorithm 1 updates theta_t, theta_out and W_Embed; weight decay must not touch the rest either.
    rule = make_rule(updates="sequential", embedding="learned")
    before, step = parameters(rule), new_step(rule)
    step.phase = list(rule.phases(Budget(epochs=1)))[1]
    metrics = rule.learn(batch, step)
    moved = {name.removeprefix("network.blocks.").split(".")[0] for name, p in parameters(rule).items() if not torch.equal(p, before[name])}
    assert moved == {"t2", "head", "embed"}
    assert set(metrics) == {"loss", "head/loss", "t2/loss"}


def test_simultaneous_training_is_one_phase(make_rule: MakeRule) -> None:
    rule = make_rule()
    assert [(phase.groups, phase.epochs) for phase in rule.phases(Budget(epochs=7))] == [(None, 7)]
    assert set(rule.groups()) == {"t1", "t2", "t3", "head"}


def test_eta_is_irrelevant_under_adam(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: Adam is invariant to the scale of a block's gradient up to its eps; SGD, the control, is not.
    def after(eta: float, optimizer: OptimizerConfig | None = None) -> Tensor:
        rule = make_rule(eta=eta).double()
        step = new_step(rule, optimizer)
        for step.index in range(5):
            rule.learn(Batch(batch.inputs.double(), batch.targets), step)
        return torch.cat([p.flatten() for p in rule.network.parameters()])

    assert (after(0.5) - after(50.0)).abs().max() < 5e-4  # five steps of 1e-3 move a weight by up to 5e-3
    assert (after(0.5) - after(50.0)).abs().mean() < 1e-6
    sgd = OptimizerConfig("sgd", lr=1e-3)
    assert (after(0.5, sgd) - after(50.0, sgd)).abs().max() > 5e-3


def test_twin_leaves_the_bodies(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: the definition: only last linear maps, head and embedding move.
    rule = make_rule(embedding="learned")
    rule.freeze_features()
    before, step = parameters(rule), new_step(rule)
    rule.learn(batch, step)
    moved = {name for name, p in parameters(rule).items() if not torch.equal(p, before[name])}
    outs = {f"network.blocks.t{t}.out.{kind}" for t in (1, 2, 3) for kind in ("weight", "bias")}
    assert moved == outs | {"head.linear.weight", "head.linear.bias", "embed.weight"}


# --- inference ------------------------------------------------------------------------------------------------------


def test_prediction_has_no_way_to_labels(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: the signature, and equal scores after training steps whose evaluation labels differ.
    assert list(inspect.signature(NoPropDT.predict).parameters) == ["self", "inputs", "generator"]
    rule = make_rule(inference="sampled")
    first = predictions(rule, batch.inputs)
    rule.zero_grad()
    rule.credit(Batch(batch.inputs, batch.targets.flip(0)), new_step(rule))  # labels seen, nothing applied, nothing kept
    assert torch.equal(first, predictions(rule, batch.inputs))


def test_sampled_chain_is_equation_3(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: Eq. 3 written out with the same draws.
    rule = make_rule(embedding="learned", inference="sampled").eval()
    generator, s = torch.Generator(batch.inputs.device).manual_seed(5), rule.schedule

    def normal() -> Tensor:
        return torch.randn(16, 20, generator=generator, device=batch.inputs.device)

    with torch.no_grad():
        z = normal()
        for t in (1, 2, 3):
            uhat = rule.network.blocks[f"t{t}"](batch.inputs, z).softmax(1) @ rule.embed.weight
            z = s.a[t] * uhat + s.b[t] * z + s.std[t] * normal()
        wanted = rule.head.linear(z).log_softmax(1)
    torch.testing.assert_close(predictions(rule, batch.inputs), wanted)


def test_inference_is_stochastic_only_when_sampled(make_rule: MakeRule, batch: Batch) -> None:
    sampled, mean = make_rule(inference="sampled"), make_rule()
    assert not torch.equal(predictions(sampled, batch.inputs, 1), predictions(sampled, batch.inputs, 2))
    assert torch.equal(predictions(mean, batch.inputs, 1), predictions(mean, batch.inputs, 2))
    assert (sampled.draws, mean.draws) == (5, 1)


@pytest.mark.parametrize("inference", ["deterministic", "sampled", "class-sampled"])
def test_alternatives_are_blocks_readouts_and_the_other_chains(inference: str, make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: each block called by itself with the same draws; predict of a rule with the other inference.
    rule = make_rule(inference=inference).eval()
    generator = torch.Generator(batch.inputs.device).manual_seed(5)
    with torch.no_grad():
        scores = rule.alternatives(batch.inputs, torch.Generator(batch.inputs.device).manual_seed(5))
    others = [kind for kind in ("deterministic", "sampled", "class-sampled") if kind != inference]
    assert list(scores) == ["t1", "t2", "t3", "mean", "path", "product", "chain_swapped", "path_swapped", *others]
    alone = [scores[f"t{t}"].exp() for t in (1, 2, 3)]
    torch.testing.assert_close(scores["mean"].exp(), sum(alone) / 3)
    z = torch.zeros(16, 4, device=batch.inputs.device)
    if inference != "deterministic":
        torch.testing.assert_close(scores["deterministic"], predictions(make_rule(inference="deterministic"), batch.inputs))
        torch.randn(16, 4, generator=generator, device=batch.inputs.device)  # z_0 of the chain
        z = torch.randn(16, 4, generator=generator, device=batch.inputs.device)
    with torch.no_grad():
        torch.testing.assert_close(scores["t1"], rule.network.blocks["t1"](batch.inputs, z).log_softmax(1))


def test_state_dict_round_trip(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: equal predictions of a rule with other initial weights after loading.
    rule, other = make_rule(embedding="learned"), make_rule(embedding="learned", seed=1)
    rule.learn(batch, new_step(rule))
    assert not torch.equal(predictions(rule, batch.inputs), predictions(other, batch.inputs))
    other.load_state_dict(copy.deepcopy(rule.state_dict()))
    assert torch.equal(predictions(rule, batch.inputs), predictions(other, batch.inputs))


# --- construction ---------------------------------------------------------------------------------------------------


def test_prepare_fills_prototypes_and_creates_nothing(make_rule: MakeRule, spec: TaskSpec) -> None:
    rule = make_rule(embedding="prototype")
    images = torch.rand(12, *spec.input_shape)
    before = {name: id(p) for name, p in rule.named_parameters()}
    rule.prepare(Split(images, torch.arange(12) % 4), torch.Generator())
    assert before == {name: id(p) for name, p in rule.named_parameters()}
    rows = {tuple(row) for row in images.flatten(1).tolist()}
    assert all(tuple(row) in rows for row in rule.embed.weight.tolist())


def test_declared_traits(make_rule: MakeRule) -> None:
    traits = make_rule().traits
    assert (traits.dependence, traits.downstream_weights, traits.reverse_span, traits.passes) == ("independent", 0, 1, 1)
    assert not traits.chain
    assert traits.readout == "none"
    assert make_rule(updates="sequential").traits.passes == 1  # in the steps of its own phases


@pytest.mark.parametrize(
    ("network", "message"),
    [({"blocks": 2}, "network.blocks=3"), ({"state_dim": 5}, "network.state_dim=4")],
)
def test_a_network_that_does_not_fit_is_refused(network: dict[str, Any], message: str, make_rule: MakeRule) -> None:
    with pytest.raises(UsageError, match=message):
        make_rule(network=network)


def test_a_chain_network_is_refused(spec: TaskSpec) -> None:
    with pytest.raises(UsageError, match=r"network\.stem=NAME"):
        NoPropDT(mlp(spec, MLPConfig()), spec, NoPropDTConfig())


def test_network_follows_task_and_options() -> None:
    digits, mnist = TaskSpec("d", (1, 8, 8), 10), TaskSpec("m", (1, 28, 28), 10)
    options = NoPropDT.network_options
    assert options(digits, NoPropDTConfig()) == {"name": "noprop-mlp", "blocks": 10, "state_dim": 10}
    assert options(mnist, NoPropDTConfig(T=4, embedding="learned")) == {"name": "noprop-cnn", "blocks": 4, "state_dim": 20}
    assert options(mnist, NoPropDTConfig(embedding="prototype")) == {"name": "noprop-cnn", "blocks": 10, "state_dim": 784, "label": "input"}
    assert {"noprop-mlp", "noprop-cnn"} <= set(NETWORKS)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("rule.embedding_dim=7", "rule.embedding_dim=7 does nothing with rule.embedding=one-hot: it is for rule.embedding=learned"),
        ("rule.sigma=0.5", "rule.sigma=0.5 does nothing with rule.head=softmax: it is for rule.head=radial"),
        ("rule.draws=9", "rule.draws=9 does nothing with rule.inference=deterministic"),
        ("rule.early_exit=0.1 rule.inference=sampled", "rule.early_exit=0.1 does nothing with rule.inference=sampled"),
    ],
)
def test_an_option_that_another_makes_meaningless_is_refused(words: str, reason: str) -> None:
    """Oracle: where the rule's code branches, written out by hand."""
    with pytest.raises(UsageError) as caught:
        resolve(parse_words(["rule=noprop-dt", *words.split()]))
    assert reason in str(caught.value)
