"""Checkpoints of this version, of older ones, of newer ones, and of other models."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim.checkpoint import OLDER, VERSION

both = pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
DATA = Path(__file__).parent / "data"


def _start(kind, width=4, groups=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
    return model, kind(model, nn.CrossEntropyLoss(), params=groups and groups(model), refresh_every=20)


def _train(model, optimizer, steps):
    for step in range(steps):
        source = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 3, generator=source), torch.randint(0, 2, (8,), generator=source)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def _loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _plain(value):
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != "seconds" and not (k == "fishopt" and isinstance(v, str))}
        return {k: _plain(v) for k, v in kept.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


# --- older and newer versions ---


@both
@pytest.mark.parametrize("version", ["0.1.0"])
def test_a_file_of_an_older_version_goes_on(kind, version):
    file = torch.load(DATA / f"{kind.__name__}_{version}.pt", weights_only=True)
    model, optimizer = _start(kind)
    model.load_state_dict(file["model"])
    optimizer.load_state_dict(copy.deepcopy(file["optimizer"]))
    old = file["optimizer"]
    for p, state in zip(model.parameters(), old["state"].values(), strict=True):
        assert _plain(optimizer.state[p]) == _plain(state)
    assert optimizer.param_groups[0]["lr"] == old["param_groups"][0]["lr"]
    report = optimizer.report()
    assert (report.steps, report.failures, report.skipped) == (old["fishopt"]["steps"], 0, 0)
    assert [row.estimator for row in report.rows] == [c["estimator"] for c in old["fishopt"]["curvature"]["choices"]]
    before = [p.detach().clone() for p in model.parameters()]
    _train(model, optimizer, 30)
    for p, start in zip(model.parameters(), before, strict=True):
        assert torch.isfinite(p).all()
        assert not torch.equal(p, start)
        assert optimizer.state[p]["step"] == state["step"] + 30
        assert optimizer.state[p]["refreshes"] == state["refreshes"] + 9  # at steps 14, 16, 18, 20, 24, ... 40
    assert len(optimizer.report().history) == 2  # the second one at step 32, but with the next refresh


@both
def test_the_next_file_is_of_this_version(kind):
    model, optimizer = _start(kind)
    model.load_state_dict(torch.load(DATA / f"{kind.__name__}_0.1.0.pt", weights_only=True)["model"])
    optimizer.load_state_dict(torch.load(DATA / f"{kind.__name__}_0.1.0.pt", weights_only=True)["optimizer"])
    again = _loaded(optimizer.state_dict())
    assert again["fishopt"]["version"] == VERSION
    other, resumed = _start(kind)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(again)
    _train(model, optimizer, 15)
    _train(other, resumed, 15)
    assert _plain(resumed.state_dict()) == _plain(optimizer.state_dict())


def test_every_older_version_has_its_way_up():
    assert sorted(OLDER) == list(range(1, VERSION))


@both
@pytest.mark.parametrize("version", [VERSION + 1, 0, "2", None])
def test_a_newer_version_is_refused(kind, version):
    model, optimizer = _start(kind)
    _train(model, optimizer, 3)
    state = _loaded(optimizer.state_dict())
    state["fishopt"]["version"] = version
    before = _plain(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"layout version {version!r}.* reads up to {VERSION}"):
        optimizer.load_state_dict(state)
    assert _plain(optimizer.state_dict()) == before


@both
def test_options_that_an_older_version_did_not_know_stay(kind):
    model, optimizer = _start(kind)
    optimizer.param_groups[0]["damping"] = 0.25
    _train(model, optimizer, 2)
    state = _loaded(optimizer.state_dict())
    del state["param_groups"][0]["damping"]
    state["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["damping"] == 0.25
    assert optimizer.param_groups[0]["lr"] == 0.5
    _train(model, optimizer, 2)


# --- another optimizer's or model's, all or nothing ---

OTHERS = {
    "another width": (
        lambda kind: _start(kind, width=5),
        r"'0.weight' of shape \(5, 3\).*'0.weight' of shape \(4, 3\)",
    ),
    "other groups": (
        lambda kind: _start(kind, groups=lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters()}]),
        "2, 2 parameters in its groups, 4 here",
    ),
    "fewer parameters": (lambda kind: _start(kind, groups=lambda m: m[0].parameters()), "2 parameters.*4 here"),
    "other names": (
        lambda kind: _start(kind, groups=lambda m: [*m[2].parameters(), *m[0].parameters()]),
        "'2.weight'.*'0.weight'",
    ),
}


@both
@pytest.mark.parametrize("what", OTHERS)
def test_another_models_is_refused_by_name(kind, what):
    build, message = OTHERS[what]
    other = build(kind)
    _train(*other, 4)
    model, optimizer = _start(kind)
    _train(model, optimizer, 3)
    before = _plain(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(_loaded(other[1].state_dict()))
    assert _plain(optimizer.state_dict()) == before


@both
def test_another_optimizers_is_refused(kind):
    model, optimizer = _start(kind)
    (another,) = {fishopt.FisherAdam, fishopt.DiagonalNGD} - {kind}
    with pytest.raises(ValueError, match=f"of {another.__name__}; load it into that, not into {kind.__name__}"):
        optimizer.load_state_dict(_start(another)[1].state_dict())
    with pytest.raises(ValueError, match="no entry 'fishopt'"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def _cut(state, *path):
    *above, last = path
    for key in above:
        state = state[key]
    del state[last]


DAMAGES = {
    "no noise": lambda s: _cut(s, "fishopt", "curvature", "noise"),
    "no history": lambda s: _cut(s, "fishopt", "curvature", "history"),
    "no curvature": lambda s: _cut(s, "fishopt", "curvature"),
    "no moment": lambda s: _cut(s, "fishopt", "moment"),
    "no names": lambda s: _cut(s, "fishopt", "names"),
    "no optimizer": lambda s: _cut(s, "fishopt", "optimizer"),
}


@both
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_changes_nothing(kind, damage):
    model, optimizer = _start(kind)
    _train(model, optimizer, 3)
    state = _loaded(optimizer.state_dict())
    DAMAGES[damage](state)
    _train(model, optimizer, 3)
    before, curvature = _plain(optimizer.state_dict()), optimizer._curvature
    with pytest.raises(ValueError, match=f"state_dict lacks '{damage.removeprefix('no ')}'.*damaged"):
        optimizer.load_state_dict(state)
    assert _plain(optimizer.state_dict()) == before
    assert optimizer._curvature is curvature
    _train(model, optimizer, 1)


@both
def test_an_error_in_a_hook_changes_nothing(kind):
    model, optimizer = _start(kind)
    _train(model, optimizer, 3)
    state = _loaded(optimizer.state_dict())
    _train(model, optimizer, 3)
    before = _plain(optimizer.state_dict())

    def hook(optimizer):
        raise ZeroDivisionError

    handle = optimizer.register_load_state_dict_post_hook(hook)
    with pytest.raises(ZeroDivisionError):
        optimizer.load_state_dict(state)
    handle.remove()
    assert _plain(optimizer.state_dict()) == before


# --- what goes along ---


@both
def test_before_the_first_refresh_is_still_before_it(kind):
    """An error of the model's is then still one, not something to be survived."""
    (_, fresh), (model, optimizer) = _start(kind), _start(kind)
    optimizer.load_state_dict(_loaded(fresh.state_dict()))
    assert not optimizer._curvature.failures.has_succeeded
    _train(model, optimizer, 1)
    _, again = _start(kind)
    again.load_state_dict(_loaded(optimizer.state_dict()))
    assert again._curvature.failures.has_succeeded


@both
def test_another_kind_of_devices_random_state_is_told(kind):
    """That of a GPU has 16 bytes."""
    model, optimizer = _start(kind)
    _train(model, optimizer, 3)
    state = _loaded(optimizer.state_dict())
    state["fishopt"]["curvature"]["generator"] = torch.zeros(16, dtype=torch.uint8)
    with pytest.warns(RuntimeWarning, match="another kind of device"):
        optimizer.load_state_dict(state)
    _train(model, optimizer, 3)
