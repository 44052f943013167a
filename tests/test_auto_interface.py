"""lr="auto": runs that are resumed or copied, steps that fail or are interrupted, and what is refused."""

import copy
import random

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim.auto import START
from tests.auto_setup import _backward, _network, _start, _trained
from tests.test_atomic import _all_of, _At


def test_a_resumed_run_and_a_copy_go_on_bit_for_bit():
    loss_fn = nn.MSELoss()
    model = _network()
    optimizer = _start(model, loss_fn)
    _trained(model, optimizer, loss_fn, range(13))
    copied = copy.deepcopy((model, optimizer))
    resumed = _network()
    other = _start(resumed, loss_fn)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["auto"] == optimizer.param_groups[0]["auto"] != START
    whole = _trained(model, optimizer, loss_fn, range(13, 30))
    for ends in (_trained(*copied, loss_fn, range(13, 30)), _trained(resumed, other, loss_fn, range(13, 30))):
        assert all(torch.equal(a, b) for a, b in zip(whole, ends, strict=True))


@pytest.mark.parametrize("at", [1, 2])
def test_a_step_whose_loss_fails_has_not_happened(at):
    class Breaking(nn.MSELoss):
        left = 10**6

        def forward(self, *args):
            self.left -= 1
            if self.left < 0:
                raise OSError
            return super().forward(*args)

    loss_fn = Breaking()
    model = _network()
    optimizer = _start(model, loss_fn)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    for _ in range(3):
        _backward(model, optimizer, loss_fn, x, y)
        if optimizer._steps < 2:
            optimizer.step()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    loss_fn.left = at - 1  # the look at the loss, then that after the step
    with pytest.raises(OSError):  # noqa: PT011 - of no further kind
        optimizer.step()
    after = [model.state_dict(), optimizer.state_dict()]
    for states in (before, after):
        states[1] = {**states[1], "fishopt": None, "param_groups": states[1]["param_groups"][0]["auto"]}
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    loss_fn.left = 10**6
    optimizer.step()


def test_a_model_in_several_processes_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            _start(model, nn.MSELoss())
        inner, loss_fn = model.module, nn.MSELoss()
        optimizer = _start(inner, loss_fn)
        loss_fn(model(torch.randn(3, 2)), torch.randn(3, 1)).backward()
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_what_cannot_be_searched_is_refused_by_name():
    model, x = _network(), torch.randn(6, 4).double()
    y = torch.randn(6, 3).double()

    def stepped(likelihood, loss, closure=None, **options):
        optimizer = _start(model, likelihood, **options)
        before = [p.detach().clone() for p in model.parameters()]
        loss(optimizer)
        try:
            optimizer.step(closure)
        finally:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert not optimizer.state

    def plain(_):
        nn.functional.mse_loss(model(x), y).backward()

    def scaled(optimizer):
        plain(optimizer)
        optimizer.found_inf = torch.tensor(0.0)

    with pytest.raises(ValueError, match="no call of a loss module"):
        stepped(nn.MSELoss(), plain)
    with pytest.raises(ValueError, match="no call of a loss module"):
        stepped("gaussian", plain)
    with pytest.raises(ValueError, match="labels' variance is not known"):
        stepped(nn.MSELoss(), plain, closure=lambda: nn.functional.mse_loss(model(x), y).detach())
    with pytest.raises(ValueError, match="2 forwards"):
        stepped("gaussian", lambda _: (plain(_), plain(_)), closure=lambda: torch.tensor(0.0))
    with pytest.raises(ValueError, match="closure returned None"):
        stepped("gaussian", plain, closure=lambda: None)
    with pytest.raises(ValueError, match="GradScaler"):
        stepped(nn.MSELoss(), scaled)
    with pytest.raises(ValueError, match="before any backward"):
        stepped("gaussian", lambda _: model(x))
    with pytest.raises(ValueError, match="maximize"):
        _start(model, nn.MSELoss(), maximize=True)
    with pytest.raises(ValueError, match="lr='fast'"):
        fishopt.DiagonalNGD(model, nn.MSELoss(), lr="fast")


@pytest.mark.parametrize("at", [3, 12])
def test_an_interrupt_at_any_line_is_before_or_after_the_step(at):
    """A step with a refresh, and one without."""
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    _trained(model, optimizer, loss_fn, range(at))

    def started():
        copied, other = copy.deepcopy((model, optimizer))
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(at)).double()
        _backward(copied, other, loss_fn, x, x[:, :3].sin())
        return copied, other

    untouched, whole = started(), started()
    started()[1].step()  # some lines are for the first time alone
    counter = _At()
    counter.during(whole[1].step)
    ends = [_all_of(*pair) for pair in (untouched, whole)]
    seen = set()
    for line in {*random.Random(at).sample(range(1, counter.count), 30), *range(counter.count - 20, counter.count)}:
        pair = started()
        with pytest.raises(KeyboardInterrupt):
            _At(line).during(pair[1].step)
        after = _all_of(*pair)
        assert after in ends, line
        seen.add(ends.index(after))
    assert seen == {0, 1}


def test_a_checkpoint_brings_the_search_along():
    """Into an optimizer with a learning rate, as all options of the groups."""
    source, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(source, loss_fn)
    _trained(source, optimizer, loss_fn, range(2))
    model = _network()
    other = fishopt.DiagonalNGD(model, loss_fn)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.load_state_dict(source.state_dict())
    ends = _trained(source, optimizer, loss_fn, range(2, 4)), _trained(model, other, loss_fn, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
