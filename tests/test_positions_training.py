"""Labels at several positions in training: the optimizers count observations, and notice where classes are."""

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim.amp import plain_gradients
from fishopt.optim.estimate import Training
from fishopt.optim.noise import residuals_of
from fishopt.optim.record import Record
from fishopt.optim.subbatch import enough
from fishopt.passes import Arguments
from tests.asserts import assert_close
from tests.positions_setup import IGNORED, Tokens


@pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
def test_optimizers_count_observations(kind):
    torch.manual_seed(0)
    model = Tokens(4).double()
    x, y = torch.randint(0, 5, (6, 3)), torch.randint(0, 4, (6, 3))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = kind(model, loss_fn, estimator="empirical")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_fn(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        record = optimizer._recorder.last
        gradients = plain_gradients(optimizer, record, "batchmean")
        c = residuals_of(gradients, record, fishopt.Categorical(), torch.float64)
        expected = model(x).softmax(-1) - nn.functional.one_hot(y, 4)
        torch.testing.assert_close(c, expected.detach().flatten(1))
        optimizer.step()
        losses.append(loss.item())
    assert optimizer._moment.batch_size == 18
    assert optimizer._moment.scale == 1.0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
def test_classes_in_another_dimension_are_noticed(kind):
    """Torch's own layout, [N, C, L], would else be read as L classes at C positions."""
    torch.manual_seed(0)
    model, x, y = nn.Conv1d(2, 4, 1), torch.randn(3, 2, 5), torch.randint(0, 4, (3, 5))
    optimizer = kind(model, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*dimension 1, not -1.*Categorical\(dim=1\)"):
        nn.functional.cross_entropy(model(x), y).backward()
    del optimizer
    optimizer = kind(model, fishopt.Categorical(dim=1))
    start = float(nn.functional.cross_entropy(model(x), y).detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < start


@pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
@pytest.mark.parametrize("parts", [1, 2])
def test_ignored_positions_do_not_count_in_training(kind, parts):
    """They are read off the loss's gradient: estimate, batch size and step are those of the labels that count."""
    ends = []
    for whole in (True, False):
        torch.manual_seed(0)
        model = Tokens(4).double()
        x, y = torch.randint(0, 5, (8, 3)), torch.randint(0, 4, (8, 3))
        y[:, 1] = IGNORED
        y[3] = IGNORED
        optimizer = kind(model, nn.CrossEntropyLoss(ignore_index=IGNORED), estimator="exact")
        for _ in range(12):
            optimizer.zero_grad()
            for rows in torch.arange(8).split(8 // (1 if whole else parts)):
                loss = nn.functional.cross_entropy(model(x[rows]).flatten(0, 1), y[rows].flatten(), reduction="sum")
                (loss / 14).backward()
            optimizer.step()
            assert optimizer._moment.batch_size == 14
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        expected = fishopt.fisher_diagonal(
            model, x, fishopt.Categorical(ignore_index=IGNORED), estimator="exact", targets=y
        )
        optimizer.refresh(x)
        record = Record(Arguments((x,)), counted=y != IGNORED)
        found = optimizer._curvature.refresh(*optimizer._units(), record, Training(None, lambda _: None), 0)
        assert_close(found.diagonal, expected)
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("schedule_free", [False, True])
def test_the_size_of_f_is_the_gradients_where_an_input_has_several_labels(schedule_free):
    """These are not independent, so F over their number is too small; a single label leaves it at the likelihood's."""
    torch.manual_seed(0)
    start = nn.Linear(4, 3).double().state_dict()
    for shape, expected in (((6, 2), "gradient"), ((6,), "likelihood")):
        ends = {}
        for scale in ("auto", "gradient", "likelihood"):
            model = nn.Linear(4, 3).double()
            model.load_state_dict(start)
            options = {"scale": scale, "schedule_free": schedule_free, "estimator": "exact"}
            optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), **options)
            draws = torch.Generator().manual_seed(1)
            for _ in range(3):
                x = torch.randn(*shape, 4, dtype=torch.float64, generator=draws)
                y = torch.randint(3, shape, generator=draws)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
                optimizer.step()
            ends[scale] = model.weight.detach()
        assert torch.equal(ends["auto"], ends[expected])
        assert not torch.equal(ends["gradient"], ends["likelihood"])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(None, 16), ([1, 1], 16), ([8], 16), ([32, 32], 8), ([32, 0], 8), ([64, 16], 6), ([64, 64], 4), ([9999], 4)],
)
def test_refreshes_take_fewer_inputs_where_each_has_many_labels(labels, expected):
    assert enough(None if labels is None else torch.tensor(labels)) == expected


@pytest.mark.parametrize("mark", [0, -100])
@pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
def test_inputs_of_one_label_that_is_ignored_do_not_count(kind, mark):
    ends = []
    for ignored in (True, False):
        torch.manual_seed(0)
        model, x, y = nn.Linear(5, 4).double(), torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3 + 1
        y[2] = y[5] = mark
        some = slice(None) if ignored else y > 0
        loss_fn = nn.CrossEntropyLoss(ignore_index=mark)
        optimizer = kind(model, loss_fn, estimator="exact")
        for _ in range(12):
            optimizer.zero_grad()
            loss_fn(model(x[some]), y[some]).backward()
            optimizer.step()
        assert optimizer._moment.batch_size == 6
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
def test_the_inputs_of_a_refresh_are_those_asked_for_or_else_enough(kind):
    ends = {}
    for asked in (None, 4, 16):
        torch.manual_seed(0)
        model, x = Tokens(4).double(), torch.randint(0, 5, (16, 80))
        loss_fn = nn.CrossEntropyLoss()
        optimizer = kind(model, loss_fn, estimator="exact", refresh_inputs=asked)
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(model(x).flatten(0, 1), (x.flatten() + 1) % 4).backward()
            optimizer.step()
        ends[asked] = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert torch.equal(ends[None], ends[4])
    assert not torch.equal(ends[None], ends[16])
