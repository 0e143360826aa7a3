"""Credit through other weights. Oracles: back-propagation, autograd by the identity of three executions, derivatives by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from bpfree_feedback.base import FeedbackConfig
from bpfree_feedback.fixed import FeedbackAlignment
from bpfree_feedback.kolen_pollack import KolenPollack
from bpfree_feedback.signs import SignSymmetry
from bpfree_feedback.weight_mirror import WeightMirror
from feedback_kit import VECTORS, back_propagation, batch_for, by_identity, convolutional, dense, gradients, residual, spec_of
from torch import Tensor, nn

from bpfree import AlignmentConfig, BudgetConfig, Network, Stepper, Task, TaskSpec, TrainConfig, Trainer, UsageError, mlp, split
from bpfree.network import MLPConfig, feedback_weights

FAMILY = [FeedbackAlignment, SignSymmetry, KolenPollack, WeightMirror]
make = pytest.mark.parametrize("make", [dense, convolutional, residual])


@make
def test_with_the_forward_weights_it_is_back_propagation(make: object) -> None:
    network: Network = make()  # type: ignore[operator]
    rule, batch = FeedbackAlignment(network, spec_of(network)), batch_for(network)
    for name, weight in rule.layers.items():
        rule.feedback[name].copy_(network.get_parameter(weight))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    expected = back_propagation(network, batch)
    network.load_state_dict(state)  # running statistics
    found = gradients(rule, batch)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@make
def test_through_other_weights_it_is_what_the_identity_says(make: object) -> None:
    network: Network = make()  # type: ignore[operator]
    rule, batch = FeedbackAlignment(network, spec_of(network)), batch_for(network)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with by_identity(network, {weight: rule.feedback[name] for name, weight in rule.layers.items()}):
        expected = back_propagation(network, batch)
    network.load_state_dict(state)
    exact = back_propagation(network, batch)
    network.load_state_dict(state)
    found = gradients(rule, batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(found[name], value, rtol=0.1) for name, value in exact.items())


def test_all_hidden_layers_above_the_first_have_feedback() -> None:
    """Named by their block, where it has one layer; no credit goes below the first."""
    assert list(FeedbackAlignment(dense(), VECTORS).layers) == ["b2.0", "b2.2", "readout"]
    assert list(FeedbackAlignment(residual(), spec_of(residual())).layers)[:2] == ["s1u1.conv1", "s1u1.conv2"]


@pytest.mark.parametrize(
    ("exact", "left"), [(["readout"], ["b2.0", "b2.2"]), (["b2"], ["readout"]), (["b2.*"], ["readout"]), (["b*", "readout"], [])]
)
def test_layers_that_are_named_pass_credit_exactly(exact: list[str], left: list[str]) -> None:
    rule = FeedbackAlignment(dense(), VECTORS, FeedbackConfig(exact=exact))
    assert list(rule.layers) == left
    assert rule.traits.downstream_weights == "all"
    if not left:
        batch = batch_for(rule.network)
        expected = back_propagation(rule.network, batch)
        for name, value in gradients(rule, batch).items():
            torch.testing.assert_close(value, expected[name])


def test_names_of_layers_are_checked() -> None:
    with pytest.raises(UsageError, match=r"rule.exact names no layer: 'b3'[\s\S]*layers are: b1.0, b2.0"):
        FeedbackAlignment(dense(), VECTORS, FeedbackConfig(exact=["b3"]))


class Attending(nn.Module):
    """Attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.head = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unsqueeze(1)
        return self.head(self.attention(x, x, x, need_weights=False)[0].squeeze(1))


def test_layers_of_other_kinds_are_refused_unless_they_are_named() -> None:
    network = split(Attending(), (6,), at=["first", "attention", "head"])
    with pytest.raises(
        UsageError, match=r"in attention.attention: the backward pass of MultiheadAttention[\s\S]*exact=\[attention.attention\]$"
    ):
        FeedbackAlignment(network, VECTORS)
    rule = FeedbackAlignment(network, VECTORS, FeedbackConfig(exact=["attention"]))
    assert list(rule.layers) == ["head"]
    assert gradients(rule, batch_for(network))["blocks.first.first.weight"].any()


def test_a_layer_that_is_used_without_being_called_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(F.linear(self.first(x), self.second.weight)))

    network = Network({"b1": Shared(), "readout": nn.Linear(5, 5)}, input_shape=(6,), readout="readout")
    with pytest.raises(UsageError, match=r"b1.second: its layer was not called"):
        FeedbackAlignment(network, VECTORS)


@pytest.mark.parametrize("rule", FAMILY)
def test_what_is_transported_is_declared(rule: type[FeedbackAlignment]) -> None:
    """Scales of normalisations pass credit exactly, and so are weights above that updates need."""
    spec = TaskSpec("t", (4,), 3)
    plain, normed = (rule(mlp(spec, MLPConfig(depth=2, width=5, norm=norm)), spec).traits.downstream_weights for norm in ("none", "batch"))
    assert normed == "all"
    assert plain == ("all" if rule in (SignSymmetry, WeightMirror) else 0)


@pytest.mark.parametrize("rule", FAMILY)
def test_initial_feedback_is_drawn_as_it_is_asked_for(rule: type[FeedbackAlignment]) -> None:
    """Oracle: Xavier's deviation, and independence of the forward weights."""
    spec = TaskSpec("t", (4,), 10)
    torch.manual_seed(0)
    config = rule.Config(init="xavier-normal", scale=2.0)
    made = rule(mlp(spec, MLPConfig(depth=2, width=300)), spec, config)
    weight, feedback = made.feedback_pairs()["b2"]
    assert float(feedback.std()) == pytest.approx(2 * (2 / 600) ** 0.5, rel=0.02)
    cosine = float(F.cosine_similarity(weight.detach().flatten(), feedback.detach().flatten(), dim=0))
    assert cosine > 0.7 if rule is SignSymmetry else abs(cosine) < 0.02


def test_diagnostics_see_true_gradients(digits: Task) -> None:
    """Through the forward weights credit is the true gradient; through others in the readout alone, which gets the error itself."""
    cosines = []
    for copied in (True, False):
        torch.manual_seed(0)
        rule = FeedbackAlignment(mlp(digits.spec, MLPConfig(depth=2, width=16)), digits.spec)
        for name in rule.layers if copied else ():
            rule.feedback[name].copy_(rule.network.get_parameter(rule.layers[name]))
        settings = TrainConfig(budget=BudgetConfig(samples=64), alignment=AlignmentConfig(every=1), device="cpu", batch_size=64)
        history = Trainer(rule, digits, settings).fit().history[0]
        cosines.append([history[f"alignment/{name}/cosine"] for name in ("b1", "b2", "readout")])
    assert min(cosines[0]) > 1 - 1e-6
    assert cosines[1][2] > 1 - 1e-6
    assert max(cosines[1][:2]) < 0.9


@pytest.mark.parametrize("rule", FAMILY)
def test_blocks_below_the_lowest_that_learns_are_left_alone(rule: type[FeedbackAlignment]) -> None:
    network = dense()
    made = rule(network, VECTORS)
    network.blocks["b1"].requires_grad_(False)
    found = gradients(made, batch_for(network))
    assert not any(name.startswith("blocks.b1") for name in found)
    assert found["blocks.b2.0.weight"].any()
    made.freeze_features()
    assert set(gradients(made, batch_for(network))) == {"blocks.readout.weight", "blocks.readout.bias"}


@pytest.mark.parametrize("rule", FAMILY)
def test_the_plan_names_the_layers(rule: type[FeedbackAlignment]) -> None:
    made = rule(dense(), VECTORS, rule.Config(exact=["readout"]))
    assert made.plan().splitlines() == [
        "credit passes through feedback weights in 2 layers: b2.0, b2.2",
        "through the forward weights in: readout",
    ]


@pytest.mark.parametrize("rule", FAMILY)
def test_a_copy_is_independent(rule: type[FeedbackAlignment]) -> None:
    """A deep copy executes its own layers."""
    made = rule(dense(), VECTORS)
    other = copy.deepcopy(made)
    batch = batch_for(made.network)
    expected = gradients(made, batch)
    for parameter in made.network.parameters():
        with torch.no_grad():
            parameter.zero_()
    found = gradients(other, batch)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_lightly_wrapped_networks_are_split() -> None:
    """A plain module of layers becomes a network."""
    rule = FeedbackAlignment(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), VECTORS)
    Stepper(rule).take(batch_for(rule.network))
    assert len(rule.layers) == len(feedback_weights(rule.network)) - 1


def test_logistic_outputs_are_summed_over_classes() -> None:
    """Oracle: the sum of binary cross-entropies, by autograd through the forward weights; and what a diagnostic compares with."""
    rule = FeedbackAlignment(dense(), VECTORS, FeedbackConfig(output="logistic", exact=["*"]))
    batch = batch_for(rule.network)
    found = gradients(rule, batch)
    rule.network.zero_grad()
    loss = F.binary_cross_entropy_with_logits(rule.network(batch.inputs), F.one_hot(batch.targets, 5).double(), reduction="sum") / 7
    loss.backward()
    for name, parameter in rule.network.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    torch.testing.assert_close(rule.objective(batch, Stepper(rule).step), loss)
    assert FeedbackAlignment(dense(), VECTORS).objective(batch, Stepper(rule).step) is None


def test_logistic_outputs_need_classes() -> None:
    with pytest.raises(UsageError, match="logistic outputs"):
        FeedbackAlignment(dense(), TaskSpec("r", (6,), 5, targets="real"), FeedbackConfig(output="logistic"))
