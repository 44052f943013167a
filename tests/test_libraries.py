"""Lightning, Accelerate and schedule-free, the real ones: our optimizers train in them as in a plain loop."""

import copy
import functools
import importlib.metadata
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fishopt


def _import_lightning():
    """Without torchvision, which torchmetrics imports where it is installed, and which not every build of torch loads.

    BackPACK's metadata ask for it; neither BackPACK's parts that we use nor these tests need it.
    """
    from lightning_utilities.core import imports

    def version(name):
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imports, "_version", version)
        patch.setitem(sys.modules, "torchvision", None)
        import lightning.pytorch as lightning
    return lightning


pl = _import_lightning()
import accelerate  # noqa: E402
import schedulefree  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]

EPOCHS = 6
FAST = {fishopt.FisherAdam: {"lr": 3e-2}, fishopt.DiagonalNGD: {"lr": 5e-2, "kl_radius": 1e-3}}
both = pytest.mark.parametrize("kind", FAST)
LOSSES = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks of a hundred weights: on a busy machine threads that wait for each other are all that takes time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3))


def batches(family="ce", size=16):
    source = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=source)
    scores = x @ torch.randn(6, 3, generator=source)
    return DataLoader(TensorDataset(x, scores.argmax(1) if family == "ce" else scores), batch_size=size)


def test_torchvision_stays_out():
    assert sys.modules.get("torchvision") is None


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def mean_loss(model, family="ce"):
    with torch.no_grad():
        losses = [LOSSES[family]()(model(x), y) for x, y in batches(family)]
    return float(torch.stack(losses).mean())


@functools.cache
def plain(kind, family="ce", epochs=EPOCHS, schedule=None, clip=None, accumulate=1):
    """The loop that the libraries run."""
    model, loss_fn = network(), LOSSES[family]()
    optimizer = kind(model, loss_fn, **FAST[kind])
    scheduler = schedule(optimizer) if schedule else None
    for _ in range(epochs):
        for i, (x, y) in enumerate(batches(family)):
            (loss_fn(model(x), y) / accumulate).backward()
            if (i + 1) % accumulate:
                continue
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler:
                scheduler.step()
    assert mean_loss(model, family) < 0.8 * mean_loss(network(), family)
    return weights(model)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * optimizer.defaults["lr"], total_steps=4 * EPOCHS + 1)


# --- Lightning ---


class Lit(pl.LightningModule):
    """The optimizer is of the whole module, or of the network inside it."""

    def __init__(self, kind, family="ce", part="self", schedule=None):
        super().__init__()
        self.net = network()
        self.loss_fn = LOSSES[family]()
        self.kind, self.part, self.schedule = kind, part, schedule

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        loss = self.loss_fn(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, _):
        x, y = batch
        self.log("val_loss", self.loss_fn(self(1e3 * x), y))

    def configure_optimizers(self):
        model = self if self.part == "self" else self.net
        optimizer = self.kind(model, self.loss_fn, **FAST[self.kind])
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def trainer(path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "barebones": False}
    options = {"max_epochs": EPOCHS, "enable_checkpointing": False, **options}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=path, **quiet, **options)


def fit(path, lit, family="ce", ckpt_path=None, **options):
    run = trainer(path, **options)
    run.fit(lit, batches(family), batches(family), ckpt_path=ckpt_path)
    return run


@both
@pytest.mark.parametrize("part", ["self", "net"])
@pytest.mark.parametrize("family", LOSSES)
def test_lightning_is_the_plain_loop(kind, part, family, tmp_path):
    """With a scheduler, clipping, and validation in inference mode."""
    lit = Lit(kind, family, part, one_cycle)
    fit(tmp_path, lit, family, gradient_clip_val=0.5)
    assert torch.equal(weights(lit), plain(kind, family, schedule=one_cycle, clip=0.5))


@both
def test_lightning_accumulates(kind, tmp_path):
    lit = Lit(kind)
    fit(tmp_path, lit, accumulate_grad_batches=2)
    assert torch.equal(weights(lit), plain(kind, accumulate=2))


@both
@pytest.mark.parametrize("part", ["self", "net"])
@pytest.mark.parametrize("family", LOSSES)
def test_lightning_resumes_bit_for_bit(kind, part, family, tmp_path):
    """From a checkpoint of Trainer's own, in the middle of a cycle of refreshes."""
    ends = []
    for resumes in (False, True):
        lit = Lit(kind, family, part, one_cycle)
        if resumes:
            fit(tmp_path, lit, family, max_epochs=3).save_checkpoint(tmp_path / "at.ckpt")
            torch.manual_seed(7)
            lit = Lit(kind, family, part, one_cycle)
            with torch.no_grad():
                lit.net[0].weight.zero_()
        fit(tmp_path, lit, family, ckpt_path=tmp_path / "at.ckpt" if resumes else None)
        ends.append(weights(lit))
    assert torch.equal(*ends)


@both
@pytest.mark.parametrize("part", ["self", "net"])
@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_in_mixed_precision(kind, part, family, accumulate, tmp_path):
    """With clipping, which Lightning refuses where the optimizer asks for a GradScaler's scale."""
    lit = Lit(kind, family, part)
    options = {"precision": "bf16-mixed", "gradient_clip_val": 10.0, "accumulate_grad_batches": accumulate}
    fit(tmp_path, lit, family, **options)
    assert mean_loss(lit, family) < 0.8 * mean_loss(network(), family)
    expected = plain(kind, family, clip=10.0, accumulate=accumulate)
    torch.testing.assert_close(weights(lit), expected, rtol=0.1, atol=0.1)
    assert not torch.equal(weights(lit), expected)


class Functional(Lit):
    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@both
def test_lightning_clips_in_mixed_precision_without_the_loss_module(kind, tmp_path):
    lit = Functional(kind)
    fit(tmp_path, lit, precision="bf16-mixed", gradient_clip_val=10.0)
    assert mean_loss(lit) < 0.8 * mean_loss(network())


# --- Accelerate ---


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


# --- schedule-free ---


class Free:
    """An optimizer in a ScheduleFreeWrapper, without momentum of its own."""

    def __init__(self, kind, family="ce"):
        own = {"betas": (0.0, 0.95)} if kind is fishopt.FisherAdam else {"momentum": 0.0}
        self.model, self.loss_fn, self.family = network(), LOSSES[family](), family
        self.base = kind(self.model, self.loss_fn, **{**FAST[kind], **own})
        self.optimizer = schedulefree.ScheduleFreeWrapper(self.base, momentum=0.9)

    def fit(self, epochs, closure=False):
        self.optimizer.train()
        for _ in range(epochs):
            for x, y in batches(self.family):

                def evaluate(x=x, y=y):
                    self.optimizer.zero_grad()
                    loss = self.loss_fn(self.model(x), y)
                    loss.backward()
                    return loss

                if closure:
                    assert self.optimizer.step(evaluate).requires_grad
                else:
                    evaluate()
                    self.optimizer.step()
        self.optimizer.eval()
        return self


@both
@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
def test_schedule_free_trains(kind, family, closure):
    run = Free(kind, family).fit(10, closure)
    assert mean_loss(run.model, family) < 0.7 * mean_loss(network(), family)
    moved = weights(run.model).clone()
    run.optimizer.train()
    assert not torch.equal(weights(run.model), moved)
    run.optimizer.eval()
    torch.testing.assert_close(weights(run.model), moved)
    if closure:
        assert torch.equal(moved, weights(Free(kind, family).fit(10).model))


@both
@pytest.mark.parametrize("family", LOSSES)
def test_schedule_free_resumes_bit_for_bit(kind, family):
    run = Free(kind, family).fit(3)
    state = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    other = Free(kind, family).fit(1)
    other.model.load_state_dict(state[0])
    other.optimizer.load_state_dict(state[1])
    assert torch.equal(weights(run.fit(3).model), weights(other.fit(3).model))
    assert run.base.report().rows == other.base.report().rows


@both
def test_schedule_free_averages_what_the_optimizer_steps(kind):
    """By the paper's three sequences, y, z and x, in a plain loop around an optimizer of z."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    run = Free(kind)
    run.optimizer.train()
    (x, y) = next(iter(batches()))
    for _ in range(3):
        run.optimizer.zero_grad()
        loss_fn(run.model(x), y).backward()
        run.optimizer.step()
    run.optimizer.eval()
    own = {"betas": (0.0, 0.95)} if kind is fishopt.FisherAdam else {"momentum": 0.0}
    optimizer = kind(model, loss_fn, **{**FAST[kind], **own})
    z = [p.detach().clone() for p in model.parameters()]
    average = [p.clone() for p in z]
    for step in range(3):
        with torch.no_grad():
            for p, a, b in zip(model.parameters(), average, z, strict=True):
                p.copy_(0.9 * a + 0.1 * b)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        with torch.no_grad():
            for p, b in zip(model.parameters(), z, strict=True):
                p.copy_(b)
        optimizer.step()
        z = [p.detach().clone() for p in model.parameters()]
        average = [a + (b - a) / (step + 1) for a, b in zip(average, z, strict=True)]
    torch.testing.assert_close(weights(run.model), torch.cat([a.flatten() for a in average]), rtol=1e-4, atol=1e-5)
