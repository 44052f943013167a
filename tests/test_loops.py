"""Training loops as people write them: each one trains, and equals the plain loop where it should compute the same."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

import fishopt
from fishopt.batch import Batch

FAST = {fishopt.FisherAdam: {"lr": 1e-2}, fishopt.DiagonalNGD: {"lr": 3e-2, "kl_radius": 1e-4}}
both = pytest.mark.parametrize("kind", FAST)
LOSSES = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss}
N, BATCH = 64, 16


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks of a hundred weights: on a busy machine threads that wait for each other are all that takes time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Run:
    """A small network, its data and its optimizer; `step` is the plain loop's."""

    def __init__(self, kind, family="ce", act=nn.Tanh, dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 3)).to(dtype)
        self.x = torch.randn(N, 6, dtype=dtype)
        scores = self.x @ torch.randn(6, 3, dtype=dtype)
        self.y = scores.argmax(1) if family == "ce" else scores
        self.loss_fn = LOSSES[family]()
        self.optimizer = kind(self.model, self.loss_fn, **FAST[kind], **options)
        self.first = self.loss()

    def batch(self, step):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % N
        return self.x[rows], self.y[rows]

    def backward(self, step, model=None):
        x, y = self.batch(step)
        loss = self.loss_fn((model or self.model)(x), y)
        loss.backward()
        return loss

    def steps(self, count=40, start=0):
        for step in range(start, start + count):
            self.optimizer.zero_grad()
            self.backward(step)
            self.optimizer.step()
        return self

    @torch.no_grad()
    def loss(self):
        return float(self.loss_fn(self.model(self.x), self.y))

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def trains(self, below=0.7):
        return self.loss() < below * self.first


def assert_same(run, other):
    assert torch.equal(run.weights(), other.weights())


@both
@pytest.mark.parametrize("family", LOSSES)
def test_the_plain_loop_that_others_are_held_against(kind, family):
    assert Run(kind, family).steps().trains()


# --- gradients ---


@both
def test_zeroed_gradients_are_as_good_as_none(kind):
    run = Run(kind)
    for step in range(40):
        run.optimizer.zero_grad(set_to_none=False)
        run.backward(step)
        run.optimizer.step()
    assert_same(run, Run(kind).steps())


@both
def test_a_closure_is_called_once_with_gradients_on(kind):
    run, calls = Run(kind), []

    def closure():
        calls.append(torch.is_grad_enabled())
        run.optimizer.zero_grad()
        return run.backward(len(calls) - 1)

    losses = [float(run.optimizer.step(closure).detach()) for _ in range(40)]
    assert calls == [True] * 40
    assert losses[-1] < losses[0]
    assert_same(run, Run(kind).steps())


@both
def test_clipping(kind):
    """By a limit that is never met nothing changes; by one that is, it still trains."""
    ends = {}
    for limit in (1e6, 0.1):
        run = ends[limit] = Run(kind)
        for step in range(40):
            run.optimizer.zero_grad()
            run.backward(step)
            nn.utils.clip_grad_norm_(run.model.parameters(), limit)
            nn.utils.clip_grad_value_(run.model.parameters(), limit)
            run.optimizer.step()
        assert run.loss() < run.first
    assert_same(ends[1e6], Run(kind).steps())
    assert not torch.equal(ends[0.1].weights(), ends[1e6].weights())


class Heads(nn.Module):
    """Two tasks, one of them at a time: the other head gets no gradient."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.task = 0

    def forward(self, x):
        return self.heads[self.task](torch.tanh(self.body(x)))


@both
def test_parameters_without_a_gradient_stay_where_they_are(kind):
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(N, 6)
    targets = [(x @ torch.randn(6, 3)).argmax(1) for _ in range(2)]
    optimizer = kind(model, nn.CrossEntropyLoss(), **FAST[kind])
    losses = []
    for step in range(80):
        model.task = step % 2
        other = model.heads[1 - model.task].weight
        before = other.detach().clone()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), targets[model.task])
        loss.backward()
        optimizer.step()
        assert torch.equal(other, before)
        losses.append(float(loss.detach()))
    assert all(losses[task - 2] < 0.7 * losses[task] for task in (0, 1))


@both
@pytest.mark.parametrize("family", LOSSES)
def test_accumulated_gradients_train(kind, family):
    run = Run(kind, family)
    for step in range(40):
        run.optimizer.zero_grad()
        x, y = run.batch(step)
        for part in torch.arange(BATCH).split(4):
            (run.loss_fn(run.model(x[part]), y[part]) / 4).backward()
        run.optimizer.step()
    assert run.trains(0.8)


@both
@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (6, 6, 4)], ids=str)
def test_accumulated_gradients_equal_the_whole_batch(kind, family, sizes):
    """The batch of a step is all that went backward since the last one; each part's loss has its share of the mean."""
    ends = []
    for parts in ((BATCH,), sizes):
        run = Run(kind, family, dtype=torch.float64, estimator="exact")
        for step in range(12):
            run.optimizer.zero_grad()
            x, y = run.batch(step)
            for part in torch.arange(BATCH).split(parts):
                (run.loss_fn(run.model(x[part]), y[part]) * len(part) / BATCH).backward()
            run.optimizer.step()
        ends.append(run.weights())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


# --- evaluation ---

MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients on": contextlib.nullcontext,
}


@both
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", ["before step", "after step"])
def test_evaluation_changes_nothing(kind, mode, when):
    """Of other data, of another size, in eval mode and back."""

    def evaluate():
        run.model.eval()
        with MODES[mode]():
            run.loss_fn(run.model(1e3 * run.x), run.y)
        run.model.train()

    run = Run(kind, "mse")
    for step in range(15):
        run.optimizer.zero_grad()
        run.backward(step)
        if when == "before step":
            evaluate()
        run.optimizer.step()
        if when == "after step":
            evaluate()
    assert_same(run, Run(kind, "mse").steps(15))


FUNCTIONS = {
    "fisher_diagonal": lambda *a: fishopt.fisher_diagonal(*a, estimator="I2", generator=torch.Generator()),
    "empirical": lambda *a: fishopt.fisher_diagonal(*a, estimator="empirical", targets=a[1][:, :3].argmax(1)),
    "label_variance": lambda *a: fishopt.label_variance(*a, estimator="I2"),
    "variance_bound": lambda *a: fishopt.variance_bound(*a, estimator="I1"),
    "joint_variance": lambda *a: fishopt.joint_variance(*a, estimator="I1").total,
    "fisher_bound": fishopt.fisher_bound,
    "input_variance_bound": fishopt.input_variance_bound,
    "empirical_error": lambda *a: fishopt.empirical_error(*a, a[1][:, :3].argmax(1)).bias,
    "trace_bound": lambda *a: fishopt.trace_bound(*a, quantity="fisher"),
    "select_estimators": lambda *a: {choice.group: choice.scores for choice in fishopt.select_estimators(*a)},
}


def test_inputs_made_in_inference_mode_take_the_fast_pass():
    """Where autograd keeps the inputs themselves, too."""

    class Gated(nn.Sequential):
        def forward(self, x):
            return x * torch.sigmoid(super().forward(x))

    with torch.inference_mode():
        x = torch.randn(4, 6)
    batch = Batch.of(Gated(nn.Linear(6, 6)), x, "categorical")
    next(batch.chunks(batch.names))
    assert set(batch.coverage.ways.values()) == {"rule"}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_functions_work_in_any_grad_mode(name, mode):
    run = Run(fishopt.FisherAdam)
    expected = FUNCTIONS[name](run.model, run.x, "categorical")
    with MODES[mode]():
        x = run.x * 1.0  # of its own in inference mode
        found = FUNCTIONS[name](run.model, x, "categorical")
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key], key


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compute_in_full_precision_under_autocast(name):
    run = Run(fishopt.FisherAdam)
    expected = FUNCTIONS[name](run.model, run.x, "categorical")
    with torch.autocast("cpu", torch.bfloat16):
        found = FUNCTIONS[name](run.model, run.x, "categorical")
    for key, value in found.items():
        assert torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key], key


@both
def test_a_refresh_in_inference_mode_is_a_refresh(kind):
    ends = []
    for mode in MODES.values():
        run = Run(kind)
        run.steps(3)
        with mode():
            run.optimizer.refresh(run.x * 1.0)
        ends.append(run.steps(3).weights())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@both
def test_averaged_weights_leave_training_alone(kind):
    run = Run(kind)
    averaged = AveragedModel(run.model)
    for step in range(40):
        run.steps(1, start=step)
        averaged.update_parameters(run.model)
        averaged(run.x)
    assert_same(run, Run(kind).steps())
    with torch.no_grad():
        assert float(run.loss_fn(averaged(run.x), run.y)) < run.first


# --- schedulers ---

SCHEDULES = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 3e-2, total_steps=41),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.7, patience=1),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.ExponentialLR(o, 0.97)], milestones=[5]
    ),
}


@both
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_equal_hyperparameters_set_by_hand(kind, name):
    run = Run(kind)
    scheduler = SCHEDULES[name](run.optimizer)
    used = []
    for step in range(40):
        group = run.optimizer.param_groups[0]
        used.append({key: group[key] for key in ("lr", "betas", "momentum") if key in group})
        loss = run.optimizer.zero_grad() or run.backward(step)
        run.optimizer.step()
        scheduler.step(*([float(loss.detach())] if name == "plateau" else []))
    assert run.trains(0.9)
    assert len({str(options) for options in used}) > 2
    if name == "one cycle":
        momenta = {str(options["betas"] if "betas" in options else options["momentum"]) for options in used}
        assert len(momenta) > 2
    other = Run(kind)
    for step, options in enumerate(used):
        other.optimizer.param_groups[0].update(options)
        other.optimizer._plan = None  # nothing is kept from the step before
        other.steps(1, start=step)
    assert_same(run, other)


# --- several optimizers, frozen layers ---


def test_two_optimizers_are_one_with_two_groups():
    """On layers of their own, as FisherAdam's steps are by layer."""
    ends = []
    for split in (False, True):
        run = Run(fishopt.FisherAdam, dtype=torch.float64, estimator="exact")
        if split:
            optimizers = [
                fishopt.FisherAdam(run.model, run.loss_fn, params=layer.parameters(), lr=1e-2, estimator="exact")
                for layer in (run.model[0], run.model[2])
            ]
        else:
            optimizers = [run.optimizer]
        for step in range(15):
            for optimizer in optimizers:
                optimizer.zero_grad()
            run.backward(step)
            for optimizer in optimizers:  # else the second one's is at the parameters that the first has moved
                optimizer.refresh(run.batch(step)[0])
            for optimizer in optimizers:
                optimizer.step()
        assert run.loss() < run.first
        ends.append(run.weights())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@both
def test_beside_another_optimizer(kind):
    """Each moves its own parameters; one that stands still changes nothing for the other."""
    ends = []
    for others in ([], [torch.optim.SGD], [torch.optim.SGD]):
        run = Run(kind)
        del run.optimizer
        run.optimizer = kind(run.model, run.loss_fn, params=run.model[0].parameters(), **FAST[kind])
        body, head = run.model[0].weight.detach().clone(), run.model[2].weight.detach().clone()
        rate = 0.1 if len(ends) == 2 else 0.0
        beside = [other(run.model[2].parameters(), lr=rate) for other in others]
        for step in range(40):
            run.model.zero_grad()
            run.backward(step)
            for optimizer in (run.optimizer, *beside):
                optimizer.step()
        assert not torch.equal(run.model[0].weight, body)
        assert torch.equal(run.model[2].weight, head) == (rate == 0.0)
        assert run.loss() < run.first
        ends.append(run.weights())
    assert torch.equal(ends[0], ends[1])


@both
@pytest.mark.parametrize("set_to_none", [True, False])
def test_freezing_and_thawing_in_the_middle(kind, set_to_none):
    run = Run(kind)
    run.steps(12)
    run.model[0].requires_grad_(False)
    run.optimizer.zero_grad(set_to_none=True)
    frozen, middle = run.model[0].weight.detach().clone(), run.loss()
    for step in range(12, 40):
        run.optimizer.zero_grad(set_to_none=set_to_none)
        run.backward(step)
        run.optimizer.step()
    assert torch.equal(run.model[0].weight, frozen)
    assert run.loss() < middle
    run.model[0].requires_grad_(True)
    run.steps(20, start=40)
    assert not torch.equal(run.model[0].weight, frozen)
    assert run.trains()


@both
def test_a_layer_frozen_from_the_start_is_estimated_once_it_is_thawed(kind):
    torch.manual_seed(0)
    run = Run(kind, refresh_every=1000)
    run.model[0].requires_grad_(False)
    run.optimizer = kind(run.model, run.loss_fn, params=run.model.parameters(), **FAST[kind], refresh_every=1000)
    before = run.model[0].weight.detach().clone()
    run.steps(15)
    assert torch.equal(run.model[0].weight, before)
    run.model[0].requires_grad_(True)
    run.steps(30, start=15)
    assert not torch.equal(run.model[0].weight, before)
    assert run.trains()
    assert [row.refreshes for row in run.optimizer.report().rows] == [1, 11]


# --- mixed precision ---


@both
@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clips", [False, True], ids=["", "unscale_ and clip"])
def test_autocast_and_a_grad_scaler(kind, family, dtype, clips):
    """With scales that overflow at first, so that steps are skipped."""
    run = Run(kind, family)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=10)
    for step in range(60):
        run.optimizer.zero_grad()
        x, y = run.batch(step)
        with torch.autocast("cpu", dtype):
            loss = run.loss_fn(run.model(x), y)
        scaler.scale(loss).backward()
        if clips:
            scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 10.0)
        scaler.step(run.optimizer)
        scaler.update()
    assert run.trains()
    assert run.optimizer.report().failures == 0
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


@both
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.MSELoss(reduction="sum")], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_unscaling_before_the_step_changes_nothing(kind, loss_fn, parts):
    """By a power of two: rounding does not change either."""
    ends = []
    for unscales in (False, True):
        run = Run(kind, "ce" if isinstance(loss_fn, nn.CrossEntropyLoss) else "mse")
        run.optimizer = kind(run.model, loss_fn, **FAST[kind])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(15):
            run.optimizer.zero_grad()
            x, y = run.batch(step)
            for part in torch.arange(BATCH).chunk(parts):
                loss = loss_fn(run.model(x[part]), y[part])
                scaler.scale(loss if loss_fn.reduction == "sum" else loss / parts).backward()
            if unscales:
                scaler.unscale_(run.optimizer)
            scaler.step(run.optimizer)
            scaler.update()
        ends.append(run.weights())
    assert torch.equal(*ends)


@both
def test_a_loss_scale_is_forgotten_after_its_step(kind):
    """And where the loss module is not the one that was used, there is a clear error."""
    run = Run(kind, "mse")
    scaler = torch.amp.GradScaler("cpu")
    x, y = run.batch(0)
    scaler.scale(run.loss_fn(run.model(x), y)).backward()
    scaler.step(run.optimizer)
    scaler.update()
    noise = run.optimizer._moment.dispersion
    run.optimizer.zero_grad()
    scaler.scale(1e3 * nn.functional.mse_loss(run.model(x), y)).backward()
    scaler.unscale_(run.optimizer)
    scaler.step(run.optimizer)
    assert run.optimizer._moment.dispersion == noise
    del run.optimizer
    assert not run.loss_fn._forward_hooks
    assert not run.model._forward_hooks


@both
def test_the_loss_module_still_copies_and_pickles(kind):
    run = Run(kind, "mse")
    run.steps(2)
    for other in (copy.deepcopy(run.loss_fn), pickle.loads(pickle.dumps(run.loss_fn))):
        other(run.model(run.x), run.y).backward()
    assert run.optimizer._recorder._at_loss is None


@both
def test_a_disabled_scaler_is_none(kind):
    run, scaler = Run(kind), torch.amp.GradScaler("cpu", enabled=False)
    for step in range(15):
        run.optimizer.zero_grad()
        x, y = run.batch(step)
        scaler.scale(run.loss_fn(run.model(x), y)).backward()
        scaler.unscale_(run.optimizer)
        scaler.step(run.optimizer)
        scaler.update()
    assert_same(run, Run(kind).steps(15))


class OwnAutocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


@both
@pytest.mark.parametrize("family", LOSSES)
def test_autocast_inside_the_forward(kind, family):
    run = Run(kind, family)
    run.model = OwnAutocast(*run.model)
    run.optimizer = kind(run.model, run.loss_fn, **FAST[kind])
    assert run.steps().trains()
    assert run.optimizer.state[run.model[0].weight]["fisher"].dtype == torch.float32


@both
@pytest.mark.parametrize("family", LOSSES)
def test_a_step_inside_autocast_computes_in_full_precision(kind, family):
    ends = []
    for inside in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        run = Run(kind, family)
        for step in range(15):
            run.optimizer.zero_grad()
            run.backward(step)
            with inside:
                run.optimizer.step()
        ends.append(run.weights())
    assert torch.equal(*ends)


# --- torch.compile ---


ORDERS = ["optimizer of the compiled", "compiled after", "compiled before", "in place"]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(fishopt.FisherAdam, "eager"), (fishopt.FisherAdam, "aot_eager"), (fishopt.DiagonalNGD, "eager")],
)
@pytest.mark.parametrize("order", ORDERS)
def test_compiled_models(kind, backend, order):
    torch.compiler.reset()
    run = Run(kind, "mse")
    compiled = run.model
    if order == "in place":
        run.model.compile(backend=backend)
    else:
        compiled = torch.compile(run.model, backend=backend)
    if order == "compiled before":
        compiled(run.x)
    if order != "compiled after":
        model = compiled if order == "optimizer of the compiled" else run.model
        run.optimizer = kind(model, run.loss_fn, **FAST[kind])
    for step in range(15):
        run.optimizer.zero_grad()
        run.backward(step, compiled)
        run.optimizer.step()
    expected = Run(kind, "mse").steps(15).weights()
    torch.testing.assert_close(run.weights(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own, where a hook breaks its graph
def test_a_compiled_function_of_the_loss():
    torch.compiler.reset()
    run = Run(fishopt.FisherAdam, "mse")
    compiled = torch.compile(lambda x, y: run.loss_fn(run.model(x), y), backend="eager")
    for step in range(15):
        run.optimizer.zero_grad()
        compiled(*run.batch(step)).backward()
        run.optimizer.step()
    expected = Run(fishopt.FisherAdam, "mse").steps(15).weights()
    torch.testing.assert_close(run.weights(), expected, rtol=1e-4, atol=1e-5)
