"""What blocks see of the label in training, what predictions are made of, and the cross-entropy of blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bpfree_noprop.blocks import NETWORKS, MLPConfig, PairedBlock, mlp_block
from bpfree_noprop.dt import NoPropDT, NoPropDTConfig
from bpfree_noprop.embeddings import ClassEmbedding
from bpfree_noprop.readouts import another_of_its_class
from bpfree_noprop.stacked import obstacle
from bpfree_noprop.states import evidence
from torch import Tensor, nn

from bpfree.errors import UsageError
from bpfree.step import Batch, Phase
from bpfree.tasks.task import Split, TaskSpec
from bpfree.training.checkpoint import load_weights
from bpfree.training.stepper import new_step

MakeRule = Callable[..., NoPropDT]


def trained_on(rule: NoPropDT, examples: int) -> NoPropDT:
    """Prepare a rule as a run does, for a training split of n examples."""
    rule.prepare(Split(torch.zeros(examples, *rule.spec.input_shape), torch.zeros(examples, dtype=torch.long)), torch.Generator())
    return rule


def placed(batch: Batch, indices: Tensor | None = None) -> Batch:
    return Batch(batch.inputs, batch.targets, (), torch.arange(len(batch)) if indices is None else indices)


def gradients(rule: NoPropDT, batch: Batch) -> dict[str, Tensor]:
    rule.zero_grad(set_to_none=True)
    rule.credit(batch, new_step(rule, seed=3))
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def randomised(block: nn.Module) -> None:
    with torch.no_grad():
        for p in block.parameters():
            p.normal_()


# --- in closed form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one-hot", "learned"])
def test_evidence_of_a_state_is_bayes(kind: str) -> None:
    # Oracle: p(y|x) N(z; sqrt(abar) u_y, (1 - abar) I), normalised, by torch.distributions in double precision.
    torch.manual_seed(0)
    embed = ClassEmbedding(4, 3, kind).double()
    if kind == "learned":
        nn.init.normal_(embed.weight)  # of unequal lengths
    prior, z, share = torch.rand(8, 4).double(), torch.randn(8, embed.weight.shape[1]).double(), 0.37
    noise = torch.distributions.Normal(share**0.5 * embed.weight, (1 - share) ** 0.5)
    joint = prior.log() + noise.log_prob(z.unsqueeze(1)).sum(2)
    torch.testing.assert_close((prior.log() + evidence(embed, z, share)).softmax(1), joint.softmax(1))


def test_evidence_for_labels_is_the_log_odds_of_each() -> None:
    # Oracle: p(k|x) N(z_k; sqrt(abar), 1 - abar) over (1 - p(k|x)) N(z_k; 0, 1 - abar).
    embed, z, share, p = ClassEmbedding(3, 3, "one-hot", several=True).double(), torch.randn(5, 3).double(), 0.6, torch.rand(5, 3).double()
    spread = (1 - share) ** 0.5
    present, absent = torch.distributions.Normal(share**0.5, spread).log_prob(z), torch.distributions.Normal(0.0, spread).log_prob(z)
    torch.testing.assert_close(p.logit() + evidence(embed, z, share), p.log() + present - (1 - p).log() - absent)


def test_the_mean_path_of_exact_blocks_ends_at_the_first_ones_answer(make_rule: MakeRule) -> None:
    # Oracle: theory: with p(y|x) the same for all blocks, evidence of a state made of p ranks classes as p does.
    rule = make_rule(T=3, state="analytic").eval()
    for _, block in rule.denoisers():
        nn.init.zeros_(block.out.weight)
        block.out.bias.data = torch.tensor([0.1, 0.9, 0.4, 0.2])
    inputs = torch.randn(5, *rule.spec.input_shape)
    found = rule.judgements(rule.views(rule.view(inputs)), None)
    assert all(torch.equal(each.argsort(1), found.path[0].argsort(1)) for each in (*found.path, *found.states[1:]))
    assert found.path[2].softmax(1).amax() > found.path[0].softmax(1).amax()  # but the same evidence is counted again


def test_analytic_blocks_see_no_state_and_add_its_evidence(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: Eq. 8 of softmax(f(x, 0) + evidence), written out with the same draw.
    rule = make_rule(state="analytic", eta=0.7).eval()
    step, schedule, u = new_step(rule, seed=3), rule.schedule, F.one_hot(batch.targets, 4).float()
    eps = torch.randn(16, 4, generator=step.generator_for("t2"))
    z = schedule.signal[1] * u + schedule.noise[1] * eps
    logits = rule.network.blocks["t2"](batch.inputs, torch.zeros(16, 4)) + evidence(rule.embed, z, float(schedule.abar[1]))
    wanted = 0.5 * 0.7 * (schedule.snr[2] - schedule.snr[1]) * ((logits.softmax(1) - u) ** 2).sum() / 16
    torch.testing.assert_close(rule.block_loss(2, batch.inputs, rule.rows(batch), step, share=1 / 3), wanted, rtol=2e-4, atol=1e-6)


# --- states of one's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_own_states_are_the_mean_path_of_the_last_pass(execution: str, make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: Eq. 3's mean from z_0 = 0, with the estimates that the blocks made in the two passes before.
    rule = trained_on(make_rule(state="own", execution=execution), 40)
    indices, s = torch.arange(16) + 20, rule.schedule
    zero = torch.zeros(16, 4)
    first = [rule.estimate(block(batch.inputs, zero)).detach() for _, block in rule.denoisers()]  # nothing is known in the first pass
    rule.credit(placed(batch, indices), new_step(rule))
    path = [zero, s.a[1] * first[0], s.a[2] * first[1]]  # each from z_{t-1} = 0
    for t in (1, 2):
        torch.testing.assert_close(rule.kept.states[indices, t - 1], path[t], rtol=1e-4, atol=1e-6)
    second = rule.estimate(rule.network.blocks["t2"](batch.inputs, path[1])).detach()
    rule.credit(placed(batch, indices), new_step(rule))
    torch.testing.assert_close(rule.kept.states[indices, 1], s.a[2] * second + s.b[2] * path[1], rtol=1e-4, atol=1e-6)
    assert not rule.kept.states[:20].any()  # of the others nothing is known


@pytest.mark.parametrize("state", ["own", "crossfit"])
def test_within_a_step_no_block_sees_another(state: str, make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: an intervention: new weights of t2 change no other gradient of this step, and of the next one those above alone.
    rule = trained_on(make_rule(state=state), 16)
    rule.credit(placed(batch), new_step(rule))
    kept = rule.kept.states.clone()

    def after(changed: bool, steps: int) -> dict[str, Tensor]:
        other = make_rule(state=state)
        trained_on(other, 16).kept.states.copy_(kept)
        if changed:
            randomised(other.network.blocks["t2"])
        return [gradients(other, placed(batch)) for _ in range(steps)][-1]

    for steps, wanted in ((1, {"t2"}), (2, {"t2", "t3"})):
        one, two = after(False, steps), after(True, steps)
        assert {name.split(".")[2] for name in one if name.startswith("network") and not torch.equal(one[name], two[name])} == wanted


def test_states_go_from_block_to_block_where_positions_are_unknown(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: the states that blocks are called with, by hooks, and Eq. 3's mean of their outputs.
    rule = trained_on(make_rule(state="own"), 16)
    seen: list[tuple[Tensor, Tensor]] = []
    for _, block in rule.denoisers():
        block.register_forward_hook(lambda block, args, out: seen.append((args[1], out.detach())))
    rule.credit(batch, new_step(rule))
    for t in (1, 2):
        torch.testing.assert_close(seen[t][0], rule.schedule.advance(seen[t - 1][0], rule.estimate(seen[t - 1][1]), t, None))
    step = new_step(rule)
    step.phase = Phase("t2", groups=("t2", "head"))
    with pytest.raises(UsageError, match="stays the same"):
        rule.credit(batch, step)


def test_cross_fitted_states_are_of_members_that_never_learn_from_the_example(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: interventions: other examples of one half change the gradients of one member, and what the other one says decides its states.
    changed = batch.inputs.clone()
    changed[1::2] += torch.randn_like(changed[1::2])  # the second half
    rules = [trained_on(make_rule(state="crossfit"), 16) for _ in range(2)]
    one, two = gradients(rules[0], placed(batch)), gradients(rules[1], placed(Batch(changed, batch.targets)))
    same = {name: torch.equal(one[name], two[name]) for name in one if name.endswith("out.weight")}
    assert same == {f"network.blocks.t{t}.members.{member}.out.weight": member == 0 for t in (1, 2, 3) for member in (0, 1)}
    rules = [trained_on(make_rule(state="crossfit"), 16) for _ in range(2)]
    first = rules[1].network.blocks["t1"]
    assert isinstance(first, PairedBlock)
    randomised(first.singles()[0])
    for rule in rules:
        rule.credit(placed(batch), new_step(rule))
    moved = (rules[0].kept.states[:, 0] != rules[1].kept.states[:, 0]).any(1)
    assert moved.tolist() == [False, True] * 8  # examples of the second half get what the first member says


def test_a_half_of_one_example_or_none_can_be_learned(make_rule: MakeRule, batch: Batch) -> None:
    rule = trained_on(make_rule(state="crossfit"), 16)
    for indices in ([0, 2, 1], [0, 2, 4]):
        part = Batch(batch.inputs[:3], batch.targets[:3], (), torch.tensor(indices))
        assert all(value.isfinite() for value in rule.credit(part, new_step(rule)).values())


def test_a_pair_answers_the_mean_of_its_members(spec: TaskSpec) -> None:
    # Oracle: the members called by themselves.
    torch.manual_seed(0)
    members = [mlp_block(spec, MLPConfig(width=8), 4).eval() for _ in range(2)]
    pair, x, z = PairedBlock(members).eval(), torch.randn(5, *spec.input_shape), torch.randn(5, 4)
    torch.testing.assert_close(pair(x, z), (members[0](x, z) + members[1](x, z)) / 2)
    assert pair.blind(x).shape == (5, 16)


def test_states_are_saved_while_a_run_lasts(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: the next step's gradients of a rule that a checkpoint is loaded into; a trained rule keeps nothing.
    rule, other = trained_on(make_rule(state="own"), 16), make_rule(state="own", seed=1)
    rule.credit(placed(batch), new_step(rule))
    rule.zero_grad()
    load_weights(other, {"weights": copy.deepcopy(rule.state_dict())})
    one, two = gradients(rule, placed(batch)), gradients(other, placed(batch))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rule.end_phase(Phase("train"), new_step(rule))
    assert len(rule.kept.states) == 0


# --- losses and readouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_cross_entropy_of_blocks(execution: str, make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: torch's cross-entropy of the blocks' outputs on the same draws, with Eq. 8's weights.
    rule = make_rule(loss="cross-entropy", state="noise", execution=execution)
    step = new_step(rule, seed=3)
    wanted = []
    for t, block in rule.denoisers():
        z = torch.randn(16, 4, generator=step.generator_for(f"t{t}"))
        wanted.append(0.5 * 0.1 * rule.schedule.gain(t) * F.cross_entropy(block(batch.inputs, z), batch.targets))
    metrics = rule.credit(batch, step)
    torch.testing.assert_close(torch.stack([metrics[f"t{t}/loss"] for t in (1, 2, 3)]), torch.stack(wanted).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inference", ["deterministic", "sampled"])
@pytest.mark.parametrize("state", ["noised", "noise", "analytic"])
def test_each_readout_predicts_what_the_others_report(state: str, inference: str, make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: predict with one readout, alternatives with another one, of the same weights and draws.
    for readout in ("path", "mean", "product"):
        chain, other = (make_rule(state=state, inference=inference, readout=name).eval() for name in ("chain", readout))
        with torch.no_grad():
            reported = chain.alternatives(batch.inputs, torch.Generator().manual_seed(5))
            predicted = other.predict(batch.inputs, torch.Generator().manual_seed(5))
        torch.testing.assert_close(predicted, reported[readout])
        assert readout not in other.alternatives(batch.inputs, torch.Generator())
        torch.testing.assert_close(predicted.exp().sum(1), torch.ones(16))


def test_readouts_of_blocks_alone_are_means_of_both_kinds(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: arithmetic and normalised geometric mean of the blocks' probabilities for z = 0.
    rule = make_rule().eval()
    with torch.no_grad():
        scores = rule.alternatives(batch.inputs, torch.Generator())
        p = torch.stack([block(batch.inputs, torch.zeros(16, 4)).softmax(1) for _, block in rule.denoisers()])
    torch.testing.assert_close(scores["mean"].exp(), p.mean(0))
    geometric = p.log().mean(0).exp()
    torch.testing.assert_close(scores["product"].exp(), geometric / geometric.sum(1, keepdim=True))


def test_an_ensemble_of_blind_blocks_reports_no_chain(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: blocks for z = 0, and the arithmetic mean of their probabilities. With readout=chain the chain is asked for.
    rule = make_rule(state="noise", readout="product").eval()
    with torch.no_grad():
        scores = rule.alternatives(batch.inputs, torch.Generator())
        p = torch.stack([block(batch.inputs, torch.zeros(16, 4)).softmax(1) for _, block in rule.denoisers()])
    assert list(scores) == ["t1", "t2", "t3", "mean"]
    torch.testing.assert_close(scores["mean"].exp(), p.mean(0))
    torch.testing.assert_close(scores["t2"].exp(), p[1])
    with pytest.raises(UsageError, match="no chain that draws"):
        rule.sample(batch.inputs, 3, torch.Generator())
    assert "sampled" in make_rule(state="noise", readout="chain").eval().alternatives(batch.inputs, torch.Generator())


def test_another_example_of_the_same_class() -> None:
    # Oracle: the definition, by a loop: the same class, a circle through all of the class, oneself where one is alone.
    classes = torch.tensor([2, 0, 2, 1, 2, 0, 3])
    found = another_of_its_class(F.one_hot(classes, 4).float())
    assert torch.equal(classes[found], classes)
    for place in range(7):
        circle, at = [], place
        while at not in circle:
            circle.append(at)
            at = int(found[at])
        assert sorted(circle) == (classes == classes[place]).nonzero().flatten().tolist()


def test_swapped_states_are_of_another_example_of_the_predicted_class(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: the last block called with the state of the next example of its class; equal examples change nothing.
    rule = make_rule().eval()
    with torch.no_grad():
        views = rule.views(rule.view(batch.inputs))
        found = rule.judgements(views, None)
        scores = rule.alternatives(batch.inputs, torch.Generator())
        other = another_of_its_class(rule.predict(batch.inputs, torch.Generator()))
        z = found.states[2][other]
        end = rule.schedule.advance(z, rule.network.blocks["t3"](batch.inputs, z).softmax(1), 3, None)
        torch.testing.assert_close(scores["chain_swapped"], rule.head(end, rule.embed))
        same = batch.inputs[:1].expand(16, -1, -1, -1)
        equal = rule.alternatives(same, torch.Generator())
        torch.testing.assert_close(equal["path_swapped"], equal["path"])


def test_predictions_of_the_mean_path_draw_nothing(make_rule: MakeRule, batch: Batch) -> None:
    for state in ("noised", "noise", "own", "crossfit", "analytic"):
        rule = make_rule(state=state, readout="mean").eval()
        with torch.no_grad():
            assert torch.equal(*(rule.predict(batch.inputs, torch.Generator().manual_seed(seed)) for seed in (1, 2)))


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({"state": "own", "inference": "sampled"}, TaskSpec("t", (1, 6, 6), 4), "never met the noise"),
        ({"state": "own"}, TaskSpec("t", (1, 6, 6), 1, targets="real"), "no states of one's own"),
        ({"loss": "cross-entropy"}, TaskSpec("t", (1, 6, 6), 1, targets="real"), "no cross-entropy"),
        ({"state": "analytic", "embedding": "learned"}, TaskSpec("t", (1, 6, 6), 4, targets="multilabel"), "one-hot"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], spec: TaskSpec, message: str, make_rule: MakeRule) -> None:
    with pytest.raises(UsageError, match=message):
        make_rule(spec=spec, **options)


def test_blocks_have_as_many_members_as_the_states_need(make_rule: MakeRule) -> None:
    for state, members in (("crossfit", 1), ("noised", 2)):
        with pytest.raises(UsageError, match=r"network\.members"):
            make_rule(state=state, network={"members": members})


def test_declared_dependence(make_rule: MakeRule) -> None:
    wanted = {"noised": "independent", "noise": "independent", "analytic": "independent", "own": "upstream", "crossfit": "upstream"}
    for state, dependence in wanted.items():
        traits = make_rule(state=state).traits
        assert (traits.dependence, traits.downstream_weights) == (dependence, 0)
    assert make_rule(state="own", embedding="learned").traits.dependence == "all"


# --- networks and defaults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["noprop-mlp", "noprop-cnn"])
def test_a_gate_scales_the_inputs_features_by_the_states(name: str) -> None:
    # Oracle: the joined layers called with x (1 + A l), written out; nothing is scaled at first.
    builder, spec = NETWORKS[name], TaskSpec("t", (1, 8, 8), 4)
    torch.manual_seed(0)
    block = builder.build(spec, builder.Config(blocks=1, width=8, join="gated")).blocks["t1"].eval()
    x, z = torch.randn(5, *spec.input_shape), torch.randn(5, 4)
    gate, *rest = block.fuse
    features, label = block.features(x), block.label(z)
    plain = nn.Sequential(*rest)(torch.cat([features, label], 1))
    torch.testing.assert_close(block.hidden(features, z), plain)
    nn.init.normal_(gate.scale.weight)
    scaled = features * (1 + label @ gate.scale.weight.T)
    torch.testing.assert_close(block.hidden(features, z), nn.Sequential(*rest)(torch.cat([scaled, label], 1)))


def test_a_folded_chain_of_gated_blocks_predicts_the_same(make_rule: MakeRule, batch: Batch) -> None:
    # Oracle: the rule's own prediction.
    rule = make_rule(network={"join": "gated"}).eval()
    for _, block in rule.denoisers():
        nn.init.normal_(block.fuse[0].scale.weight)
    with torch.no_grad():
        torch.testing.assert_close(rule.folded()(batch.inputs), rule.predict(batch.inputs, torch.Generator()), rtol=1e-4, atol=1e-5)


def test_tapered_blocks_are_smaller_one_by_one(spec: TaskSpec) -> None:
    # Oracle: the powers of the factor, by hand; blocks of different sizes are computed in a loop.
    builder = NETWORKS["noprop-mlp"]
    network = builder.build(spec, builder.Config(blocks=4, width=16, taper=0.5))
    assert [block.out.in_features for block in network.blocks.values()] == [16, 8, 4, 2]
    assert obstacle(list(network.blocks.values())) == "the blocks differ"


@pytest.mark.parametrize(
    ("options", "targets", "wanted"),
    [
        ({}, "classes", (True, "product")),
        ({}, "multilabel", (True, "product")),
        ({}, "real", (False, "chain")),
        ({"inference": "sampled"}, "classes", (False, "chain")),  # the paper's
        ({"readout": "chain"}, "classes", (False, "chain")),
        ({"state": "noised"}, "classes", (False, "chain")),
        ({"state": "own"}, "classes", (False, "chain")),
        ({"state": "noise", "readout": "mean"}, "classes", (True, "mean")),
    ],
)
def test_what_is_not_said_is_decided_by_the_rest(options: dict[str, Any], targets: Any, wanted: tuple[bool, str]) -> None:
    """Oracle: the table of the plugin's page; the plan names it."""
    spec = TaskSpec("t", (1, 6, 6), 4, targets)
    config = NoPropDTConfig(T=2, **options)
    builder = NETWORKS["noprop-mlp"]
    rule = NoPropDT(builder.build(spec, builder.Config(blocks=2, width=8)), spec, config)
    assert (rule.blind, rule.readout) == wanted
    assert ("blind" in rule.plan(), "last state" in rule.plan()) == (wanted[0], wanted[1] == "chain")


@pytest.mark.parametrize(("trained", "asked"), [({}, {"inference": "sampled"}), ({"inference": "sampled"}, {})])
def test_blocks_stay_what_they_have_learned_on(trained: dict[str, Any], asked: dict[str, Any], make_rule: MakeRule) -> None:
    # Oracle: the rule that was trained: what its predictions are asked for later does not decide it again.
    rule, other = make_rule(state="auto", **trained), make_rule(state="auto", **asked)
    assert rule.blind != other.blind
    other.load_state_dict(rule.state_dict())
    assert (other.blind, other.readout) == (rule.blind, rule.readout)
