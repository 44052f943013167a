"""Lightning, the real one: our optimizers train in it as in a plain loop."""

import importlib.metadata
import sys

import pytest
import torch
from torch import nn

from tests.libraries_setup import EPOCHS, FAST, LOSSES, batches, both, mean_loss, network, one_cycle, plain, weights

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]


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


def test_torchvision_stays_out():
    assert sys.modules.get("torchvision") is None


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
