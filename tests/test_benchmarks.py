"""The benchmarks: data, problems, methods, the protocol, runs that resume."""

import functools
import gzip
import hashlib
import http.server
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fishopt
from benchmarks import ablations, data, protocol
from benchmarks.cli import main
from benchmarks.methods import METHODS
from benchmarks.models import PoissonResidual
from benchmarks.problems import PROBLEMS
from benchmarks.runs import Curve, Run, Spec, Store, digest, environment, keep_runs
from benchmarks.training import Training

BUILT_IN = [name for name, problem in PROBLEMS.items() if not problem.needs_files]


def spec(problem="digits_mlp", method="AdamW", config=None, seed=1, steps=20, track="final"):
    return Spec(track, problem, method, config or {}, seed, steps)


def trained(of):
    training = Training(of, None)
    while not training.is_done:
        training.advance()
    return training.finish()


def numbers(run):
    """All of a run but what depends on the machine."""
    return run.curve.train_loss, run.curve.valid_loss, run.curve.valid_metric, run.final


@pytest.fixture
def files(tmp_path):
    """Data in the official layouts, a few hundred random examples each."""
    draw = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 5200), ("t10k", 50)):
        for kind, shape, most in (("images-idx3", (count, 28, 28), 256), ("labels-idx1", (count,), 10)):
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
            body = draw.integers(0, most, shape, np.uint8).tobytes()
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + body, 1))
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name in data.CIFAR_FILES:
        rows = draw.integers(0, 256, (1100, 3073), np.uint8)
        rows[:, 0] %= 10
        rows.tofile(tmp_path / "cifar-10-batches-bin" / name)
    (tmp_path / "tinyshakespeare").mkdir()
    text = bytes(draw.integers(32, 97, 4000, np.uint8))
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(text)
    return tmp_path


@pytest.mark.parametrize("name", data.SOURCES)
def test_sources_read_the_official_files_and_overlap_nowhere(name, files):
    found = data.SOURCES[name](files)
    assert all(len(part.inputs) == len(part.targets) > 0 for part in (found.train, found.valid, found.test))
    if name == "cifar10":
        assert found.train.inputs.mean((0, 2, 3)).abs().max() < 1e-4
    if name in ("mnist", "cifar10", "digits", "counts"):
        rows = torch.cat([part.inputs.flatten(1) for part in (found.train, found.valid, found.test)])
        assert len(rows.unique(dim=0)) == len(rows)
    if name == "mnist":
        raw = gzip.decompress((files / "MNIST/raw/train-images-idx3-ubyte.gz").read_bytes())[16:]
        assert found.train.inputs[7, 100] == raw[7 * 784 + 100] / 255
    if name == "shakespeare":
        assert torch.equal(found.train.inputs[3, 1:], found.train.targets[3, :-1])


def test_what_is_not_there_is_fetched_and_its_checksum_compared(files, tmp_path, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=files)
    monkeypatch.setattr(handler.func, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/tinyshakespeare/input.txt"
        monkeypatch.setattr(data, "SHAKESPEARE_URL", url)
        with pytest.raises(ValueError, match="hash"):
            data.SOURCES["shakespeare"](tmp_path / "wrong")
        assert not (tmp_path / "wrong" / "tinyshakespeare" / "input.txt").exists()
        text = (files / "tinyshakespeare" / "input.txt").read_bytes()
        monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
        fetched = data.SOURCES["shakespeare"](tmp_path / "right")
        server.shutdown()
    assert torch.equal(fetched.train.inputs, data.SOURCES["shakespeare"](files).train.inputs)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_trains(name, files):
    problem = PROBLEMS[name]
    training = Training(spec(name, "FisherAdam", steps=1), files)
    training._data = data.Data(*(part.of(slice(140)) for part in vars(training._data).values()))
    training.advance()
    run = training.finish()
    assert not run.diverged
    assert run.metric == run.final["valid_metric"]
    assert 0 <= run.final["test_metric"] <= 1 or not problem.is_classification


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.is_installed])
def test_every_method_trains(name):
    before = trained(spec("fit_curve", name, steps=0 + 1))
    after = trained(spec("fit_curve", name, steps=45))
    assert after.curve.valid_loss[-1] < before.curve.valid_loss[0]
    assert after.curve.gradients[-1] >= 45
    assert (after.curvature_share > 0) == METHODS[name].is_ours


def test_the_residual_of_poissons_equation_is_that_of_its_derivatives():
    torch.manual_seed(0)
    model, points = PoissonResidual(5).double(), torch.rand(4, 2, dtype=torch.double)

    def u(p):
        hidden = p
        for layer in model.layers[:-1]:
            hidden = torch.tanh(layer(hidden))
        return (p * (1 - p)).prod() * model.layers[-1](hidden)[0]

    for p, residual in zip(points, model(points), strict=True):
        laplacian = torch.autograd.functional.hessian(u, p).trace()
        right = -2 * torch.pi**2 * torch.sin(torch.pi * p).prod()
        assert residual.item() == pytest.approx((laplacian - right).item() / (2 * torch.pi**2), rel=1e-9)


def test_a_run_is_the_same_to_the_bit_whatever_takes_turns_with_it(tmp_path):
    alone = trained(spec(method="FisherAdam"))
    store = Store(tmp_path)
    heat = [spec(method=name) for name in ("AdamW", "FisherAdam", "DiagonalNGD")]
    assert protocol.run_heat(heat, None, store) == 3
    assert numbers(store.read(heat[1])) == numbers(alone)
    assert numbers(store.read(heat[0])) != numbers(alone)


def test_a_heat_has_each_method_once():
    specs = protocol.tuning(["digits_mlp", "fit_curve"], ["AdamW", "SGD"], 3)
    found = protocol.heats(specs)
    assert [[s.method for s in heat] for heat in found] == [["AdamW", "SGD"]] * 8
    assert all(a.problem == b.problem and a.config.get("schedule") == b.config.get("schedule") for a, b in found)
    assert sorted(map(repr, specs)) == sorted(repr(s) for heat in found for s in heat)


def test_finished_runs_are_not_repeated(tmp_path):
    store = Store(tmp_path)
    done, new = spec(steps=3), spec(method="NAdam", steps=3)
    protocol.run_all([done], None, store)
    stamp = (tmp_path / done.file).stat().st_mtime_ns
    assert protocol.run_heat([done, new], None, store) == 1
    assert (tmp_path / done.file).stat().st_mtime_ns == stamp
    assert {run.spec.method for run in store.runs()} == {"AdamW", "NAdam"}


def test_runs_come_back_from_files_and_bundles(tmp_path):
    run = trained(spec(steps=3))
    Store(tmp_path / "a").save(run)
    trial = trained(spec(steps=20, track="tune"))
    keep_runs([run, trial, run], tmp_path / "b")
    read = list(Store(tmp_path).runs())
    assert read[:2] == [run, run]
    assert (read[2].metric, read[2].curve.step) == (trial.metric, [20])
    assert Run.read(json.loads(json.dumps({**vars(run), "spec": vars(run.spec), "curve": vars(run.curve)}))) == run


def test_runs_that_were_kept_before_stay_unless_they_are_repeated(tmp_path):
    first, other = trained(spec(steps=3)), trained(spec(steps=3, seed=2))
    again = replace(first, curvature_share=0.5)
    keep_runs([first, other], tmp_path)
    keep_runs([again], tmp_path)
    assert list(Store(tmp_path).runs()) == [again, other]


def test_on_the_way_to_a_goal_all_rates_take_turns():
    specs = protocol.goals(["digits_mlp", "pinn_poisson"], METHODS, [1, 2])
    found = protocol.heats(specs)
    assert [heat[0].problem for heat in found] == ["pinn_poisson"] * 2
    methods = [s.method for s in found[0]]
    assert methods.count("AdamW") == 9
    assert set(methods) == {"AdamW", "L-BFGS", "DiagonalNGD auto"}
    assert all(s.config["weight_decay"] == 0 for s in found[0] if s.method == "AdamW")
    assert {s.method for s in protocol.goals(["pinn_poisson"], ["L-BFGS"], [1])} == {"L-BFGS"}


def test_what_a_run_depends_on(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("1")
    two.write_text("2")
    before = digest([one, two])
    assert digest([two, one]) == before
    one.write_text("3")
    assert digest([one, two]) != before
    found = trained(spec(steps=3)).environment
    assert set(found) == {"torch", "python", "fishopt", "sources", "threads", "machine", "date"}
    assert environment("numpy")["numpy"] == np.__version__


def test_divergence_is_seen():
    run = trained(spec("gaussian_regression", "SGD", {"lr": 1e6}, steps=30))
    assert run.diverged
    assert run.metric == float("inf")


def test_trials_are_the_same_points_for_every_method():
    (first, *adamw), (_, *ours) = (protocol.trials(METHODS[name], 16) for name in ("AdamW", "FisherAdam"))
    assert first == {}  # as it comes
    for a, b in zip(adamw, ours, strict=True):
        assert (a["weight_decay"], a["schedule"]) == (b["weight_decay"], b["schedule"])
        assert a["lr"] / METHODS["AdamW"].lr == pytest.approx(b["lr"] / METHODS["FisherAdam"].lr, rel=1e-2)
    ratio = max(t["lr"] for t in adamw) / min(t["lr"] for t in adamw)
    assert 10 < ratio <= 10**protocol.DECADES
    assert {t["schedule"] for t in adamw} == {"constant", "cosine"}


def test_other_averages_are_warmed_up_as_ours_where_the_rate_is_constant():
    _, *tried = protocol.trials(METHODS["Schedule-Free AdamW"], 16)
    assert {(t["schedule"], t.get("warmup_steps")) for t in tried} == {("constant", 100), ("cosine", None)}
    ours = fishopt.FisherAdam(nn.Linear(2, 2), "categorical", schedule_free=True)
    assert ours.defaults["warmup"] == 100


def test_lbfgs_starts_anew_where_its_memory_leads_nowhere():
    x = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = METHODS["L-BFGS"].make(nn.ParameterList([x]), nn.MSELoss(), 1)

    def closure():
        optimizer.zero_grad()
        loss = (x.square() * torch.tensor([1.0, 7.0])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state[x]["old_dirs"]
    with torch.no_grad():
        x.zero_()
    optimizer.step(closure)
    assert x not in optimizer.state


def test_the_best_trial_is_run_again_on_fresh_seeds_and_adamws_median_is_the_target(tmp_path):
    store = Store(tmp_path)
    tuning = [spec(config={"lr": lr}, seed=0, track="tune", steps=20) for lr in (1e-6, 1e-2)]
    protocol.run_all(tuning, None, store)
    finals = protocol.finals(store.runs(), [1, 2, 3])
    assert [(s.seed, s.config, s.steps) for s in finals] == [(k, {"lr": 1e-2}, 500) for k in (1, 2, 3)]
    short = [Spec(**{**vars(s), "steps": 20}) for s in finals]
    protocol.run_all(short, None, store)
    runs = list(store.runs())
    expected = sorted(run.curve.valid_metric[-1] for run in runs if run.spec.track == "final")[1]
    assert protocol.target(runs, "digits_mlp").metric == expected
    assert sum(run.first(expected) is not None for run in runs if run.spec.track == "final") >= 2
    assert protocol.target(runs, "fit_curve") == protocol.Target(1e-5)
    assert protocol.target(runs, "mnist_relu") is None


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_the_variants_of_ablations_can_be_built(name):
    for method, config in ablations.ABLATIONS[name].variants:
        Training(spec("fit_curve", method, config), None)


def test_commands(tmp_path):
    def call(*arguments):
        result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    listed = CliRunner().invoke(main, ["list"]).output
    assert all(name in listed for name in (*PROBLEMS, "AdamW", "SINGD"))
    few = ("-p", "gaussian_regression", "-m", "AdamW")
    call("tune", *few, "--trials", "2", "--jobs", "2")
    call("run", *few, "--track", "final", "--seeds", "2")
    assert "2 runs, 2 of them finished before" in call("run", *few, "--track", "final", "--seeds", "2")
    assert len(list(Store(tmp_path).runs())) == 5
    page = call("report", "--to", str(tmp_path / "report")).split("written: ")[1].strip()
    assert "gaussian_regression" in Path(page).read_text()


def test_a_final_without_trials_is_refused(tmp_path):
    result = CliRunner().invoke(main, ["run", "--track", "final", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "run `tune`" in result.output


def test_weights_do_not_decay_where_a_function_is_fitted_and_line_searches_need_full_batches():
    specs = protocol.tuning(["fit_curve", "digits_mlp"], ["AdamW", "L-BFGS"], 4)
    assert {s.config["weight_decay"] for s in specs if s.problem == "fit_curve" and s.method == "AdamW"} == {0.0}
    assert len({s.config.get("weight_decay") for s in specs if s.problem == "digits_mlp"}) == 5  # the default is one
    assert not any("weight_decay" in s.config for s in specs if s.method == "L-BFGS")
    assert {s.problem for s in specs if s.method == "L-BFGS"} == {"fit_curve"}


def test_lbfgs_searches_its_lines():
    run = trained(spec("fit_curve", "L-BFGS", steps=240))
    assert run.curve.step == [60, 120, 180, 240]
    assert run.curve.valid_metric[-1] < 0.7 * run.curve.valid_metric[0]
    evaluations = run.curve.gradients[-1] / run.spec.steps
    assert 1.2 <= evaluations < 2  # one more for every five, and line searches that mostly take their first step


def test_training_ends_at_the_goal():
    run = trained(spec("pinn_poisson", "L-BFGS", steps=1000))
    *before, last = run.curve.valid_metric
    assert last <= PROBLEMS["pinn_poisson"].goal < min(before)
    assert run.curve.step[-1] < run.spec.steps


def test_of_trials_that_reach_a_goal_the_first_to_arrive_is_chosen():
    def trial(lr, step, metric):
        run = trained(spec("pinn_poisson", config={"lr": lr}, seed=0, steps=1, track="tune"))
        return replace(
            run, curve=Curve([step], [step], [1.0], [metric], [metric], [metric]), final={"valid_metric": metric}
        )

    goal = PROBLEMS["pinn_poisson"].goal
    trials = [trial(1.0, 2000, 2 * goal), trial(2.0, 900, 0.1 * goal), trial(3.0, 300, 0.9 * goal)]
    assert protocol.best(trials)["pinn_poisson", "AdamW"] == {"lr": 3.0}
    assert protocol.best(trials[:2])["pinn_poisson", "AdamW"] == {"lr": 2.0}
