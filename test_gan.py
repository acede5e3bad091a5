"""Tests of the GAN: python -m pytest test_gan.py (no network, no GPU; two minutes)."""

import copy
import csv
import errno
import importlib.util
import itertools
import math
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torch import nn

import losses
import train_gan
from models import Discriminator, Generator, load_generator

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TINY = ["--z-dim", "4", "--g-hidden", "16", "--d-hidden", "16", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """An empty folder to work in, a `drawn` of 300 + 100 images, one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gan, "DRAWN_TRAIN", 300)
    monkeypatch.setattr(train_gan, "DRAWN_TEST", 100)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def settings(*argv):
    args, _, _ = train_gan.parse_args(["--device", "cpu", *argv])
    return args


def rows(run):
    return list(csv.DictReader(Path(run, "losses.csv").open()))


def no_network(*_, **__):
    raise URLError("no network")


# ---------------------------------------------------------------------------- models


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (7,), (2, 3, 4, 5)])
def test_shapes_and_range(shape):
    G = Generator(5, (8, 9), shape)
    D = Discriminator((8,), shape)
    x = G(10 * torch.randn(6, 5))
    assert x.shape == (6, *shape)
    assert -1 <= x.min() < 0 < x.max() <= 1
    assert D(x).shape == (6, 1)
    assert torch.equal(D(x), D(x.flatten(1)))
    assert D(1000 * x).abs().max() > 1, "D must return logits, not probabilities"


def test_layers_are_those_of_the_arguments():
    G = Generator(3, [4, 5], (1, 2, 2), batch_norm=True, dropout=0.1, leak=0.0)
    kinds = [type(layer).__name__ for layer in G.net]
    hidden = ["Linear", "BatchNorm1d", "LeakyReLU", "Dropout"]
    assert kinds == hidden * 2 + ["Linear", "Tanh"]
    assert [m.out_features for m in G.net if isinstance(m, nn.Linear)] == [4, 5, 4]
    assert G.net[2](torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    assert G.net[3].p == 0.1
    D = Discriminator([6], (1, 2, 2), dropout=0.3, leak=0.25)
    assert [type(layer).__name__ for layer in D.net] == [
        "Linear",
        "LeakyReLU",
        "Dropout",
        "Linear",
    ]
    assert D.net[1](torch.tensor(-1.0)) == -0.25
    assert D.net[0].bias is not None


@pytest.mark.parametrize(
    ("network", "arguments", "name"),
    [
        (Generator, {"z_dim": 0}, "z_dim"),
        (Generator, {"hidden": (4, 0)}, "hidden"),
        (Discriminator, {"hidden": (-1,)}, "hidden"),
        (Generator, {"image_shape": ()}, "image_shape"),
        (Discriminator, {"image_shape": ()}, "image_shape"),
        (Discriminator, {"image_shape": (1, 0, 5)}, "image_shape"),
        (Generator, {"dropout": 1.0}, "dropout"),
        (Discriminator, {"dropout": -0.1}, "dropout"),
        (Discriminator, {"dropout": math.nan}, "dropout"),
    ],
)
def test_bad_arguments_are_named(network, arguments, name):
    with pytest.raises(ValueError, match=name):
        network(**arguments)


# ---------------------------------------------------------------------------- losses


def value_and_gradients(f, *logits):
    logits = [x.clone().requires_grad_() for x in logits]
    value = f(*logits)
    return value, *torch.autograd.grad(value, logits)


def close(a, b, tolerance=1e-12):
    return all(torch.allclose(x, y, tolerance, tolerance) for x, y in zip(a, b))


def log_D(x):
    return (1 / (1 + torch.exp(-x))).log()


def log_1_D(x):
    return (1 - 1 / (1 + torch.exp(-x))).log()


@pytest.mark.parametrize("label", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("shape", [(7,), (5, 1), (2, 3, 4)])
def test_losses_equal_the_written_out_logarithms(label, shape):
    real, fake = 3 * torch.randn(2, *shape, dtype=torch.float64)

    def written_out(r, f):
        real_half = label * log_D(r) + (1 - label) * log_1_D(r)
        return -real_half.mean() - log_1_D(f).mean()

    ours = value_and_gradients(
        lambda r, f: losses.discriminator_loss(r, f, label), real, fake
    )
    assert close(ours, value_and_gradients(written_out, real, fake))
    ours = value_and_gradients(losses.generator_loss, fake)
    assert close(ours, value_and_gradients(lambda f: -log_D(f).mean(), fake))
    ours = value_and_gradients(losses.minimax_generator_loss, fake)
    assert close(ours, value_and_gradients(lambda f: log_1_D(f).mean(), fake))


def test_losses_where_D_cannot_tell():
    zero = torch.zeros(4, 1, dtype=torch.float64)
    assert losses.discriminator_loss(zero, zero).item() == pytest.approx(math.log(4))
    assert losses.generator_loss(zero).item() == pytest.approx(math.log(2))
    assert losses.minimax_generator_loss(zero).item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_huge_logits_stay_finite(dtype):
    x = torch.tensor([[-1e4], [-20.0], [0.0], [20.0], [1e4]], dtype=dtype)
    for f in (
        lambda r: losses.discriminator_loss(r, -r, 0.9),
        lambda r: losses.discriminator_loss(r, r),
        losses.generator_loss,
        losses.minimax_generator_loss,
    ):
        value, gradient = value_and_gradients(f, x)
        assert value.isfinite() and gradient.isfinite().all()
        assert value.dtype == gradient.dtype == dtype
        assert value.abs() > 100, "a clamp hides how wrong D is"


def test_proposition_1_the_optimal_D_is_stationary():
    """D* = p_data / (p_data + p_g); there, V = -log 4 + 2 JSD (theorem 1)."""
    p_data = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    p_g = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    counts_data, counts_g = (100 * p_data).round().long(), (100 * p_g).round().long()

    def loss(logit):  # 100 samples of each distribution, in its own proportions
        real = logit.repeat_interleave(counts_data)
        return losses.discriminator_loss(real, logit.repeat_interleave(counts_g))

    optimum = (p_data / p_g).log()  # logit of D*
    value, gradient = value_and_gradients(loss, optimum)
    assert gradient.abs().max() < 1e-12
    middle = (p_data + p_g) / 2
    jsd = sum((p * (p / middle).log()).sum() for p in (p_data, p_g)) / 2
    assert value.item() == pytest.approx(math.log(4) - 2 * jsd.item())
    _, gradient = value_and_gradients(loss, optimum + 0.1)
    assert (gradient > 1e-4).all(), "and a minimum of D's loss"


def test_minimax_saturates_where_the_other_does_not():
    x = torch.tensor([-10.0], dtype=torch.float64)
    _, minimax = value_and_gradients(losses.minimax_generator_loss, x)
    _, non_saturating = value_and_gradients(losses.generator_loss, x)
    D = 1 / (1 + math.exp(10))
    assert minimax.item() == pytest.approx(-D)
    assert non_saturating.item() == pytest.approx(D - 1)


def test_label_noise_is_uniform_around_the_label():
    logits = torch.zeros(20_000, 1)
    drawn = losses.labels(logits, 0.9, 0.2)
    assert drawn.shape == logits.shape
    assert 0.7 <= drawn.min() < 0.71 and 1.09 < drawn.max() <= 1.1
    assert drawn.mean().item() == pytest.approx(0.9, abs=0.01)
    sure = torch.full((1000, 1), 9.0)
    noisy = [losses.discriminator_loss(sure, -sure, 1.0, 0.5) for _ in range(20)]
    assert min(noisy) < 0 < max(noisy), "as the docstring warns"
    before = torch.get_rng_state()
    losses.discriminator_loss(logits, logits)
    assert torch.equal(before, torch.get_rng_state())


def test_r1_penalty_equals_finite_differences():
    D = Discriminator((6, 5), (1, 2, 3)).double()
    x = torch.randn(4, 1, 2, 3, dtype=torch.float64)

    def squared_slope(weights):
        total, h = 0.0, 1e-6
        with torch.no_grad():
            for i, pixel in itertools.product(range(4), range(6)):
                step = torch.zeros(4, 6, dtype=torch.float64)
                step[i, pixel] = h
                up, down = (
                    torch.func.functional_call(D, weights, x.flatten(1) + s)
                    for s in (step, -step)
                )
                total += ((up - down).sum() / (2 * h)) ** 2
        return total.item() / 4 / 2

    weights = dict(D.named_parameters())
    penalty = losses.r1_penalty(D, x)
    assert penalty.item() == pytest.approx(squared_slope(weights), rel=1e-7)
    penalty.backward()
    for name, weight in weights.items():
        if name.endswith("weight"):
            for index in ((0, 0), (-1, -1)):
                shifted = [{k: v.detach().clone() for k, v in weights.items()}] * 2
                shifted = copy.deepcopy(shifted[:1]) + copy.deepcopy(shifted[:1])
                shifted[0][name][index] += 1e-5
                shifted[1][name][index] -= 1e-5
                slope = (squared_slope(shifted[0]) - squared_slope(shifted[1])) / 2e-5
                assert weight.grad[index].item() == pytest.approx(slope, 1e-4, 1e-6)
    assert not x.requires_grad


def test_r1_penalty_of_a_linear_D_is_half_its_squared_weights():
    D = nn.Sequential(nn.Flatten(), nn.Linear(6, 1)).double()
    penalty = losses.r1_penalty(D, torch.randn(5, 1, 2, 3, dtype=torch.float64))
    assert penalty.item() == pytest.approx(D[1].weight.square().sum().item() / 2)


# ------------------------------------------------------------------------ training step


def a_game(args, images):
    """The networks and optimisers as train() makes them, and their first state."""
    states = []
    original = train_gan.train_epoch

    def spy(args, images, epoch, **parts):
        states.append({k: copy.deepcopy(v.state_dict()) for k, v in parts.items()})
        states.append(torch.get_rng_state())
        states.append(parts)
        return original(args, images, epoch, **parts)

    train_gan.train_epoch = spy
    try:
        train_gan.train(args, torch.device("cpu"), images)
    finally:
        train_gan.train_epoch = original
    return states


@pytest.mark.parametrize("loss", ["non-saturating", "minimax"])
def test_one_step_equals_the_tutorials_way(loss):
    """Separate passes, BCELoss on sigmoids, gradients everywhere: the same weights."""
    torch.set_default_dtype(torch.float64)
    images = torch.randint(0, 256, (16, 1, 4, 4), dtype=torch.uint8)
    args = settings("--epochs", "1", "--batch-size", "16", "--loss", loss, "--r1", "0")
    args.z_dim, args.g_hidden, args.d_hidden, args.real_label = 3, [8], [8], 0.9
    before, rng, after = a_game(args, images)

    G = Generator(3, [8], (1, 4, 4), args.batch_norm, 0.0, args.g_leak)
    D = Discriminator([8], (1, 4, 4), 0.0, args.d_leak)
    G.load_state_dict(before["G"])
    D.load_state_dict(before["D"])
    opt_G = torch.optim.Adam(G.parameters(), args.lr, betas=(args.beta1, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), args.lr, betas=(args.beta1, 0.999))
    torch.set_rng_state(rng)
    x = images[torch.randperm(16)] / 127.5 - 1
    z = torch.randn(16, 3)
    fake, bce, ones = G(z), nn.BCELoss(), torch.ones(16, 1)
    loss_D = bce(D(x).sigmoid(), 0.9 * ones)
    loss_D = loss_D + bce(D(fake.detach()).sigmoid(), 0 * ones)
    opt_D.zero_grad()
    loss_D.backward()
    opt_D.step()
    probability = D(fake).sigmoid()
    if loss == "minimax":
        loss_G = -bce(probability, 0 * ones)
    else:
        loss_G = bce(probability, ones)
    opt_G.zero_grad()
    loss_G.backward()
    opt_G.step()
    for ours, theirs in ((after["G"], G), (after["D"], D)):
        for name, value in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], value, 0, 1e-9), name
            if "num_batches" not in name:
                assert not torch.equal(value, before["GD"[theirs is D]][name])
    row = rows("runs/001")[0]
    assert float(row["loss_D"]) == pytest.approx(loss_D.item(), abs=1e-6)
    assert float(row["loss_G"]) == pytest.approx(loss_G.item(), abs=1e-6)
    assert float(row["D_G_z2"]) == pytest.approx(probability.mean().item(), abs=1e-6)


def test_r1_joins_the_loss_every_fourth_step(monkeypatch):
    """Of all steps, not of an epoch's: here an epoch has three."""
    calls = []

    def penalty(D, x):
        calls.append(len(x))
        return sum(p.square().sum() for p in D.parameters())

    monkeypatch.setattr(losses, "r1_penalty", penalty)
    images = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8)
    argv = ["--epochs", "3", "--batch-size", "10", *TINY]
    for r1, expected in ("0", []), ("0.5", [10, 10]), ("50", [10, 10]):
        calls.clear()
        train_gan.train(settings(*argv, "--r1", r1), torch.device("cpu"), images)
        assert calls == expected
    D = [run_weights(f"runs/00{i}")["D"]["net.0.weight"] for i in (1, 2, 3)]
    assert not torch.equal(D[0], D[1]) and not torch.equal(D[1], D[2])
    first = [rows(f"runs/00{i}")[0]["loss_D"] for i in (1, 2, 3)]
    assert len(set(first)) == 1, "the penalty is not part of the loss that is shown"


def test_each_step_leaves_the_other_network_alone(monkeypatch):
    """k = 3, 10 batches: D steps 10 times, G after 3, 6, 9 and the last one."""
    events, weights = [], {}
    original = torch.optim.Adam.step

    def step(self, *arguments, **keywords):
        mine = sum(len(group["params"]) for group in self.param_groups)
        who = "D" if mine == weights["D"] else "G"
        grads = {k: [p.grad is not None for p in v] for k, v in parameters.items()}
        frozen = {k: [p.clone() for p in v] for k, v in parameters.items()}
        result = original(self, *arguments, **keywords)
        other = "G" if who == "D" else "D"
        for name, same in ((who, False), (other, True)):
            pairs = zip(frozen[name], parameters[name])
            assert all(torch.equal(a, b) for a, b in pairs) == same
        events.append((who, all(grads[who])))
        return result

    original_epoch = train_gan.train_epoch

    def spy(args, images, epoch, G, D, **parts):
        parameters["G"], parameters["D"] = list(G.parameters()), list(D.parameters())
        weights.update({k: len(v) for k, v in parameters.items()})
        return original_epoch(args, images, epoch, G=G, D=D, **parts)

    parameters = {}
    monkeypatch.setattr(train_gan, "train_epoch", spy)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    argv = ["--epochs", "1", "--batch-size", "4", "--k", "3", *TINY]
    train_gan.train(
        settings(*argv, "--g-hidden", "8", "9"), torch.device("cpu"), images
    )
    assert "".join(who for who, _ in events) == "DDDGDDDGDDDGDG"
    assert all(complete for _, complete in events)


def test_neither_backward_touches_the_other_network(monkeypatch):
    seen = []
    original = torch.Tensor.backward

    def backward(self, *arguments, **keywords):
        def grads():
            return {
                k: [p.grad if p.grad is None else p.grad.clone() for p in v]
                for k, v in parameters.items()
            }

        before = grads()
        original(self, *arguments, **keywords)
        changed = [
            k
            for k, v in grads().items()
            if any(
                a is not None and (b is None or not torch.equal(a, b))
                for a, b in zip(v, before[k])
            )
        ]
        seen.append(changed)

    original_epoch = train_gan.train_epoch

    def spy(args, images, epoch, G, D, **parts):
        parameters["G"], parameters["D"] = list(G.parameters()), list(D.parameters())
        for p in parameters["G"] + parameters["D"]:
            p.grad = torch.zeros_like(p)
        return original_epoch(args, images, epoch, G=G, D=D, **parts)

    parameters = {}
    monkeypatch.setattr(train_gan, "train_epoch", spy)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    images = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    argv = ["--epochs", "1", "--batch-size", "8", *TINY]
    train_gan.train(settings(*argv), torch.device("cpu"), images)
    assert seen == [["D"], ["G"]]


def test_half_of_Ds_loss_is_the_same_recipe():
    """Adam divides by the gradient's size: the sum and the mean of the halves agree."""
    steps = []
    for scale in (1.0, 0.5):
        torch.manual_seed(1)
        D = Discriminator((8,), (1, 4, 4)).double()
        opt_D = torch.optim.Adam(D.parameters(), 1e-3, betas=(0.0, 0.999))
        for _ in range(5):
            x = torch.randn(32, 16, dtype=torch.float64)
            loss = scale * losses.discriminator_loss(D(x), D(x + 1))
            opt_D.zero_grad()
            loss.backward()
            opt_D.step()
        steps.append(torch.cat([p.detach().flatten() for p in D.parameters()]))
    assert (steps[0] - steps[1]).abs().max() < 1e-6


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_against_its_closed_form(decay, monkeypatch):
    """sum_i (1 - d_i) prod_{j > i} d_j w_i + prod d_j w_0, d_n = min(decay, ...)."""
    seen = []
    original = torch.optim.Adam.step

    def step(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        if len(self.param_groups[0]["params"]) != 4:  # D has 2 x (weight, bias)
            state = after["G"].state_dict()
            seen.append({k: v.clone() for k, v in state.items()})

    after = {}
    original_epoch = train_gan.train_epoch

    def spy(args, images, epoch, **parts):
        if not seen:
            start = parts["G"].state_dict()
            seen.append({k: v.clone() for k, v in start.items()})
        after.update(parts)
        return original_epoch(args, images, epoch, **parts)

    monkeypatch.setattr(train_gan, "train_epoch", spy)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    argv = ["--epochs", "3", "--batch-size", "8", "--k", "2", "--ema", str(decay)]
    train_gan.train(settings(*TINY, *argv), torch.device("cpu"), images)
    assert len(seen) == 1 + 3 * 3, "three G steps an epoch: after 2, 4 and the last"
    d = [min(decay, (1 + n) / (10 + n)) for n in range(1, len(seen))]
    for name, value in after["G_average"].state_dict().items():
        if value.is_floating_point():  # weights and BatchNorm's statistics alike
            expected = math.prod(d) * seen[0][name]
            for i, w in enumerate(seen[1:]):
                expected = expected + (1 - d[i]) * math.prod(d[i + 1 :]) * w[name]
            assert torch.allclose(value, expected, 1e-4, 1e-6), name
    assert not after["G_average"].training


# ------------------------------------------------------------------------ whole program


def run_weights(run):
    state = torch.load(Path(run, "checkpoint.pt"), weights_only=True)
    return {k: state[k] for k in ("G", "D", "G_average", "opt_G", "opt_D")}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_command_from_end_to_end(capsys):
    argv = ["--dataset", "drawn", "--epochs", "3", "--batch-size", "32", *TINY]
    train_gan.main(argv)
    train_gan.main([*argv, "--out-dir", "elsewhere/mine"])
    train_gan.main([*argv, "--seed", "1"])
    run, names = Path("runs/001"), sorted(p.name for p in Path("runs/001").iterdir())
    assert names == sorted(
        ["checkpoint.pt", "losses.csv", "real.png", "training.gif"]
        + [f"epoch_{i:03}.png" for i in (1, 2, 3)]
    )
    assert Image.open(run / "epoch_003.png").size == (8 * 30 + 2, 8 * 30 + 2)
    assert len({(run / f"epoch_00{i}.png").read_bytes() for i in (1, 2, 3)}) == 3
    header = "epoch,loss_D,loss_G,D_x,D_G_z1,D_G_z2,acc_D,seconds"
    assert (run / "losses.csv").read_text().splitlines()[0] == header
    for i, row in enumerate(rows(run), 1):
        assert int(row["epoch"]) == i
        assert all(0 < float(row[k]) <= 1 for k in ("D_x", "D_G_z1", "D_G_z2", "acc_D"))
        assert float(row["loss_D"]) > 0 and float(row["seconds"]) > 0
    out = capsys.readouterr().out
    assert out.isascii() and "300 images" in out and "runs/001" in out
    assert out.count("epoch 3/3") == 3 and "nats" in out and "\r" not in out
    # the same seed gives the same run, another seed another one
    assert same(run_weights("runs/001"), run_weights("elsewhere/mine"))
    assert not same(run_weights("runs/001"), run_weights("runs/002"))
    for name in ("real.png", "epoch_003.png"):
        assert Path("elsewhere/mine", name).read_bytes() == (run / name).read_bytes()
    for a, b in zip(rows(run), rows("elsewhere/mine"), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_load_generator_gives_the_average():
    argv = ["--dataset", "drawn", "--epochs", "2", "--dropout", "0.2", *TINY]
    train_gan.main(argv)
    weights = run_weights("runs/001")
    for path in ("runs/001", Path("runs/001/checkpoint.pt")):
        G = load_generator(path)
        assert same(dict(G.state_dict()), dict(weights["G_average"]))
        assert not G.training and G.z_dim == 4
    assert not same(dict(weights["G"]), dict(weights["G_average"]))
    images = G(torch.randn(5, G.z_dim))
    assert images.shape == (5, 1, 28, 28)
    assert torch.allclose(G(torch.zeros(1, 4)), G(torch.zeros(2, 4))[:1], 0, 1e-5)


def test_grids_show_the_fixed_noise_through_the_average(monkeypatch):
    grids = []
    original = train_gan.png
    monkeypatch.setattr(train_gan, "png", lambda x: grids.append(x) or original(x))
    train_gan.main(["--dataset", "drawn", "--epochs", "1", *TINY])
    state = torch.load("runs/001/checkpoint.pt", weights_only=True)
    real, samples = grids
    assert torch.equal(samples, load_generator("runs/001")(state["fixed_z"]))
    train, _ = train_gan.draw_digits()
    assert torch.allclose(real, train[:64] / 127.5 - 1)
    assert real.min() == -1 and real.max() == 1


@pytest.mark.parametrize(
    ("n", "batch_size", "more", "sizes"),
    [
        (5, 100, [], [5]),
        (9, 8, [], [9]),
        (2, 64, [], [2]),
        (3, 2, [], [3]),
        (11, 4, [], [6, 5]),
        (3, 1, ["--no-batch-norm"], [1, 1, 1]),
    ],
)
def test_batches_at_the_edges(n, batch_size, more, sizes, monkeypatch):
    seen = []
    original = losses.discriminator_loss

    def spy(real_logits, fake_logits, *labels):
        seen.append(len(real_logits))
        return original(real_logits, fake_logits, *labels)

    monkeypatch.setattr(losses, "discriminator_loss", spy)
    argv = ["--epochs", "2", "--batch-size", str(batch_size), *TINY, *more]
    images = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8)
    train_gan.train(settings(*argv), torch.device("cpu"), images)
    assert seen == 2 * sizes


def test_every_image_is_seen_once_an_epoch_in_a_new_order(monkeypatch):
    seen = []
    original = Discriminator.forward

    def forward(self, x):
        seen.append(x)
        return original(self, x)

    monkeypatch.setattr(Discriminator, "forward", forward)
    images = (5 * torch.arange(40, dtype=torch.uint8)).view(40, 1, 1, 1)
    argv = ["--epochs", "2", "--batch-size", "10", "--r1", "0", *TINY]
    train_gan.train(settings(*argv), torch.device("cpu"), images)
    passes = [x[:10].flatten() for x in seen if len(x) == 20]
    first, second = torch.cat(passes[:4]), torch.cat(passes[4:])
    everything = images.flatten() / 127.5 - 1
    assert torch.equal(first.sort().values, everything)
    assert torch.equal(second.sort().values, everything)
    assert not torch.equal(first, second) and not torch.equal(first, everything)


def test_training_improves_what_the_untrained_generator_fails():
    train_gan.DRAWN_TRAIN, train_gan.DRAWN_TEST = 6000, 500
    train, test = train_gan.draw_digits()
    argv = ["--dataset", "drawn", "--g-hidden", "64", "--d-hidden", "64", "--epochs"]
    args = settings(*argv, "8")
    _, trained = train_gan.train(args, torch.device("cpu"), train)
    untrained = Generator(args.z_dim, [64]).eval().requires_grad_(False)
    z = torch.randn(500, args.z_dim)
    darkness = (test / 127.5 - 1).mean()
    errors = [(G(z).mean() - darkness).abs() for G in (trained, untrained)]
    assert errors[0] < 0.2 and errors[1] > 0.5
    spread = trained(z).flatten(1).std(0).mean()
    assert spread > 0.2, "all samples alike: a collapse"
    better, worse = (train_gan.parzen(G, train, test)[0] for G in (trained, untrained))
    assert better > worse + 100


# --------------------------------------------------------------------------- evaluation


def test_parzen_equals_a_written_out_mixture():
    """sigma of 0.1 .. 1 by the validation images; log mean_i N(x; s_i, sigma^2)."""

    class Spread(nn.Module):
        z_dim = 3

        def forward(self, z):
            return torch.tanh(z).view(-1, 1, 1, 3)

    train = torch.randint(90, 160, (50, 1, 1, 3), dtype=torch.uint8)
    test = torch.randint(90, 160, (30, 1, 1, 3), dtype=torch.uint8)
    before = torch.get_rng_state()
    mean, error = train_gan.parzen(Spread(), train, test)
    assert torch.equal(before, torch.get_rng_state()), "noise of its own"
    z = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0))
    centres = (torch.tanh(z).double() + 1) / 2

    def log_p(x, sigma):
        x = x.double().view(-1, 3) / 255
        square = (x[:, None] - centres).square().sum(2)
        normal = torch.exp(-square / 2 / sigma**2) / (2 * math.pi * sigma**2) ** 1.5
        return normal.mean(1).log()

    sigmas = [10 ** (-1 + i / 9) for i in range(10)]
    best = max(sigmas, key=lambda sigma: log_p(train, sigma).mean())
    expected = log_p(test, best)
    assert mean == pytest.approx(expected.mean().item(), abs=1e-4)
    assert error == pytest.approx(expected.std().item() / 30**0.5, rel=1e-3)


def test_the_validation_images_come_from_the_last_10000(monkeypatch):
    """The first 1,000 of them, as in score.py, choose the width."""

    class Constant(nn.Module):
        z_dim = 1

        def forward(self, z):
            return torch.zeros(len(z), 1, 1, 1)

    dark, grey = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 128.0)
    blocks = [dark.repeat(500, 1, 1, 1), grey.repeat(1000, 1, 1, 1)]
    train = torch.cat([*blocks, dark.repeat(9000, 1, 1, 1)]).byte()
    mean, _ = train_gan.parzen(Constant(), train, grey.repeat(5, 1, 1, 1).byte())
    narrowest = -math.log(0.1 * math.sqrt(2 * math.pi))
    assert mean == pytest.approx(narrowest, abs=1e-3)


# --------------------------------------------------------------------------------- data


def test_drawn_digits_are_the_same_every_time_and_all_different():
    torch.manual_seed(1)
    train, test = train_gan.draw_digits()
    torch.manual_seed(2)
    again, _ = train_gan.draw_digits()
    assert torch.equal(train, again)
    assert train.shape == (300, 1, 28, 28) and test.shape == (100, 1, 28, 28)
    assert train.dtype == torch.uint8 and train.max() > 200 and train.min() == 0
    assert len({x.numpy().tobytes() for x in torch.cat([train, test])}) == 400
    edge = train.float().mean(0)[0]
    assert edge[14, 10:18].mean() > 5 * edge[0].mean(), "in the middle of the picture"


def test_without_MNIST_it_says_so_and_draws(monkeypatch, capsys):
    monkeypatch.setattr(
        "torchvision.datasets.mnist.download_and_extract_archive", no_network
    )
    train_gan.main(["--epochs", "1", *TINY])
    stdout, stderr = capsys.readouterr()
    assert "warning" in stderr and "mnist" in stderr and "--data-dir" in stderr
    assert "drawn" in stderr and "of drawn" in stdout
    with pytest.raises(SystemExit) as stop:
        train_gan.main(["--dataset", "mnist", "--epochs", "1", *TINY])
    assert "mnist" in str(stop.value) and "download" in str(stop.value)
    assert sorted(p.name for p in Path("runs").iterdir()) == ["001"]


def idx_file(path, array):
    header = bytes([0, 0, 8, array.dim()])
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + sizes + array.numpy().tobytes())


def test_MNIST_on_disk_is_read_without_a_network(monkeypatch, capsys):
    monkeypatch.setattr(
        "torchvision.datasets.mnist.download_and_extract_archive", no_network
    )
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for split, n in (("train", 60), ("t10k", 20)):
        images = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8)
        idx_file(raw / f"{split}-images-idx3-ubyte", images)
        idx_file(raw / f"{split}-labels-idx1-ubyte", images[:, 0, 0])
    train_gan.main(["--epochs", "1", "--batch-size", "16", *TINY])
    stdout, stderr = capsys.readouterr()
    assert "60 images" in stdout and "of mnist" in stdout and "225 +- 2" in stdout
    assert stderr == ""


def test_a_folder_of_images_cropped_and_grey_where_all_are(tmp_path):
    folder = tmp_path / "photos" / "deeper"
    folder.mkdir(parents=True)
    Image.new("L", (40, 20), 100).save(folder / "a.png")
    wide = Image.new("RGB", (30, 10), (0, 0, 0))
    wide.paste((255, 255, 255), (10, 0, 20, 10))
    wide.save(tmp_path / "photos" / "b.png")
    args = SimpleNamespace(dataset="photos", data_dir="", image_size=10)
    images, test = train_gan.load_data(args, False)
    assert test is None and args.dataset == str(tmp_path / "photos")
    assert images.shape == (2, 1, 10, 10) and images.dtype == torch.uint8
    assert (images[0] == 255).all(), "the middle square of b.png"
    assert (images[1] == 100).all()
    Image.new("RGB", (20, 30), (255, 0, 0)).save(folder / "c.jpg")
    images, _ = train_gan.load_data(args, False)
    assert images.shape == (3, 3, 10, 10)
    assert images[1, :, 5, 5].tolist() == [100, 100, 100]


def test_a_gpu_that_is_not_there_is_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    train_gan.main(["--dataset", "drawn", "--epochs", "1", *TINY, "--device", "cuda"])
    stdout, stderr = capsys.readouterr()
    assert stderr.count("\n") == 1 and "--device cuda" in stderr and "cpu" in stderr
    assert stdout.startswith("cpu")


def test_a_gpu_of_a_wrong_number_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as stop:
        train_gan.main(["--dataset", "drawn", "--device", "cuda:2"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--device" in error and "'cuda:2'" in error and error.count("\n") == 1


@CUDA
def test_cuda_trains_resumes_on_the_cpu_and_goes_back():
    argv = ["--dataset", "drawn", "--epochs", "2", *TINY[:-2]]
    train_gan.main([*argv, "--device", "cuda"])
    train_gan.main(["--resume", "runs/001", "--epochs", "3", "--device", "cpu"])
    train_gan.main(["--resume", "runs/001", "--epochs", "4", "--device", "cuda"])
    assert len(rows("runs/001")) == 4


# ------------------------------------------------------------------------------- output


def test_the_gif_has_every_epoch_up_to_a_hundred():
    run = Path("a_run")
    run.mkdir()
    for epoch in range(1, 251):
        shade = Image.new("L", (8, 8), epoch)
        shade.putpixel((epoch % 8, epoch // 8 % 7), 255)
        shade.save(run / f"epoch_{epoch:03}.png")
    for epochs, frames in ((1, 1), (3, 3), (100, 100), (101, 51), (250, 84)):
        train_gan.write_gif(run, epochs)
        gif = Image.open(run / "training.gif")
        assert gif.n_frames == frames
        if frames > 1:
            shown = []
            for i in range(frames):
                gif.seek(i)
                shown.append((gif.convert("L").getpixel((7, 7)), gif.info["duration"]))
            assert shown[-1] == (epochs, 3000), "the last epoch, held"
            assert {duration for _, duration in shown[:-1]} == {150}
            values = [value for value, _ in shown]
            assert values == sorted(values)


def test_the_progress_line_is_for_terminals_only(monkeypatch, capsys):
    clock = itertools.count()
    monkeypatch.setattr(train_gan.time, "perf_counter", lambda: 2.0 * next(clock))
    argv = ["--dataset", "drawn", "--epochs", "1", "--batch-size", "32", *TINY]
    train_gan.main(argv)
    assert "batch" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train_gan.main(argv)
    assert "batch 1 of 9\r" in capsys.readouterr().out


# ------------------------------------------------------------------- what goes wrong


SMALL = shlex.split(
    "--image-size 8 --z-dim 4 --g-hidden 8 --d-hidden 8 --batch-size 16 --device cpu"
)
PARTS = ["G", "D", "G_average", "opt_G", "opt_D", "rng", "fixed_z"]
KEYS = [*PARTS, "settings", "history", "n_images", "G_arguments"]
RUN, OTHER_RUN = Path("runs/001"), Path("runs/002")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 64 grey images."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(64):
        pixels = random.Random(number).randbytes(64)
        Image.frombytes("L", (8, 8), pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """Runs the program in an empty folder, offline: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gan, "DRAWN_TRAIN", 64)
    monkeypatch.setattr(train_gan, "DRAWN_TEST", 16)
    for name in "mnist", "cifar":
        path = f"torchvision.datasets.{name}.download_and_extract_archive"
        monkeypatch.setattr(path, no_network)

    def run_main(*argv):
        code = 0
        with warnings.catch_warnings(record=True) as caught:
            try:
                train_gan.main([*map(str, argv)])
            except SystemExit as stop:
                code = stop.code or 0
        if isinstance(code, str):  # as Python does with such an exit code
            sys.stderr.write(f"{code}\n")
            code = 1
        sys.stderr.write("".join(f"{warning.message}\n" for warning in caught))
        return code, *capsys.readouterr()

    return run_main


def assert_one_line(err, *words):
    assert err.endswith("\n") and len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert all(str(word) in err for word in words), (err, words)


def contents():
    """Every file and folder below the working folder, with its bytes."""
    paths = sorted(Path().rglob("*"))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def load(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def plain(value):
    """The value with lists in the place of tensors, so that == compares all of it."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def assert_same_runs():
    """Both have the same weights, pictures and losses.csv, but for its seconds."""
    runs, n_epochs = (RUN, OTHER_RUN), len(load(RUN)["history"])
    for part in PARTS:
        first, second = (plain(load(run)[part]) for run in runs)
        assert first == second, part
    first, second = ({p.name: p.read_bytes() for p in r.glob("*.png")} for r in runs)
    assert first == second and len(first) == n_epochs + 1  # and real.png
    first, second = ((run / "losses.csv").read_text().splitlines() for run in runs)
    assert first[0].endswith(",seconds") and len(first) == len(second) == n_epochs + 1
    for line, other in zip(first, second, strict=True):
        assert line.rpartition(",")[0] == other.rpartition(",")[0]


# Each of the flags with each of the values is an error that has these words in it.
BAD_VALUES = [
    ("--epochs --batch-size --k --z-dim --image-size", "0 -1", "1 or more"),
    ("--g-hidden --d-hidden", "0 -1", "1 or more"),
    ("--lr", "0 -0.1 nan inf 1e999", "above 0"),
    ("--beta1 --ema --dropout --label-noise", "-0.1 1 nan", "from 0 to below 1"),
    ("--real-label", "0 -1 1.1 nan", "above 0, at most 1"),
    ("--g-leak --d-leak --r1", "-0.1 nan inf", "finite number of 0 or more"),
    ("--seed", f"-1 {2**63} {2**64}", "from 0 to 2^63 - 1"),
    ("--epochs --lr --seed", "many", "'many'"),
    ("--device", "tpu cuda:x cuda:-1 cuda:300 cuda:9999999999", "--device"),
    ("--loss", "wasserstein", "minimax"),
    ("--dataset", "nmist", "fashion-mnist"),
    ("--batch-size", "1", "--no-batch-norm"),
]
BAD_ARGUMENTS = [
    (f"{flag} {value}", 2, [flag, value, words])
    for flags, values, words in BAD_VALUES
    for flag in flags.split()
    for value in values.split()
]
BAD_ARGUMENTS += [
    ("--resume used --lr 0.001", 2, ["--lr", "--resume"]),
    ("--resume used --dataset drawn", 2, ["--dataset", "--resume"]),
    ("--resume used --no-batch-norm", 2, ["batch-norm", "--resume"]),
    ("--resume used --out-dir new", 2, ["--out-dir", "--resume"]),
    ("--resume used", 1, ["used/checkpoint.pt"]),
    ("--resume missing --epochs 2", 1, ["missing/checkpoint.pt"]),
    ("--dataset used", 1, ["used", "0 readable images"]),
    ("--dataset lonely", 1, ["lonely", "1 readable image"]),
    ("--out-dir used", 1, ["used", "--resume"]),
    ("--out-dir notes.txt", 1, ["notes.txt"]),
    ("--out-dir notes.txt/run", 1, ["notes.txt", "cannot write"]),
    ("--dataset mnist --data-dir notes.txt", 1, ["mnist", "notes.txt"]),
]


@pytest.mark.parametrize("arguments, code, words", BAD_ARGUMENTS)
def test_bad_arguments(main, images, arguments, code, words):
    Path("lonely").mkdir()
    shutil.copy(images / "00.png", "lonely")
    Path("used/empty").mkdir(parents=True)
    Path("notes.txt").write_text("mine")
    before = contents()
    argv = [*SMALL, "--dataset", images, "--epochs", 1]
    argv = [] if "--resume" in arguments else argv
    result, _, err = main(*argv, *arguments.split())
    assert_one_line(err, *words)
    assert result == code
    assert contents() == before


def write_mnist(folder, n_train=32):
    """The four idx files, of a few training and 16 test images."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in ("train", n_train), ("t10k", 16):
        data = struct.pack(">4i", 0x803, n, 28, 28) + random.Random(n).randbytes(
            n * 784
        )
        (raw / f"{name}-images-idx3-ubyte").write_bytes(data)
        data = struct.pack(">2i", 0x801, n) + bytes(n)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(data)
    return raw


@pytest.mark.parametrize("name", ["train-images-idx3", "t10k-labels-idx1"])
@pytest.mark.parametrize("n_bytes", [-1, 20, 16, 6, 0, "other"])
def test_damaged_mnist(main, tmp_path, name, n_bytes):
    path = write_mnist(tmp_path / "data") / f"{name}-ubyte"
    data = path.read_bytes()
    path.write_bytes(b"\xff" * 400 if n_bytes == "other" else data[:n_bytes])
    before = contents()
    code, _, err = main(*SMALL, "--epochs", 1)  # not --dataset mnist: no drawn instead
    assert code == 1
    assert_one_line(err, tmp_path / "data", "delete")
    assert contents() == before


def test_mnist_run_goes_on_with_mnist_only(main, tmp_path):
    write_mnist(tmp_path / "data")
    code, out, err = main(*SMALL, "--epochs", 1)
    assert (code, err) == (0, "") and "log-likelihood" in out
    Path("data").rename("moved")
    code, out, err = main("--resume", RUN, "--data-dir", "moved", "--epochs", 2)
    assert (code, err) == (0, "") and "epoch 2/2" in out
    for folder, words in ("moved", "delete"), ("empty", "go online"):
        os.truncate("moved/MNIST/raw/train-images-idx3-ubyte", 100)
        code, _, err = main("--resume", RUN, "--data-dir", folder, "--epochs", 3)
        assert code == 1  # and no drawn digits in its place
        assert_one_line(err, tmp_path / folder, words)


def test_offline_run_goes_on_with_drawn(main, tmp_path):
    code, out, err = main(*SMALL, "--epochs", 1)
    assert code == 0 and "64 images [1, 28, 28] of drawn" in out
    assert_one_line(err, "warning", "mnist", tmp_path / "data", "drawn")
    shutil.rmtree("data")
    write_mnist(tmp_path / "data")  # back online, but the run stays what it was
    code, out, err = main("--resume", RUN, "--epochs", 2)
    assert (code, err) == (0, "") and "64 images [1, 28, 28] of drawn" in out
    assert main(*SMALL, "--dataset", "drawn", "--epochs", 2)[0] == 0
    assert_same_runs()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist", "cifar10"])
def test_offline_with_a_named_data_set(main, tmp_path, name):
    code, _, err = main(*SMALL, "--dataset", name)
    assert code == 1 and not Path("runs").exists()
    assert_one_line(err, name, tmp_path / "data", "go online")


def test_folder_of_images_and_other_files(main, images):
    shutil.copytree(images, "mixed")
    Path("mixed/notes.txt").write_text("not an image")
    Path("mixed/empty.jpg").touch()
    Path("mixed/cut.png").write_bytes((images / "00.png").read_bytes()[:-30])
    Path("mixed/more").mkdir()
    shutil.copy(images / "00.png", "mixed/more")  # folders within are searched, too
    code, out, err = main(*SMALL, "--dataset", "mixed", "--epochs", 1)
    assert code == 0 and "65 images [1, 8, 8]" in out
    assert_one_line(err, "warning", "mixed", "3 ")
    assert load(RUN)["settings"]["dataset"] == str(Path("mixed").resolve())
    # One more image, and the run cannot go on with its own data any longer.
    Image.new("RGB", (9, 5), "red").save("mixed/red.png")
    before = contents()
    code, _, err = main("--resume", RUN, "--epochs", 2)
    assert code == 1 and contents() == before
    assert_one_line(err.splitlines(keepends=True)[-1], "mixed", "65 images")
    # A single image in colour makes all of them three channels.
    code, out, _ = main(*SMALL, "--dataset", "mixed", "--epochs", 1)
    assert code == 0 and "66 images [3, 8, 8]" in out


@pytest.mark.parametrize("good_epochs", [0, 2])
@pytest.mark.parametrize("cause", ["loss", "lr"])
def test_diverged(main, images, monkeypatch, good_epochs, cause):
    argv, train_epoch = [*SMALL, "--dataset", images], train_gan.train_epoch

    def diverge(args, images, epoch, *more, **parts):
        if epoch > good_epochs and cause == "loss":
            infinite = {args.loss: lambda logits: logits.sum() + torch.inf}
            patch.setattr(train_gan, "G_LOSSES", infinite)
        elif epoch > good_epochs:
            parts["opt_G"].param_groups[0]["lr"] = 1e38
        return train_epoch(args, images, epoch, *more, **parts)

    with monkeypatch.context() as patch:
        patch.setattr(train_gan, "train_epoch", diverge)
        code, out, err = main(*argv, "--epochs", 3)
    assert code == 1 and out.count("min left") == good_epochs
    assert_one_line(err, f"epoch {good_epochs + 1} ", "diverged", "--lr")
    assert load_generator(RUN)(torch.zeros(2, 4)).isfinite().all()
    assert (RUN / "training.gif").exists() == bool(good_epochs)
    # What is safe is as if nothing had gone wrong.
    assert len(load(RUN)["history"]) == good_epochs == len([*RUN.glob("epoch_*")])
    assert main("--resume", RUN, "--epochs", 3)[0] == 0
    assert main(*argv, "--epochs", 3)[0] == 0
    assert_same_runs()


def test_lr_of_1e38_diverges(main, images):
    code, _, err = main(*SMALL, "--dataset", images, "--lr", 1e38, "--epochs", 2)
    assert code == 1
    assert_one_line(err, "diverged", "--lr")


@pytest.mark.parametrize(
    "extra",
    [
        "--k 1",
        "--dropout 0.3 --label-noise 0.1 --k 2",
        "--k 3 --loss minimax --ema 0 --beta1 0.5 --no-batch-norm --g-leak 0 --r1 0",
    ],
)
def test_resume_is_bit_for_bit(main, images, extra):
    argv = [*SMALL, "--dataset", images, *extra.split()]
    assert main(*argv, "--epochs", 3)[0] == 0
    assert main(*argv, "--epochs", 1)[0] == 0
    (OTHER_RUN / "losses.csv").unlink()  # it is written anew
    code, out, err = main("--resume", OTHER_RUN, "--epochs", 3)
    assert (code, err) == (0, "") and "epoch 2/3" in out and "epoch 1/3" not in out
    assert_same_runs()
    assert Image.open(OTHER_RUN / "training.gif").n_frames > 1


def test_nothing_left_to_train(main):
    score = re.compile("log-likelihood of test images: .* nats")
    first = main(*SMALL, "--dataset", "drawn", "--epochs", 1)[1]
    before = {**load(RUN), "settings": None}
    table = (RUN / "losses.csv").read_bytes()
    (RUN / "losses.csv").unlink()
    code, out, err = main("--resume", RUN)
    assert (code, err) == (0, "") and "nothing left to train" in out
    assert score.search(out)[0] == score.search(first)[0]
    assert plain({**load(RUN), "settings": None}) == plain(before)
    assert (RUN / "losses.csv").read_bytes() == table


class Malicious:
    """Makes a folder when something unpickles it that runs code."""

    def __reduce__(self):
        return os.mkdir, ("marker",)


def cut(state, part, name):
    tensor = state[part][name]
    return {**state, part: {**state[part], name: tensor[..., :-1].clone()}}


# From the bytes and the content of a checkpoint, what is to be in its place.
WRONG = {
    "half": lambda data, state: data[: len(data) // 2],
    "a byte less": lambda data, state: data[:-1],
    "empty": lambda data, state: b"",
    "random": lambda data, state: random.Random(0).randbytes(len(data)),
    "cut pickle": lambda data, state: b"J",
    "text": lambda data, state: b"epoch,loss_D\n1,2\n",
    "pickle": lambda data, state: pickle.dumps({"settings": {}}),
    "malicious pickle": lambda data, state: pickle.dumps(Malicious()),
    "malicious": lambda data, state: Malicious(),
    "malicious among ours": lambda data, state: {**state, "more": Malicious()},
    "tensor": lambda data, state: torch.zeros(3),
    "list": lambda data, state: [state],
    "foreign": lambda data, state: {"model": state["G"], "epoch": 3},
    "foreign settings": lambda data, state: {"settings": {"dataset": "drawn"}},
    "weight": lambda data, state: cut(state, "G", "net.0.weight"),
    "bias of D": lambda data, state: cut(state, "D", "net.0.bias"),
    "average": lambda data, state: cut(state, "G_average", "net.0.weight"),
    "noise": lambda data, state: {**state, "fixed_z": state["fixed_z"][:, 1:].clone()},
}


@pytest.mark.parametrize("wrong", [*WRONG, *KEYS])
def test_wrong_checkpoint(main, images, wrong):
    assert main(*SMALL, "--dataset", images, "--epochs", 1)[0] == 0
    path, state = RUN / "checkpoint.pt", load(RUN)
    if wrong in WRONG:
        state = WRONG[wrong](path.read_bytes(), state)
    else:
        del state[wrong]
    path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
    if "malicious" in wrong:  # it does run code, where it is let in
        with suppress(RuntimeError):
            torch.load(path, weights_only=False)
        Path("marker").rmdir()
    before = contents()
    code, _, err = main("--resume", RUN, "--epochs", 2)
    assert code == 1
    assert_one_line(err, path)
    assert contents() == before  # with no marker in it


# Of a run of 2 epochs: checkpoint, CSV, real.png; twice picture, checkpoint, CSV; GIF.
@pytest.mark.parametrize("good_writes", [0, 1, 2, 6, 7, 8, 9])
def test_full_disk(main, images, monkeypatch, good_writes):
    argv, fsync, left = [*SMALL, "--dataset", images], os.fsync, [None] * good_writes

    def full(file):
        fsync(file)
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left.pop()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = main(*argv, "--epochs", 2)
    assert code == 1
    assert_one_line(err, "No space left on device")
    assert not [*Path().rglob("*.tmp")]
    if good_writes < 3:  # before the first batch: as if it had never been started
        assert not [*Path("runs").iterdir()]
        return
    assert load_generator(RUN)(torch.zeros(2, 4)).isfinite().all()
    assert len(load(RUN)["history"]) == (1 if good_writes < 8 else 2)
    assert main("--resume", RUN, "--epochs", 3)[0] == 0
    assert main(*argv, "--epochs", 3)[0] == 0
    assert_same_runs()


def test_write_never_changes_a_file_in_place(tmp_path):
    path, same_file = tmp_path / "file", tmp_path / "same file"
    path.write_bytes(b"old")
    same_file.hardlink_to(path)
    train_gan.write(path, b"new")
    assert path.read_bytes() == b"new" and same_file.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [path, same_file]


def start(*argv):
    """The program as a process of its own, in the working folder."""
    return subprocess.Popen(
        [sys.executable, train_gan.__file__, *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    """Return as soon as the process has made the file."""
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


def test_killed_at_random_moments(main, images):
    argv, delays = [*SMALL, "--dataset", images, "--epochs", 40], random.Random(0)
    commands, reached = [argv, ["--resume", RUN], ["--resume", RUN]], 0
    for command in commands:
        process = start(*command)
        wait_for(RUN / f"epoch_{reached + 1:03}.png", process)
        time.sleep(delays.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL and process.stderr.read() == ""
        reached = len(load(RUN)["history"])
    assert reached < 40
    assert main("--resume", RUN)[0] == 0
    assert main(*argv)[0] == 0
    assert_same_runs()
    assert not [*RUN.glob("*.tmp")]


def test_ctrl_c(main, images):
    # Not ignored in the process, even where pytest itself runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = Path("my runs/one")
    process = start(*SMALL, "--dataset", images, "--epochs", 9999, "--out-dir", run)
    wait_for(run / "epoch_002.png", process)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1].lstrip()
    assert process.returncode == 130
    assert_one_line(err)
    safe, command = re.fullmatch(r".*epoch (\d+) is safe: (.*)\n", err).groups()
    epochs = int(safe)
    assert epochs <= len(load(run)["history"]) <= epochs + 1
    assert Image.open(run / "training.gif").n_frames > 0
    python, program, *argv = shlex.split(command)
    assert (python, program, argv) == ("python", "train_gan.py", ["--resume", str(run)])
    assert f"epoch {epochs + 2}/{epochs + 2} " in main(*argv, "--epochs", epochs + 2)[1]


def test_ctrl_c_before_the_first_epoch(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.MNIST", interrupted)
    monkeypatch.setattr(sys, "argv", ["train_gan.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(train_gan.__file__, run_name="__main__")
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_runs_started_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    barrier = threading.Barrier(8, timeout=10)

    def save(folder):
        (folder / "checkpoint.pt").write_text(folder.name)
        barrier.wait()  # so that all of them take a number at once

    with ThreadPoolExecutor(8) as pool:
        runs = [*pool.map(lambda _: train_gan.create_run(None, save), range(8))]
    assert sorted(runs) == [Path(f"runs/{n:03}") for n in range(1, 9)]
    assert sorted(Path("runs").iterdir()) == sorted(runs)
    assert len({(run / "checkpoint.pt").read_text() for run in runs}) == 8


# ------------------------------------------------------------------------------- README


README = (Path(train_gan.__file__).parent / "README.md").read_text()
PICTURES = Path(train_gan.__file__).parent / ".github"
COMMANDS = sorted(set(re.findall(r"python train_gan\.py([^`\n]*)", README)))
SYSTEMS = {  # what ../shared/SYSTEMS.md publishes; None: not published
    "A": (
        [64, 128, 256, 512, 1024],
        0.0,
        True,
        [512, 256, 128],
        0.2,
        0.0,
        1e-5,
        128,
        100,
    ),
    "B": (
        [100, 256, 512, 1024],
        0.01,
        False,
        [1024, 512, 256],
        0.01,
        0.2,
        None,
        None,
        None,
    ),
    "C": (None, None, None, None, None, None, None, None, None),
    "D": ([64, 256, 256], 0.0, False, [256, 256], 0.2, 0.0, 2e-4, 100, 300),
    "E": (None, None, None, None, None, None, None, None, 40),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_five_systems_of_the_readme(system, monkeypatch, images):
    """Their networks, loss and optimiser by flags alone, and they run."""
    g, g_leak, norm, d, d_leak, dropout, lr, batch_size, epochs = SYSTEMS[system]
    row = re.search(
        rf"^\| {system}\. .*`python train_gan.py (.*)` \|$", README, re.MULTILINE
    )
    argv = shlex.split(row[1])
    built = {}

    def spy(args, images, epoch, **parts):
        built.update(parts)
        return train_epoch(args, images, epoch, **parts)

    train_epoch = train_gan.train_epoch
    monkeypatch.setattr(train_gan, "train_epoch", spy)
    shutil.copytree(images, "my_photos")
    data_set = [] if system == "C" else ["--dataset", "drawn"]
    train_gan.main([*argv, "--epochs", "1", "--device", "cpu", *data_set])
    nets = (built["G"], g, 784, g_leak, norm), (built["D"], d, 1, d_leak, False)
    for net, widths, out, leak, has_norm in nets:
        if widths is None:
            continue
        widths = [784, *widths, out] if out == 1 else [*widths, out]
        linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
        assert [m.in_features for m in linear] == widths[:-1]
        assert linear[-1].out_features == out
        hidden = ["Linear", *["BatchNorm1d"] * has_norm, "LeakyReLU"]
        hidden += ["Dropout"] * bool(dropout)
        kinds = [type(m).__name__ for m in net.net]
        last = ["Linear", "Tanh"] if out == 784 else ["Linear"]
        assert kinds == hidden * (len(widths) - 2) + last
        slopes = {m.negative_slope for m in net.net if isinstance(m, nn.LeakyReLU)}
        assert slopes == {leak}
        rates = {m.p for m in net.net if isinstance(m, nn.Dropout)}
        assert rates == ({dropout} if dropout else set())
    for optimiser in built["opt_G"], built["opt_D"]:
        assert type(optimiser) is torch.optim.Adam
        (group,) = optimiser.param_groups
        assert group["betas"] == (0.9, 0.999) and group["lr"] == (lr or 2e-4)
    args = settings(*argv, *data_set)
    assert args.batch_size == (batch_size or 128) and args.epochs == (epochs or 40)
    assert (args.loss, args.k, args.real_label) == ("non-saturating", 1, 1.0)
    assert (args.ema, args.r1) == (0.0, 0.0), "none of them has either"
    assert (args.label_noise > 0) == (system == "C")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme(main, images, command):
    """One epoch of each, on a few images."""
    shutil.copytree(images, "my_photos")
    argv = command.split()
    if "--resume" in argv:
        assert main("--dataset", "drawn", "--epochs", 1)[0] == 0
        argv += ["--epochs", 2]
    else:
        data_set = [] if "my_photos" in argv else ["--dataset", "drawn"]
        argv += ["--epochs", 1, *data_set]
    code, out, err = main(*argv, "--device", "cpu")
    assert (code, err) == (0, "") and "epoch " in out


def test_the_benchmark_of_the_readme(monkeypatch, capsys):
    """In this process and on 21 batches, of which it leaves out the first 20."""
    write_mnist(Path("data"), 21 * 128)
    path = Path(train_gan.__file__).with_name(".ci") / "benchmark.py"
    assert "python .ci/benchmark.py" in README
    monkeypatch.setattr(subprocess, "run", lambda command, **_: run(command[2:]))
    run = train_gan.main
    monkeypatch.setattr(sys, "argv", [str(path), "--rounds", "1"])
    runpy.run_path(str(path))
    assert "times as fast" in capsys.readouterr().out


def test_the_code_beside_algorithm_1_is_in_the_files():
    section = README[README.index("| Algorithm 1 of") :].split("\n\n")[0]
    folder = Path(train_gan.__file__).parent
    code = "".join((folder / f"{n}.py").read_text() for n in ("train_gan", "losses"))
    quotes = re.findall(r"`([^-`][^`]*)`", section)  # no flags
    assert len(quotes) > 8
    for quote in quotes:
        parts = quote.removeprefix("losses.").removesuffix(")").split("...")
        assert all(part in code for part in parts), quote


def test_the_pictures_of_the_readme_are_there_and_small():
    folder = Path(train_gan.__file__).parent
    shown = re.findall(r"!\[.+\]\((.+)\)", README)
    assert sorted(shown) == sorted(f".github/{p.name}" for p in PICTURES.iterdir())
    assert sum((folder / path).stat().st_size for path in shown) < 1.5e6


def test_the_python_of_the_readme(monkeypatch):
    """Each fenced block, one after the other, beside a run."""
    train_gan.main(["--dataset", "drawn", "--epochs", "2", *TINY])
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        if "pandas" in block:
            if not all(map(importlib.util.find_spec, ("pandas", "matplotlib"))):
                continue  # neither is needed for anything else
            monkeypatch.setenv("MPLBACKEND", "agg")
        exec(block, names)  # noqa: S102
    assert Image.open("samples.png").size == (4 * 30 + 2, 4 * 30 + 2)
    assert Image.open("walk.png").size == (10 * 30 + 2, 32)


def test_the_readme_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        train_gan.main(["--help"])
    flags = set(re.findall(r"(--[a-z][a-z0-9-]*)", capsys.readouterr().out))
    flags -= {"--help"}
    table = README[README.index("## All flags") :]
    missing = {flag for flag in flags if f"`{flag}`" not in table}
    assert not missing and len(flags) > 24
