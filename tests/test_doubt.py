"""What could fool a look at a few inputs: gradients that vanish, forwards that branch, rows that change places."""

import copy

import pytest
import torch
from torch import nn

import fishopt
from fishopt.passes import Arguments, CoupledInputsError, Shadow, coverage_of, open_pass
from fishopt.passes.coverage import MAX_TURNS
from fishopt.passes.rules import RULES
from tests.asserts import assert_close
from tests.networks import Net, Network, OldProduct, parameter
from tests.test_coverage import Jacobians


def batch(*shape, shift=0.0):
    return Arguments((torch.randn(*shape, dtype=torch.float64) + shift,))


def agrees(shadow, model, inputs, names=None):
    brute = Jacobians.of(model, Network(None, None), inputs)
    columns = torch.randn(2, *brute.h.shape).double()
    shadow.sync()
    with open_pass(shadow, inputs, shadow.names) as through:
        found = through.squared_vjp(columns, per_input=True)
    expected = brute.squared(columns)
    wanted = expected if names is None else names
    assert_close({name: found[name] for name in wanted}, {name: expected[name] for name in wanted})


def _branch(m, x):
    return m.head(torch.tanh((m.a if x.mean() > 0 else m.b)(x)))


def _experts(m, x):
    kind, out = (x[:, 0] > -0.5).long() + (x[:, 0] > 0.5).long(), torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        rows = (kind == i).nonzero()[:, 0]
        if len(rows):
            out[rows] = torch.tanh(expert(x[rows]))
    return m.head(out)


def _large(m, x):
    return m.head(torch.relu(m.a(x)) + (m.b(x) if len(x) > 4 else m.a(x)))


def _sorted(m, x):
    order = x[:, 0].argsort()
    return m.head(torch.tanh(m.a(x[order])))[order.argsort()]


def two_layers(forward):
    torch.manual_seed(0)
    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), head=nn.Linear(4, 3)).double()


def test_the_same_calls_with_other_parameters():
    model = two_layers(_branch)
    shadow = Shadow(model)
    for shift in (3, -3, 3, -3, -3, 3, -3):
        agrees(shadow, model, batch(4, 4, shift=shift))


def test_an_expert_that_is_asked_for_the_first_time():
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = Net(_experts, experts=experts, head=nn.Linear(4, 3)).double()
    shadow = Shadow(model)
    for count in (1, 2, 9, 4, 12):
        agrees(shadow, model, batch(count, 4))
    x = torch.randn(12, 4, dtype=torch.float64)
    x[:3, 0], x[3:, 0] = -2, 2  # nothing of the last expert among the inputs that are tried
    found = fishopt.fisher_diagonal(model, x, "gaussian", estimator="exact")
    assert found["experts.2.weight"].abs().min() > 0


def test_a_way_that_large_batches_take_alone():
    """Three looks, each with too few inputs to see it; then it is not traced any more, and the loop ends."""
    model = two_layers(_large)
    shadow = Shadow(model)
    with open_pass(shadow, batch(6, 4), shadow.names) as through:
        assert through.squared_vjp(torch.randn(1, 6, 3).double()).keys() == set(shadow.names)
    assert shadow.turns >= MAX_TURNS


@pytest.mark.parametrize("forward", [_sorted, lambda m, x: m.head(torch.tanh(m.a(x.flip(0)))).flip(0)])
def test_rows_that_change_places(forward):
    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(4, 4), head=nn.Linear(4, 3)).double()
    shadow = Shadow(model)
    for x in (torch.arange(16.0).view(4, 4) / 8, torch.randn(5, 4), torch.randn(1, 4)):
        agrees(shadow, model, Arguments((x.double(),)))


def test_one_input_alone_is_no_proof_of_its_place():
    shadow = Shadow(two_layers(_branch))
    shadow.sync()
    coverage_of(shadow, batch(1, 4, shift=3))
    assert shadow.in_doubt
    assert not shadow.proven


def test_zeros_are_no_evidence(monkeypatch):
    """A rule that is wrong, below a gate that is closed at first: seen as soon as it opens."""

    def wrong(call, operand, g, power):
        return right.rule(call, operand, 2 * g, power)

    torch.manual_seed(0)
    model = Net(lambda m, x: m.head(x + m.gate * m.a(x)), a=nn.Linear(4, 4), gate=parameter(), head=nn.Linear(4, 3))
    model = model.double()
    right = RULES[nn.functional.linear][0]
    monkeypatch.setitem(RULES, nn.functional.linear, [type(right)(**{**vars(right), "rule": wrong})])
    model.gate.data.zero_()
    shadow = Shadow(model)
    inputs = batch(3, 4)
    shadow.sync()
    assert coverage_of(shadow, inputs).ways["a.weight"] == "rule"
    assert shadow.in_doubt
    agrees(shadow, model, inputs)
    model.gate.data.fill_(1)
    for _ in range(4):
        shadow.sync()
    assert coverage_of(shadow, inputs).ways["a.weight"] == "call"
    assert not shadow.in_doubt
    agrees(shadow, model, inputs)
    shadow.forget()  # and remembered where there is nothing to be seen again
    model.gate.data.zero_()
    assert coverage_of(shadow, inputs).ways["a.weight"] == "call"


def test_what_a_network_draws_is_no_disagreement():
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.b(torch.tanh(m.a(nn.functional.dropout(x, 0.5)))), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
    ).double()
    shadow, inputs = Shadow(model), batch(4, 4)
    assert set(coverage_of(shadow, inputs).ways.values()) == {"rule"}


def test_inputs_that_meet_only_in_some_batches():
    """Refused once, in words; then known."""
    model = two_layers(lambda m, x: m.head(m.a(x) + OldProduct.apply(x, m.b.weight) * (1 + (x.mean() > 1))))
    shadow = Shadow(model)
    assert coverage_of(shadow, batch(3, 4, shift=-9)).ways["b.weight"] == "rows"
    mixed = torch.cat([batch(3, 4, shift=9).leaves[0], batch(2, 4, shift=-3).leaves[0]])
    with pytest.raises(CoupledInputsError, match="depends on the other inputs"):
        open_pass(shadow, Arguments((mixed,)), shadow.names)
    assert coverage_of(shadow, batch(3, 4, shift=-9)).ways["b.weight"] == "pooled"


def test_masks_are_those_of_the_users_forward():
    """Against the network as the user runs it, not as it is watched."""
    mask = torch.ones(3, 3).tril().bool()

    def forward(m, x):
        h = m.a(x)
        return m.head(nn.functional.scaled_dot_product_attention(h, h, h, attn_mask=mask)[:, 0])

    model = two_layers(forward)
    agrees(Shadow(model), model, batch(3, 3, 4), ["a.weight", "a.bias", "head.weight", "head.bias"])


def test_lack_of_memory_is_no_disagreement(monkeypatch):
    def starved(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("fishopt.passes.coverage.TracedPass", starved)
    with pytest.raises(torch.OutOfMemoryError):
        coverage_of(Shadow(two_layers(_branch)), batch(3, 4))


def test_a_leaf_that_a_forward_makes_is_no_stranger():
    """An energy's force: the derivative in the input, made in the forward."""

    def forward(m, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(torch.tanh(m.a(z)).sum(), z, create_graph=True)
        return m.head(force)

    model = two_layers(forward)
    shadow = Shadow(model)
    for count in (3, 1, 4):
        agrees(shadow, model, batch(count, 4))


def test_layers_frozen_and_thawed_while_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), refresh_every=1)
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        before = copy.deepcopy(model[0].weight)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert torch.equal(model[0].weight, before) == frozen


def test_an_interrupt_when_a_forward_is_through_leaves_no_mode_behind(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    shadow = Shadow(two_layers(_branch))
    monkeypatch.setattr(torch.overrides.TorchFunctionMode, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shadow.run(batch(3, 4))
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("output", ["logits", lambda found: found["logits"]], ids=["key", "function"])
def test_an_optimizer_of_a_network_that_returns_a_dict(output):
    torch.manual_seed(0)
    plain = nn.Linear(4, 3)
    model = Net(lambda m, x: {"hidden": x, "logits": m.a(x)}, a=copy.deepcopy(plain))
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    for network, options in ((plain, {}), (model, {"output": output})):
        generator = torch.Generator().manual_seed(0)
        optimizer = fishopt.FisherAdam(network, nn.CrossEntropyLoss(), generator=generator, **options)
        for _ in range(3):
            optimizer.zero_grad()
            found = network(x)
            nn.functional.cross_entropy(found["logits"] if options else found, y).backward()
            optimizer.step()
    assert torch.equal(plain.weight, model.a.weight)
