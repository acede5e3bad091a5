"""What a GAN must satisfy: python -m pytest test_gan.py (no network, no GPU, 30 s)."""

import copy
import csv
import io
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from math import log, pi
from pathlib import Path

import pytest
import torch
from PIL import Image

import losses
import train_gan
from models import Discriminator, Generator, load_generator

README = Path(train_gan.__file__).with_name("README.md").read_text(encoding="utf-8")
SMALL = "--z-dim 4 --g-hidden 8 --d-hidden 8 --batch-size 16 --device cpu "
PHOTOS = SMALL + "--dataset photos --image-size 8 "


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """An empty folder to work in, no network, few digits, a folder of 64 images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gan, "DRAWN_TRAIN", 320)
    monkeypatch.setattr(train_gan, "DRAWN_TEST", 16)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: 1 / 0)
    Path("photos").mkdir()
    for number in range(64):
        pixels = random.Random(number).randbytes(64)
        Image.frombytes("L", (8, 8), pixels).save(f"photos/{number:02}.png")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def run(capsys):
    """Runs the program: exit code, standard output, and at most one line of errors."""

    def run_main(line):
        code = 0
        try:
            train_gan.main(shlex.split(line))
        except SystemExit as stop:
            code = stop.code or 0
        if isinstance(code, str):  # Python prints it, and exits with 1
            code = print(code, file=sys.stderr) or 1
        out, err = capsys.readouterr()
        assert err.count("\n") <= 1 and ("error: " in err) == (code > 0), err
        return code, out, err

    return run_main


def settings(line=""):
    return train_gan.parse_args(line.split())[0]


def state_of(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def table(folder):
    with Path(folder, "losses.csv").open() as file:
        return [{**row, "seconds": 1.0} for row in csv.DictReader(file)]


def assert_same_runs(*folders):
    """Equal weights, optimisers, pictures, and losses.csv but for its seconds."""
    files = [io.BytesIO(), io.BytesIO()]
    for folder, file in zip(folders, files):
        state = state_of(folder)
        parts = [state[name] for name in ("G", "D", "G_average", "opt_G", "opt_D")]
        torch.save(parts, file)
    assert files[0].getvalue() == files[1].getvalue(), "weights or optimisers differ"
    one, other = (
        {p.name: p.read_bytes() for p in Path(f).glob("*.png")} for f in folders
    )
    assert one == other and len(one) > 1 and table(folders[0]) == table(folders[1])


# ------------------------------------------------------------------------------ losses


def value_and_gradients(loss, *logits):
    logits = [x.clone().requires_grad_() for x in logits]
    value = loss(*logits)
    return [value, *torch.autograd.grad(value, logits)]


def check_logarithms(ours, written_out, *logits):
    """Equal values and gradients; finite and right where D is rounded to 0 or 1."""
    D = [(1 / (1 + torch.exp(-x.double()))).requires_grad_() for x in logits]
    expected = written_out(*D)
    slopes = [g * p * (1 - p) for g, p in zip(torch.autograd.grad(expected, D), D)]
    for found, right in zip(value_and_gradients(ours, *logits), [expected, *slopes]):
        assert torch.allclose(found, right, 1e-10, 1e-12)
    for dtype in torch.float32, torch.bfloat16:
        huge = [torch.tensor([[-1e4], [0.0], [1e4]], dtype=dtype)] * len(logits)
        value, gradient, *_ = value_and_gradients(ours, *huge)
        assert value.isfinite() and value.abs() > 1600 and gradient.isfinite().all()


@pytest.mark.parametrize("label", [1.0, 0.9, 0.3])
def test_losses_are_the_logarithms_of_the_paper(label):
    real, fake = 3 * torch.randn(2, 5, 1, dtype=torch.float64)
    check_logarithms(
        lambda r, f: losses.discriminator_loss(r, f, label),
        lambda r, f: (
            -(label * r.log() + (1 - label) * (1 - r).log() + (1 - f).log()).mean()
        ),
        *(real, fake),
    )
    check_logarithms(losses.generator_loss, lambda f: -f.log().mean(), fake)
    check_logarithms(
        losses.minimax_generator_loss, lambda f: (1 - f).log().mean(), fake
    )


def test_proposition_1_the_optimal_D_is_stationary():
    """At D* = p_data / (p_data + p_g), V = -log 4 + 2 JSD (Theorem 1)."""
    p_data, p_g = torch.tensor([[50, 30, 15, 5], [10, 20, 30, 40]])

    def loss(logit):  # 100 samples of each, in the proportions of the distributions
        real, fake = logit.repeat_interleave(p_data), logit.repeat_interleave(p_g)
        return losses.discriminator_loss(real, fake)

    optimum = (p_data.double() / p_g).log()  # the logit of D*
    value, gradient = value_and_gradients(loss, optimum)
    jsd = sum((p / 200 * (2 * p / (p_data + p_g)).log()).sum() for p in (p_data, p_g))
    assert value.item() == pytest.approx(log(4) - 2 * jsd.item())
    assert gradient.abs().max() < 1e-12
    assert (value_and_gradients(loss, optimum + 0.1)[1] > 1e-4).all(), "no minimum"


def test_r1_penalty_is_half_the_squared_jacobian():
    D = Discriminator((6, 5), (1, 2, 3)).double()
    x = torch.randn(4, 1, 2, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(D, x, create_graph=True)
    expected = sum(jacobian[i, 0, i].square().sum() for i in range(4)) / 4 / 2
    penalty, weights = losses.r1_penalty(D, x), [D.net[0].weight, D.net[2].weight]
    assert penalty.item() == pytest.approx(expected.item()) and not x.requires_grad
    pairs = zip(*(torch.autograd.grad(value, weights) for value in (penalty, expected)))
    assert all(torch.allclose(a, b) and a.any() for a, b in pairs)


# ---------------------------------------------------------------------------- networks


def layers(net):
    """A network in words, such as "3-4 BatchNorm1d leak=0.0 4-784 Tanh"."""
    words = {"Linear": "{0.in_features}-{0.out_features}", "Dropout": "dropout={0.p}"}
    words["LeakyReLU"] = "leak={0.negative_slope}"
    names = [(type(layer).__name__, layer) for layer in net.net]
    return " ".join(words.get(name, name).format(layer) for name, layer in names)


def test_networks_follow_from_their_arguments():
    G = Generator(3, [4, 5], (3, 2, 2), True, 0.1, 0.0)
    D = Discriminator([6], (3, 2, 2), 0.3, 0.5)
    norm = "BatchNorm1d leak=0.0"
    hidden = f"{norm} dropout=0.1"
    assert layers(G) == f"3-4 {hidden} 4-5 {hidden} 5-12 Tanh"
    assert layers(D) == "12-6 leak=0.5 dropout=0.3 6-1"
    assert layers(Generator(3, [4], (2,), False)) == "3-4 leak=0.0 4-2 Tanh"
    assert layers(Generator()) == f"64-256 {norm} 256-512 {norm} 512-784 Tanh"
    assert layers(Discriminator()) == "784-512 leak=0.2 512-256 leak=0.2 256-1"
    assert G.net[0].bias is None and D.net[0].bias is not None
    x = G.eval()(100 * torch.randn(50, 3))
    assert x.shape == (50, 3, 2, 2) and -1 <= x.min() < -0.5 and 0.5 < x.max() <= 1
    assert torch.equal(D.eval()(x), D(x.flatten(1))) and D(x).shape == (50, 1)
    assert D(1000 * x).abs().max() > 1, "D must return logits, not probabilities"


# ---------------------------------------------------------------------------- the game


def the_tutorials_way(args, images):
    """The same game, naively: sigmoids, separate passes, gradients for everyone."""
    torch.manual_seed(args.seed)
    torch.randn(64, args.z_dim)  # the noise of the pictures
    more = args.batch_norm, args.dropout, args.g_leak
    G = Generator(args.z_dim, args.g_hidden, (1, 4, 4), *more)
    D = Discriminator(args.d_hidden, (1, 4, 4), args.dropout, args.d_leak)
    average, betas = copy.deepcopy(G), (args.beta1, 0.999)
    opt_G = torch.optim.Adam(G.parameters(), args.lr, betas)
    opt_D = torch.optim.Adam(D.parameters(), args.lr, betas)

    def bce(p, label):
        noise = 2 * torch.rand_like(p) - 1 if args.label_noise else 0
        y = label + args.label_noise * noise
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()

    rows, D_steps, G_steps = [], 0, 0
    for epoch in range(1, args.epochs + 1):
        torch.manual_seed(1_000_003 * args.seed + epoch)
        order, D_log, G_log = torch.randperm(30), [], []
        for i, (first, last) in enumerate([(0, 8), (8, 16), (16, 23), (23, 30)], 1):
            x = images[order[first:last]].double() / 255 * 2 - 1
            fake = G(torch.randn(len(x), args.z_dim))
            if args.dropout:  # whose masks are drawn for both halves at once
                real_p, fake_p = D(torch.cat([x, fake.detach()])).sigmoid().chunk(2)
            else:
                real_p, fake_p = D(x).sigmoid(), D(fake.detach()).sigmoid()
            loss_D = bce(real_p, args.real_label) + bce(fake_p, 0.0)
            right = (real_p > 0.5).sum() + (fake_p < 0.5).sum()
            D_log += [[loss_D, real_p.mean(), fake_p.mean(), right / 2 / len(x)]]
            D_steps += 1
            if D_steps % 4 == 0 and args.r1:  # gamma / 2 |grad|^2, image by image
                for logit in D(x.requires_grad_()).flatten():
                    (slope,) = torch.autograd.grad(logit, x, create_graph=True)
                    loss_D = loss_D + 4 * args.r1 / 2 * slope.square().sum() / len(x)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()
            if i % args.k and i != 4:
                continue
            p = D(fake).sigmoid()
            loss_G = (1 - p).log().mean() if args.loss == "minimax" else -p.log().mean()
            opt_G.zero_grad()
            loss_G.backward()
            opt_G.step()
            G_log += [[loss_G, p.mean()]]
            G_steps += 1
            decay = min(args.ema, (1 + G_steps) / (10 + G_steps))
            for name, weight in G.state_dict().items():
                if "num_batches" not in name:
                    mean = average.state_dict()[name]
                    mean.copy_(decay * mean + (1 - decay) * weight)
        loss_D, D_x, D_G_z1, acc_D = torch.tensor(D_log).mean(0).tolist()
        loss_G, D_G_z2 = torch.tensor(G_log).mean(0).tolist()
        rows.append([epoch, loss_D, loss_G, D_x, D_G_z1, D_G_z2, acc_D, 1.0])
    return {"G": G, "D": D, "G_average": average}, rows


GAMES = """--seed 1
--loss minimax --k 3 --dropout 0.3 --real-label 0.9 --label-noise 0.05 --d-leak 0.1
--no-batch-norm --r1 0 --ema 0 --g-leak 0.2 --lr 0.01 --beta1 0.5 --k 2
--r1 20 --ema 0.3"""


@pytest.mark.parametrize("flags", GAMES.splitlines())
def test_whole_runs_equal_the_tutorials_way(flags):
    """Algorithm 1 and all that is added: every weight, average and CSV column."""
    torch.set_default_dtype(torch.float64)
    images = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8)
    small = "--epochs 4 --batch-size 7 --z-dim 3 --g-hidden 6 5 --d-hidden 7 "
    args = settings(small + flags)
    folder, average = train_gan.train(args, "cpu", images)
    nets, rows = the_tutorials_way(args, images)
    for name, net in nets.items():
        for key, value in net.state_dict().items():
            close = torch.allclose(state_of(folder)[name][key], value, 1e-9, 1e-11)
            assert close or "num_batches" in key, (name, key)
    for ours, theirs in zip(table(folder), rows, strict=True):
        assert [*ours] == train_gan.COLUMNS
        assert [*map(float, ours.values())] == pytest.approx(theirs, abs=1e-6)
    assert not average.training and not average.net[0].weight.requires_grad


def built(line):
    """G, D and the optimisers that the flags lead to."""
    seen, train_epoch = [], train_gan.train_epoch
    with pytest.MonkeyPatch.context() as patch:
        spy = lambda *game: seen.append(game[3:]) or train_epoch(*game)  # noqa: E731
        patch.setattr(train_gan, "train_epoch", spy)
        images = torch.randint(0, 256, (32, 1, 28, 28), dtype=torch.uint8)
        train_gan.train(settings(line + " --epochs 1"), "cpu", images)
    (G, D, _, opt_G, opt_D) = seen[0]
    return layers(G), layers(D), opt_G.defaults, opt_D.defaults


def test_the_recipe_is_what_the_readme_describes(monkeypatch):
    values = "auto data None None None 64 [256, 512] [512, 256] True 0.0 0.0 0.2 "
    values += "non-saturating 1 1.0 0.0 1.0 40 128 0.001 0.0 0.9999 0 auto"
    assert " ".join(map(str, vars(settings()).values())) == values
    assert (train_gan.R1_EVERY, train_gan.SAVE_EVERY) == (4, 100)
    mine = []  # a loss of one's own is used
    monkeypatch.setattr(losses, "generator_loss", lambda x: mine.append(x) or x.mean())
    *nets, G_defaults, D_defaults = built("")
    assert nets == [layers(Generator()), layers(Discriminator())] and mine
    assert G_defaults["betas"] == D_defaults["betas"] == (0.0, 0.999)
    with pytest.raises(TypeError, match="uint8"):
        train_gan.train(settings(), "cpu", torch.zeros(4, 1, 2, 2))


def test_an_epoch_never_waits_for_the_device():
    """On `meta`, where there are no values, only an epoch's last line can fail."""
    G = Generator(4, [8], (1, 4, 4)).to("meta")
    D = Discriminator([8], (1, 4, 4)).to("meta")
    optimisers = [torch.optim.SGD(net.parameters(), 0.1) for net in (G, D)]
    images = torch.empty(40, 1, 4, 4, dtype=torch.uint8, device="meta")
    game = settings(SMALL), images, 1, G, D, copy.deepcopy(G), *optimisers
    with pytest.raises(RuntimeError, match="meta") as stop:
        train_gan.train_epoch(*game)
    frame = next(entry for entry in stop.traceback if entry.name == "train_epoch")
    assert "return {" in str(frame.statement)


# ------------------------------------------------------------- evaluation and the data


def test_parzen_is_the_written_out_mixture():
    """log 1/n sum_i N(x; s_i, sigma^2), with the sigma that is best for other images."""
    grey, test = (torch.randint(90, 160, (n, 1, 1, 2)).byte() for n in (1000, 30))
    dark = torch.randint(0, 3, (9500, 1, 1, 2)).byte()
    train = torch.cat([dark[:500], grey, dark[500:]])  # the first of the last 10,000
    G = Generator(2, [3], (1, 1, 2)).eval()
    torch.set_float32_matmul_precision("medium")
    before = torch.get_rng_state()
    mean, error = train_gan.parzen(G, train, test)
    assert torch.equal(before, torch.get_rng_state()), "noise of its own"
    assert torch.get_float32_matmul_precision() == "highest"
    z = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    centres = (G(z).detach().double().flatten(1) + 1) / 2

    def log_p(x, sigma):
        square = (x.double().view(-1, 1, 2) / 255 - centres).square().sum(2)
        return (torch.exp(-square / 2 / sigma**2) / (2 * pi * sigma**2)).mean(1).log()

    sigmas = [10 ** (-1 + i / 9) for i in range(10)]
    best = max(sigmas, key=lambda sigma: log_p(grey, sigma).mean())
    assert mean == pytest.approx(log_p(test, best).mean().item(), abs=1e-4)
    assert error == pytest.approx(log_p(test, best).std().item() / 30**0.5, rel=1e-3)


def test_drawn_digits_are_the_same_every_time_and_all_different():
    train, test = train_gan.draw_digits()
    torch.manual_seed(2)
    assert torch.equal(train, train_gan.draw_digits()[0]) and train.dtype == torch.uint8
    assert train.shape == (320, 1, 28, 28) and test.shape == (16, 1, 28, 28)
    assert len({x.numpy().tobytes() for x in torch.cat([train, test])}) > 330
    ink = torch.stack([train[digit::10].float().mean((0, 1)) for digit in range(10)])
    assert ink[:, 8:20, 8:20].mean() > 100 > 4 > ink[:, :, [0, 27]].mean(), "centred"
    assert train[2::3].float().mean() > 1.3 * train[::3].float().mean(), "some are bold"


@pytest.mark.parametrize("channels, shape", [((), "1, 5, 7"), ((3,), "3, 5, 7")])
def test_named_data_sets_become_images_by_channels(run, monkeypatch, channels, shape):
    class Fake:
        def __init__(self, root, train, download):
            assert (root, download, socket.getdefaulttimeout()) == ("data", True, 10)
            self.data = pixels[:48] if train else pixels[48:]

    pixels = torch.randint(0, 256, (64, 5, 7, *channels)).byte().numpy()
    monkeypatch.setitem(train_gan.DATASETS, "mnist", Fake)
    code, out, _ = run(SMALL + "--epochs 1")
    assert code == 0 and f"[48, {shape}] of mnist" in out and " nats" in out
    train, test = train_gan.load_data(settings())
    back = torch.cat([train, test]).permute(0, 2, 3, 1).reshape(pixels.shape)
    assert (back.numpy() == pixels).all() and len(test) == 16
    assert socket.getdefaulttimeout() is None


def test_a_folder_of_images_is_cropped_and_grey_where_all_are(run):
    wide = Image.new("RGB", (30, 10))
    wide.paste((255, 255, 255), (10, 0, 20, 10))
    Path("photos/deeper").mkdir()
    wide.save("photos/deeper/wide.png")
    shutil.copytree("photos", "photos/.trash")
    Path("photos/cut.png").write_bytes(Path("photos/00.png").read_bytes()[:-30])
    os.chdir("photos")
    for folder in "runs/001", "runs/002":  # does not train on the first one's samples
        code, out, err = run(PHOTOS.replace("photos", ".") + "--epochs 1")
        assert code == 0 and f"{folder}: images [65, 1, 8, 8]" in out
        assert out.startswith("reading the images in .") and "1 unreadable" in err
        assert "cut.png" in err
    images, test = train_gan.load_folder(".", None)
    assert images.shape == (65, 1, 28, 28) and not test
    assert (images[-1, 0, :, 2:-2] == 255).all(), "the middle of the wide one"
    Image.new("RGB", (4, 4), (255, 100, 0)).save("red.png")
    red = train_gan.load_folder(".", 8)[0][-1]
    assert red.flatten(1).T.unique(dim=0).tolist() == [[255, 100, 0]]


def test_unusual_images_keep_what_they_show():
    for mode in "I;16", "I", "F":  # shown by their own range
        image = Image.new(mode, (16, 1))
        for i in range(16):
            image.putpixel((i, 0), 1000 + 100 * i)
        image.save("ramp.tiff")
        pixels = [*train_gan.read_image("ramp.tiff").convert("L").tobytes()]
        assert pixels == pytest.approx([i * 17 for i in range(16)], abs=1)
    Image.new("F", (4, 4), 3.0).save("flat.tiff")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save("clear.png")
    shown = [set(train_gan.read_image(f).tobytes()) for f in ("flat.tiff", "clear.png")]
    assert shown == [{0}, {255}], "transparent pixels on white"
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    Image.new("RGB", (800, 400)).save("photo.jpg", exif=exif)
    sizes = [train_gan.read_image("photo.jpg", size).size for size in (None, (50, 50))]
    assert sizes == [(400, 800), (50, 50)]


# ----------------------------------------------------------------------------- the run


def test_a_run_from_end_to_end(run):
    argv = (
        SMALL + "--dataset drawn --batch-size 3 --epochs 2 --dropout 0.2 --g-leak 0.3 "
    )
    code, out, err = run(argv)
    lines = out.splitlines()
    assert (code, err) == (0, "") and all(len(line) <= 80 for line in lines)
    assert lines[1].split() == [*train_gan.COLUMNS, "left"]
    assert [line.split()[0] for line in lines[2:4]] == ["1/2", "2/2"]
    assert re.fullmatch(
        r"log-likelihood of test images: \S+ \+- \d+\.\d nats", lines[4]
    )
    names = (
        "checkpoint.pt epoch_00001.png epoch_00002.png losses.csv real.png training.gif"
    )
    assert sorted(os.listdir("runs/001")) == names.split()
    assert run(argv + "--out-dir else/where")[0] == run(argv + "--seed 1")[0] == 0
    assert_same_runs("runs/001", "else/where")
    assert table("runs/001") != table("runs/002")
    for path in "runs/001", Path("runs/001/checkpoint.pt"):  # the averaged generator
        G, average = load_generator(path), state_of("runs/001")["G_average"]
        assert layers(G) == "4-8 BatchNorm1d leak=0.3 dropout=0.2 8-784 Tanh"
        assert not G.training and G.z_dim == 4 and not G.net[0].weight.requires_grad
        assert all(torch.equal(G.state_dict()[key], average[key]) for key in average)
    torch.manual_seed(0)  # whose samples of the same noise the pictures show
    samples, real = G(torch.randn(64, 4)), train_gan.draw_digits()[0][:64] / 255
    for name, x in ("epoch_00002", samples / 2 + 0.5), ("real", real):
        train_gan.utils.save_image(x, "grid.png", nrow=8)
        assert (
            Path("grid.png").read_bytes() == Path(f"runs/001/{name}.png").read_bytes()
        )


@pytest.mark.parametrize(
    "flags", ["", "--dropout 0.3 --label-noise 0.1 --k 2 --seed 5 "]
)
def test_a_resumed_run_ends_as_one_that_was_not_cut_off(run, flags):
    argv = PHOTOS + flags + "--device cuda:15 --epochs "
    assert run(PHOTOS + flags + "--epochs 100")[0] == 0
    assert "warning: no cuda:15, training on" in run(argv + "25")[2]
    os.link("runs/002/checkpoint.pt", "checkpoint.pt")
    code, out, err = run(argv + "100 --resume runs/002/checkpoint.pt")
    assert code == 0 and " 50/100 " in out and " 25/100 " not in out
    assert_same_runs("runs/001", "runs/002")
    assert run("--resume runs/002 --epochs 1")[0] == 0
    assert state_of("runs/002")["settings"]["epochs"] == 100
    pictures = [
        f"epoch_{epoch:05}.png" for epoch in (25, 50, 75, 100)
    ]  # 100 steps each
    assert sorted(os.listdir("runs/001"))[1:5] == pictures
    assert len(table("runs/001")) == 100, "a line for every epoch"
    assert len(state_of(".")["history"]) == 25, "a checkpoint is never changed in place"


def start(argv):
    """The program as a process of its own, its output in a pipe that has no umlauts."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, train_gan.__file__, *shlex.split(argv)]
    return subprocess.Popen(command, env=env, **pipes)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(run):
    argv = PHOTOS + "--batch-size 2 --epochs 40 "
    for line in argv + "--out-dir rün", "--resume rün":
        process = start(line)
        while "/40 " not in process.stdout.readline():  # a line for each save, at once
            assert process.poll() is None, process.stderr.read()
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.communicate()
    assert len(table("rün")) < 40 and run(argv)[0] == run("--resume rün")[0] == 0
    assert_same_runs("runs/001", "rün")
    assert not [*Path("rün").glob("*.tmp")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal for a process")
def test_ctrl_c_saves_the_last_whole_epoch(run):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for the process, too
    process = start(PHOTOS + "--epochs 99999 --out-dir 'my runs/one'")
    while "25/99999" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    (line,) = re.findall(r"^stopped; go on with: python train_gan.py (.*)$", err, re.M)
    assert process.returncode == 130 and line == '--resume "my runs/one"'
    done = len(table("my runs/one"))
    assert Path(f"my runs/one/epoch_{done:05}.png").exists()
    assert f" {done + 1}/{done + 1} " in run(f"{line} --epochs {done + 1}")[1]


def test_runs_started_together_never_share_a_folder():
    images, args = torch.zeros(2, 1, 2, 2), [settings() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        [*pool.map(lambda one: train_gan.open_run(one, images, None, {}), args)]
    assert sorted(one.resume for one in args) == [f"runs/00{n}" for n in range(1, 9)]


def test_the_gif_has_at_most_100_sound_pictures(tmp_path):
    for n in range(1, 251):
        Image.new("L", (8, 8), n).save(f"epoch_{n:05}.png")
    for last, frames in (250, 84), (101, 51), (100, 100), (1, 1):
        [path.unlink() for path in sorted(tmp_path.glob("epoch*"))[last:]]
        train_gan.write_gif(tmp_path)
        gif = Image.open("training.gif")
        gif.seek(frames - 1)
        assert gif.n_frames == frames and gif.info.get("duration", 3000) == 3000
        assert gif.convert("L").getpixel((0, 0)) == pytest.approx(last, abs=2)
    Path("epoch_00001.png").write_bytes(b"damaged")
    train_gan.write_gif(tmp_path)


# --------------------------------------------------------------------- what goes wrong


BAD_FLAGS = """epochs k z-dim image-size g-hidden d-hidden | 0 -1 1.5 many | above 0
batch-size | 0 1 | above 1 and below inf
lr | 0 -0.1 nan inf | above 0 and below inf
beta1 ema dropout label-noise | -0.1 1 nan | above 0 and below 1
real-label | 0 1.1 nan | above 0 and below 1
g-leak d-leak r1 | -0.1 nan inf | above 0 and below inf
seed | -1 9223372036854775808 0.5 | above -1 and below 9223372036854775808
g-hidden | 10,20 | (10 20, not 10,20)
device | tpu cuda:x cuda:-1 | --device
loss | wasserstein | minimax
dataset | nmist | fashion-mnist
image-size | 28 | --image-size: leave it out
resume runs/001 --lr | 0.1 | --lr is 0.001 in this run
resume runs/001 --out-dir | new | --out-dir is None"""


def test_bad_flags_are_one_line_and_exit_code_2(run):
    assert run(PHOTOS + "--epochs 1")[0] == 0
    before = Path("runs/001/checkpoint.pt").read_bytes()
    for line in BAD_FLAGS.splitlines():
        flags, values, words = line.split(" | ")
        for flag in [flags] if "resume" in flags else flags.split():
            for value in values.split():
                code, out, err = run(f"--{flag} {value}")
                assert (code, out) == (2, "") and words in err, (flag, value, err)
    assert os.listdir("runs") == ["001"]
    assert Path("runs/001/checkpoint.pt").read_bytes() == before


BAD_FILES = f"""--dataset lonely | lonely: 1 readable images
{PHOTOS} --out-dir photos | photos is there
{PHOTOS} --out-dir notes.txt/run | notes.txt
--resume photos | photos/checkpoint.pt is missing
--dataset mnist --data-dir notes.txt | notes.txt
--dataset fashion-mnist | no fashion-mnist in --data-dir data: go online
--dataset cifar10 | no cifar10 in
{PHOTOS} --epochs 1 --lr 1e38 | epoch 1 diverged: start anew with a lower --lr"""


def test_bad_files_are_one_line_and_exit_code_1(run):
    Path("notes.txt").write_text("mine")
    Path("lonely").mkdir()
    shutil.copy("photos/00.png", "lonely")
    for line in BAD_FILES.splitlines():
        flags, words = line.split(" | ")
        code, _, err = run(flags)
        assert code == 1 and words in err, (flags, err)
    assert Path("notes.txt").read_text() == "mine"
    code, _, err = run(SMALL + "--epochs 1")  # without --dataset mnist
    assert code == 0 and err.startswith(
        "warning: no mnist in --data-dir data: go online"
    )
    assert state_of("runs/002")["settings"]["dataset"] == "drawn"


class Malicious:
    """Makes a folder when something unpickles it that runs code."""

    def __reduce__(self):
        return os.mkdir, ("marker",)


def test_damaged_and_foreign_checkpoints_are_refused(run):
    assert run(PHOTOS + "--epochs 1")[0] == 0
    path, state = Path("runs/001/checkpoint.pt"), state_of("runs/001")
    data, own = path.read_bytes(), state["settings"]
    wrong = [data[: len(data) // 2], data[:-1], b"", b"text", pickle.dumps(Malicious())]
    wrong += [{**state, "more": Malicious()}, [state], {"model": 1}, {"settings": own}]
    wrong += [{**state, "settings": value} for value in (1, {}, {"lr": 1.0})]
    for content in wrong:
        path.write_bytes(content) if type(content) is bytes else torch.save(
            content, path
        )
        code, _, err = run("--resume runs/001 --epochs 2")
        assert code == 1 and f"{path} is missing, damaged or foreign" in err, err
        assert not Path("marker").exists()


def test_changed_data_and_edited_networks_are_told_from_damage(run):
    assert run(PHOTOS + "--epochs 1 --data-dir photos")[0] == 0
    assert settings("--resume runs/001").data_dir == "photos"
    path, state = "runs/001/checkpoint.pt", state_of("runs/001")
    for part in "G", "D", "G_average", "opt_D":
        torch.save({**state, part: state["opt_G"]}, path)
        code, _, err = run("--resume runs/001 --epochs 2")
        assert code == 1 and "data or models.py changed" in err, err
    torch.save(state, path)
    Path("photos/00.png").rename("00.png")
    code, _, err = run("--resume runs/001 --epochs 2")
    assert code == 1 and "images [63, 1, 8, 8], not [64, 1, 8, 8]" in err
    Path("00.png").rename("photos/00.png")
    Path("photos").rename("moved")
    assert "--dataset photos: no folder" in run("--resume runs/001 --epochs 2")[2]
    assert run("--resume runs/001 --epochs 2 --dataset moved")[0] == 0
    assert run("--resume runs/001 --epochs 3")[0] == 0, "the new place is kept"
    assert settings("--resume runs/001").data_dir == "data", "looked for here"


def test_a_full_disk_leaves_the_last_checkpoint_whole(run, monkeypatch):
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(fsync(file))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = run(PHOTOS + "--epochs 75")
    assert code == 1 and "No space left on device" in err
    assert run("--resume runs/001")[0] == run(PHOTOS + "--epochs 75")[0] == 0
    assert_same_runs("runs/001", "runs/002")
    assert not [*Path("runs/001").glob("*.tmp")]


def test_any_standard_output_will_do_and_a_table_that_excel_has_open(
    monkeypatch, capsys
):
    lines, path_open = [], Path.open

    def locked(path, *args, **more):
        if path.name == "losses.csv":
            raise PermissionError
        return path_open(path, *args, **more)

    class Log:
        write = lines.append

    monkeypatch.setattr(Path, "open", locked)
    for stdout in Log, None:
        monkeypatch.setattr(sys, "stdout", stdout)
        folder, G = train_gan.main(shlex.split(PHOTOS + "--epochs 1"))
        assert Path(folder, "checkpoint.pt").exists() and not G.training
    assert any("loss_D" in line for line in lines)
    assert "cannot write runs/001/losses.csv" in capsys.readouterr().err


# ------------------------------------------------------------------------------- README


# Layers of G and D, Adam's rate, batch size and epochs, where they are published
SYSTEMS = """A;64-128-256-512-1024-784 BatchNorm1d leak=0.0;784-512-256-128-1 leak=0.2;\
1e-05 128 100
B;100-256-512-1024-784 leak=0.01 dropout=0.2;784-1024-512-256-1 leak=0.01 dropout=0.2;
C;;;
D;64-256-256-784 leak=0.0;784-256-256-1 leak=0.2;0.0002 100 300
E;;;0.0002 128 40"""


@pytest.mark.parametrize("system", SYSTEMS.splitlines())
def test_the_five_systems_of_the_readme(system):
    """Their networks, loss and optimiser, by flags alone."""
    name, *nets, numbers = system.split(";")
    (flags,) = re.findall(
        rf"^\| {name}\. .*`python train_gan.py (.*)` \|$", README, re.M
    )
    args = settings(flags.replace("my_photos", "photos"))
    *found, opt_G, opt_D = built(flags.replace("my_photos", "photos"))
    for published, layers_found in zip(nets, found):
        widths, *hidden = published.split() or [""]
        pairs = zip(widths.split("-"), widths.split("-")[1:])
        words = f" {' '.join(hidden)} ".join(f"{a}-{b}" for a, b in pairs)
        assert not published or layers_found.removesuffix(" Tanh") == words
    assert numbers in ("", f"{args.lr} {args.batch_size} {args.epochs}")
    for defaults in opt_G, opt_D:
        assert (defaults["lr"], defaults["betas"]) == (args.lr, (0.9, 0.999))
    assert (args.loss, args.k, args.real_label) == ("non-saturating", 1, 1.0)
    assert (args.ema, args.r1, args.label_noise > 0) == (0.0, 0.0, name == "C")


def test_every_command_of_the_readme(run, monkeypatch):
    """One epoch of each, on a few images."""
    monkeypatch.setattr(train_gan, "parzen", lambda *_: (0.0, 0.0))
    Path("photos").rename("my_photos")
    for command in sorted(set(re.findall(r"python train_gan\.py([^`\n#]*)", README))):
        resumed = "--resume" in command and run("--dataset drawn --epochs 1")[0] == 0
        data = "" if resumed or "my_photos" in command else "--dataset drawn"
        if "--help" not in command:
            line = f"{command} {data} --epochs {1 + resumed} --device cpu"
            code, out, err = run(line)
            assert (code, err) == (0, "") and f" {1 + resumed}/" in out, command
        shutil.rmtree("runs", ignore_errors=True)


def test_the_python_of_the_readme(run, monkeypatch):
    """Every block, one after the other, beside a run; no plots without pandas."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert run(SMALL + "--dataset drawn --epochs 2")[0] == 0
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S):
        if "import pandas" in block:
            pytest.importorskip("pandas")
        exec(block, names)
    assert Image.open("samples.png").size == (4 * 30 + 2, 4 * 30 + 2)


def test_the_flags_and_pictures_of_the_readme_exist():
    named = set(re.findall(r"(?<=`)--([a-z][a-z0-9-]+)", README)) - {
        "help",
        "index-url",
    }
    flags = {name.replace("_", "-") for name in vars(settings())} | {"no-batch-norm"}
    assert named <= flags, named - flags
    for path in re.findall(r"\((\.github/.+?)\)", README):
        assert (Path(train_gan.__file__).parent / path).stat().st_size < 300_000
