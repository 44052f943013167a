"""The examples of continual learning and pruning: reduced runs, and their pieces against brute force."""

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn

import fishopt
from tests.examples import loaded

pytestmark = pytest.mark.usefixtures("threads")  # examples set their own number


@pytest.fixture(scope="module")
def continual():
    return loaded("continual")


@pytest.fixture(scope="module")
def pruning():
    return loaded("pruning")


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("name", "passes"), [("continual", 8), ("pruning", 5)])
def test_a_quick_run_checks_out(name, passes, request, tmp_path, capsys):
    request.getfixturevalue(name).main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("│ yes  │") == passes
    assert "NO" not in printed
    picture = tmp_path / f"{name}.png"
    assert printed.rstrip().endswith(f"picture: {picture.resolve()}")
    assert 20_000 < picture.stat().st_size < 250_000


def test_networks_side_by_side_train_as_alone(continual):
    """One network at a time, the penalty's gradient by hand, Adam by torch."""
    model = continual.plain(5, _generator())
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    old, new = continual.digits(0, 5)[0]
    diagonal = continual.estimates(model, (old[0][:20], old[1][:20]), _generator(1))["exact"]
    strengths, steps = (0.0, 10.0, 1e4), 7
    networks = continual.stacked([anchor] * 3)
    start = {name: p.detach().clone() for name, p in networks.named_parameters()}
    held = {name: torch.stack([s * value for s in strengths]) for name, value in diagonal.items()}
    continual.train(networks, new, steps, _generator(2), (start, held))
    for r, strength in enumerate(strengths):
        model.load_state_dict(anchor)
        generator, optimizer = _generator(2), torch.optim.Adam(model.parameters(), lr=continual.LR)
        for step in range(steps):
            rows = torch.randint(len(new[0]), (continual.BATCH,), generator=generator)
            optimizer.param_groups[0]["lr"] = continual.LR * (1 - step / steps)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(new[0][rows]), new[1][rows]).backward()
            for name, p in model.named_parameters():
                p.grad += strength * diagonal[name] * (p.detach() - anchor[name])
            optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(networks.state_dict()[name][r], p.detach(), rtol=1e-3, atol=1e-5)
            assert strength or (p - anchor[name]).abs().max() > 0.01
        with torch.no_grad():
            alone = (model(new[0]).argmax(1) == new[1]).double().mean()
        assert abs(continual.accuracy(networks, new)[r] - alone) < 1e-2


def test_diagonals_are_of_the_same_inputs_and_the_datas_labels_for_empirical(continual):
    model = continual.plain(5, _generator())
    x, y = (part[:8] for part in continual.digits(0, 5)[0][0])
    found = continual.estimates(model, (x, y), _generator(1))
    assert tuple(found) == continual.DIAGONALS
    for name, targets in (("exact", None), ("empirical", y)):
        expected = fishopt.fisher_diagonal(model, x, "categorical", estimator=name, targets=targets)
        for key, value in expected.items():
            torch.testing.assert_close(found[name][key], value)


def test_tasks_and_parts_are_apart(continual):
    images, digits = load_digits(return_X_y=True)
    by_image = {tuple(image): digit for image, digit in zip((images / 16).tolist(), digits, strict=True)}
    parts = continual.digits(3, 5)
    seen = []
    for part in parts:
        for task, (x, y) in enumerate(part):
            labels = [by_image[tuple(image)] for image in x.double().tolist()]
            assert {label // 5 for label in labels} == {task}
            assert [label % 5 for label in labels] == y.tolist()
            seen.extend(map(tuple, x.tolist()))
    assert len(seen) == len(set(seen)) == len(images)
    assert [sum(len(y) for _, y in part) for part in parts] == [1078, 359, 360]
    assert {int(label) for _, y in continual.digits(3, 10)[0] for label in y} == set(range(10))


def test_a_run_is_the_same_to_the_bit(continual):
    """Whatever torch's own generator is at."""
    sizes = continual.Sizes(1, 5, (1.0, 100.0), (8,))
    first = continual.run(2, 10, sizes)
    torch.rand(3)
    second = continual.run(2, 10, sizes)
    assert all(torch.equal(value, second[0][penalty]) for penalty, value in first[0].items())
    assert first[1:] == second[1:]
    assert len(first[0]) == 1 + 2 * 6


def test_pruning_is_the_same_to_the_bit(pruning):
    first = pruning.run(2, 1, 2)
    torch.rand(3)
    assert pruning.run(2, 1, 2) == first


def _results(continual):
    """Strength 1 is better on validation, strength 2 on test images."""
    generator, scores = _generator(), {}
    for method, inputs in (("none", 0), ("L2", 0), ("exact", 4), ("exact", 8)):
        for strength in (1.0, 2.0):
            noise = 0.05 * torch.rand(6, 2, 2, generator=generator, dtype=torch.float64)
            noise[:, 0 if strength == 1.0 else 1] += 0.5 + 0.01 * inputs
            scores[continual.Penalty(method, inputs, strength)] = noise
    return continual.Results(scores, torch.ones(6), torch.ones(6))


def test_strengths_are_chosen_on_validation_images(continual):
    results = _results(continual)
    for key in results.tried:
        chosen = results.best(*key)
        assert chosen == (*key, 1.0)
        assert torch.equal(results.test(*key), results.scores[chosen][:, 1])


def test_comparisons_are_paired_tests_over_seeds(continual):
    results = _results(continual)
    found = continual.compared(results, "exact", "L2", (4, 8))
    parts = [results.scores[continual.Penalty("exact", n, 1.0)][:, 1].mean(1) for n in (4, 8)]
    gap = (parts[0] + parts[1]) / 2 - results.scores[continual.Penalty("L2", 0, 1.0)][:, 1].mean(1)
    t = gap.mean() / (gap.std() / 6**0.5)
    assert found.got == pytest.approx(float(stats.t.sf(float(t), 5)), rel=1e-9)
    assert f"by {100 * float(gap.mean()):.1f} points" in found.what
    reverse = continual.compared(results, "L2", "exact", (4, 8))
    assert reverse.got == pytest.approx(1 - found.got)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    return model, torch.randn(30, 4, dtype=torch.float64)


def test_saliency_is_the_divergence_of_a_small_weight(pruning, small):
    """By zeroing each weight alone, at a tenth of its size, where the second order is all there is."""
    model, x = small
    for p in model.parameters():
        p.data *= 0.1
    diagonal = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
    score = pruning.saliency(pruning.weights(model), diagonal)
    assert set(score) == {"0.weight", "2.weight"}
    before = model(x).log_softmax(1).detach()
    for name, value in score.items():
        p = dict(model.named_parameters())[name].data
        for i in range(p.numel()):
            kept, p.view(-1)[i] = float(p.view(-1)[i]), 0.0
            after = model(x).log_softmax(1).detach()
            p.view(-1)[i] = kept
            kl = float((before.exp() * (before - after)).sum(1).mean())
            assert float(value.view(-1)[i]) == pytest.approx(kl, rel=0.1, abs=1e-9)
            mask = torch.ones_like(value)
            mask.view(-1)[i] = 0.0
            assert pruning.divergence(model, x, {name: mask}) == pytest.approx(kl, rel=1e-9)


def test_negative_entries_are_the_first_to_go(pruning, small):
    theta = pruning.weights(small[0])
    diagonal = {name: torch.ones_like(value) for name, value in theta.items()}
    diagonal["2.weight"][1] = -100.0
    score = pruning.saliency(theta, diagonal)
    assert (score["2.weight"][1] == 0).all()
    assert (score["0.weight"] == theta["0.weight"] ** 2 / 2).all()
    masks = pruning.kept_of(score, (21 - 3) / 21)
    assert (masks["2.weight"][1] == 0).all()
    assert sum(float(mask.sum()) for mask in masks.values()) == 18


def test_the_highest_scores_of_all_layers_are_kept(pruning, small):
    model, x = small
    score = {name: p.abs() for name, p in pruning.weights(model).items()}
    ranked = sorted((float(v) for value in score.values() for v in value.flatten()), reverse=True)
    for kept in (1.0, 0.5, 0.1, 0.0):
        masks = pruning.kept_of(score, kept)
        count = round(kept * 21)
        left = [float(v) for name, mask in masks.items() for v in score[name][mask == 1]]
        assert sorted(left, reverse=True) == ranked[:count]
        pruned = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        pruned.load_state_dict({n: p * masks.get(n, 1.0) for n, p in model.state_dict().items()})
        torch.testing.assert_close(pruning.outputs(model, x, masks), pruned(x).log_softmax(1).detach())
    ties = pruning.kept_of({name: torch.zeros_like(value) for name, value in score.items()}, 0.5)
    assert sum(float(mask.sum()) for mask in ties.values()) == round(0.5 * 21)


def test_together_is_a_divergence_over_a_sum(pruning, small):
    model, x = small
    score = pruning.saliency(
        pruning.weights(model), fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
    )
    masks = pruning.kept_of(score, 0.3)
    gone = sum(float(v) for name, mask in masks.items() for v in score[name][mask == 0])
    assert pruning.together(model, x, score, 0.3) == pytest.approx(pruning.divergence(model, x, masks) / gone)


def test_orders_are_compared_over_a_part_of_the_fractions(pruning):
    values = torch.rand(2, 5, len(pruning.KEPT), generator=_generator(), dtype=torch.float64)
    curves = {("exact", 16): values[0] + 0.2, ("magnitude", 0): values[1]}
    found = pruning.compared(curves, ("exact", 16), ("magnitude", 0), pruning.MOST)
    assert found.what.startswith("30%-70%: exact (16 inputs) > magnitude")
    gap = (values[0] + 0.2 - values[1])[:, [KEPT in (0.3, 0.4, 0.5, 0.7) for KEPT in pruning.KEPT]].mean(1)
    t = gap.mean() / (gap.std() / 5**0.5)
    assert found.got == pytest.approx(float(stats.t.sf(float(t), 4)), rel=1e-9)
