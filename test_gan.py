"""Tests of the GAN: python -m pytest test_gan.py (no network, no GPU; two minutes)."""

import copy
import csv
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

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
    calls = []

    def penalty(D, x):
        calls.append(len(x))
        return sum(p.square().sum() for p in D.parameters())

    monkeypatch.setattr(losses, "r1_penalty", penalty)
    images = torch.randint(0, 256, (90, 1, 4, 4), dtype=torch.uint8)
    argv = ["--epochs", "1", "--batch-size", "10", *TINY]
    for r1, expected in ("0", []), ("0.5", [10, 10]):
        calls.clear()
        train_gan.train(settings(*argv, "--r1", r1), torch.device("cpu"), images)
        assert calls == expected
    assert float(rows("runs/002")[0]["loss_D"]) > float(rows("runs/001")[0]["loss_D"])


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
            if any(b is None or not torch.equal(a, b) for a, b in zip(v, before[k]))
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
    assert out.count("epoch 3/3") == 3 and "nats" in out and "\rbatch" not in out
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
    """sigma of 0.1 .. 1 by the validation images, then log mean_i N(x; s_i, sigma^2)."""

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


def no_network(*_, **__):
    raise OSError("<urlopen error no network>")


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
    assert "--device cuda:2" in capsys.readouterr().err


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
    assert "\rbatch 1 of 9 " in capsys.readouterr().out
