"""Accelerate, the real one: our optimizers train in it as in a plain loop."""

import accelerate
import pytest
import torch

import fishopt
from tests.libraries_setup import EPOCHS, FAST, LOSSES, batches, both, mean_loss, network, one_cycle, plain, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def accelerator(tmp_path):
    def build(**options):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    yield build
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Accelerated:
    """Everything prepared, and the loop of Accelerate's guide."""

    def __init__(self, accelerator, kind, family="ce", schedule=one_cycle):
        model, self.loss_fn = network(), LOSSES[family]()
        optimizer = kind(model, self.loss_fn, **FAST[kind])
        prepared = accelerator.prepare(model, optimizer, batches(family), schedule(optimizer))
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.accelerator = accelerator

    def fit(self, epochs, clip=0.5):
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.loss_fn(self.model(x), y))
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return self


@both
@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_is_the_plain_loop(kind, family, accumulate, accelerator):
    run = Accelerated(accelerator(gradient_accumulation_steps=accumulate), kind, family).fit(EPOCHS)
    expected = plain(kind, family, schedule=one_cycle, clip=0.5, accumulate=accumulate)
    assert torch.equal(weights(run.model), expected)


@both
@pytest.mark.parametrize("family", LOSSES)
def test_accelerate_in_mixed_precision(kind, family, accelerator):
    run = Accelerated(accelerator(mixed_precision="bf16"), kind, family)
    assert "forward" in vars(run.model)  # replaced on the instance, which a copy of it must not share
    run.fit(EPOCHS)
    assert mean_loss(run.model, family) < 0.8 * mean_loss(network(), family)
    expected = plain(kind, family, schedule=one_cycle, clip=0.5)
    torch.testing.assert_close(weights(run.model), expected, rtol=0.1, atol=0.1)


@both
def test_a_forward_replaced_on_the_instance_is_the_copys_own(kind, accelerator):
    """The Fisher diagonal follows the parameters that the model has now, and is none of the original's gradients."""
    run = Accelerated(accelerator(mixed_precision="bf16"), kind).fit(2)
    bare = network()
    bare.load_state_dict(run.model.state_dict())
    x = next(iter(batches()))[0]
    found = fishopt.fisher_diagonal(run.model, x, "categorical", estimator="exact")
    expected = fishopt.fisher_diagonal(bare, x, "categorical", estimator="exact")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.1, atol=1e-3)


@both
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_resumes_bit_for_bit(kind, precision, accelerator, tmp_path):
    ends = []
    for resumes in (False, True):
        run = Accelerated(accelerator(mixed_precision=precision), kind, "mse").fit(3)
        if resumes:
            run.accelerator.save_state(str(tmp_path))
            run = Accelerated(accelerator(mixed_precision=precision), kind, "mse").fit(1)
            run.accelerator.load_state(str(tmp_path))
        ends.append(weights(run.fit(2).model).clone())
    assert torch.equal(*ends)
