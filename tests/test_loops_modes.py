"""Training loops with evaluation, mixed precision and torch.compile; functions in any grad mode."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fishopt
from fishopt.batch import Batch
from tests.loops_setup import BATCH, FAST, LOSSES, Run, assert_same, both

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert all(record.factor is None for record in run.optimizer._recorder.records)


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
