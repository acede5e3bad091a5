"""What a GAN must satisfy: python -m pytest test_gan.py (no network, no GPU, 30 s).

The tests stand in the order of a course. One part alone: -k test_losses_ (or networks,
step, evaluation, data, run, resume or command_line in its place).
"""

import copy
import csv
import io
import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy
import torch
from PIL import Image
from pytest import approx, fixture, importorskip, mark, raises
from torch import distributions, nn
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

import losses
import train_gan
from models import Discriminator, Generator, load_generator
from train_gan import load_checkpoint, load_folder

SMALL = "--z-dim 4 --g-hidden 8 --d-hidden 8 --batch-size 16 --device cpu"
PHOTOS = f"{SMALL} --dataset photos"
RUN = Path("runs/001")
pytestmark = mark.filterwarnings("error:::(train_gan|models|losses|argparse)")


@fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """An empty folder with 64 photos of noise, short epochs, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gan, "EPOCH_IMAGES", 64)
    monkeypatch.setattr(train_gan, "DRAWN", [210, 16])
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=OSError("no network")))
    torch.manual_seed(0)
    save_pictures("photos", torch.randint(0, 256, (64, 28, 28)))


@fixture(autouse=True)
def modules_stay_as_they_are():
    """A test may put its own functions into a module. They are taken out again."""
    modules = [losses, train_gan, torch.cuda]
    before = [dict(vars(module)) for module in modules]
    torch.set_float32_matmul_precision("highest")
    yield
    for module, names in zip(modules, before):
        vars(module).update(names)


def save_pictures(folder, pictures):
    os.mkdir(folder)
    for n, pixels in enumerate(pictures):
        pixels = torch.as_tensor(pixels).byte().numpy()
        Image.fromarray(pixels).save(f"{folder}/{n:02}.tiff")


def run(flags, expected_code=0):
    """Run the program in this process. Returns all that it prints."""
    text = io.StringIO()
    code = 0
    with redirect_stdout(text), redirect_stderr(text):
        try:
            train_gan.main(shlex.split(flags))
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # Python prints such a text, and exits with 1
                code = print(code) or 1
    assert code == expected_code, text.getvalue()
    return text.getvalue()


def info_of(folder):
    return json.loads(Path(folder, "run.json").read_text())


def table_of(folder):
    with open(f"{folder}/losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- losses ---------------------------------------------------------------------------
def test_losses_by_hand():
    """For a pocket calculator: D(x) = 0.8 is logit log(0.8 / 0.2), D(G(z)) = 0.4."""
    real, fake = torch.tensor(1.3863), torch.tensor(-0.4055)
    loss_D = float(losses.discriminator_loss(real, fake))
    loss_G = float(losses.generator_loss(fake))
    assert round(loss_D, 4) == 0.734, f"D's {loss_D} is not -log 0.8 - log(1 - 0.4)"
    assert round(loss_G, 4) == 0.9163, f"G's loss {loss_G} is not -log 0.4"


LOSSES = {  # as functions of the logits, and on paper, as functions of p = D(...)
    "D": (
        lambda x: losses.discriminator_loss(x[0], x[1], 0.9),
        lambda p: -(0.9 * p[0].log() + 0.1 * (1 - p[0]).log() + (1 - p[1]).log()),
    ),
    "G": (losses.generator_loss, lambda p: -p.log()),
    "minimax": (losses.minimax_generator_loss, lambda p: (1 - p).log()),
}


@mark.parametrize("name", LOSSES)
def test_losses_are_the_logarithms_of_the_paper(name):
    loss, paper = LOSSES[name]
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    values = [loss(logits), paper(logits.sigmoid()).mean()]
    assert_close(*values, msg=f"the value of {name}'s loss is not the paper's")
    gradients = [torch.autograd.grad(value, logits) for value in values]
    assert_close(*gradients, msg=f"the gradient of {name}'s loss is not the paper's")
    assert loss(1e4 * logits).isfinite(), "not finite where D is very sure"


def test_losses_teach_D_where_it_is_surely_wrong():
    logits = torch.tensor([-30.0, 30.0], requires_grad=True)  # of real, of fake
    losses.discriminator_loss(*logits).backward()
    assert logits.grad[0] < 0, "no slope where D takes a real image for fake"
    assert logits.grad[1] > 0, "no slope where D takes a fake image for real"


def test_losses_draw_noisy_labels_from_both_sides():
    labels = losses.make_labels(torch.zeros(999), 1.0, 0.1)
    assert 0.9 <= labels.min() < 0.91, "the lowest label is not label - noise"
    assert 1.09 < labels.max() <= 1.1, "the highest label is not label + noise"


def test_losses_r1_is_half_the_squared_slope_of_a_linear_D():
    slope = torch.randn(6, requires_grad=True)
    penalty = losses.r1_penalty(lambda x: x @ slope, torch.rand(3, 6))
    assert_close(penalty, slope.square().sum() / 2, msg="R1 is not |slope|^2 / 2")
    penalty.backward()
    assert_close(slope.grad, slope.detach(), msg="D cannot learn from it: create_graph")


def learn(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def play_toy_game(lr_G):
    """The smallest GAN: G(z) = a z + b begins as N(1, 0.5); the data are N(-1, 0.5)."""
    D = nn.Sequential(nn.Linear(1, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    G = nn.Linear(1, 1)
    nn.init.constant_(G.weight, 0.5)
    nn.init.constant_(G.bias, 1)
    opt_D = torch.optim.Adam(D.parameters(), 2e-3, (0.0, 0.999))
    opt_G = torch.optim.Adam(G.parameters(), lr_G, (0.0, 0.999))
    for _ in range(2000):
        x = torch.randn(256, 1) / 2 - 1
        fake = G(torch.randn(256, 1))
        learn(losses.discriminator_loss(D(x), D(fake.detach())), opt_D)
        learn(losses.generator_loss(D(fake)), opt_G)
    return D, G.weight.item(), G.bias.item()


def test_losses_lead_D_to_p_over_p_plus_q():
    """Goodfellow et al. 2014, proposition 1. Here p / (p + q) is 1 / (1 + exp(8 x))."""
    D, _, _ = play_toy_game(lr_G=0)
    x = torch.tensor([[-0.2], [0.0], [0.2]])
    best = 1 / (1 + torch.exp(8 * x))
    assert_close(D(x).sigmoid(), best, rtol=0, atol=0.1, msg="D is not p / (p + q)")


def test_losses_lead_G_to_the_real_density():
    _, spread, mean = play_toy_game(lr_G=2e-3)
    assert mean == approx(-1, abs=0.15), "the mean of G's numbers is not the data's"
    assert abs(spread) == approx(0.5, abs=0.15), "their deviation is not the data's"


# --- networks -------------------------------------------------------------------------
def test_networks_D_returns_logits_not_probabilities():
    logits = Discriminator()(1000 * torch.randn(20, 1, 28, 28))
    assert logits.shape == (20, 1), "D must give one number for each image"
    assert logits.abs().max() > 1, "D must not end in a sigmoid"


def test_networks_are_the_mlps_of_their_arguments():
    rest = [nn.LeakyReLU(0.1, inplace=True), nn.Dropout(0.2)]
    hidden = [nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), *rest]
    G = nn.Sequential(*hidden, nn.Linear(4, 12), nn.Tanh())
    D = nn.Sequential(nn.Linear(12, 4), *rest, nn.Linear(4, 1))
    ours = Generator(3, [4], (3, 2, 2), True, 0.2, 0.1)
    assert repr(ours.net) == repr(G), "G has other layers"
    ours = Discriminator([4], (3, 2, 2), 0.2, 0.1)
    assert repr(ours.net) == repr(D), "D has other layers"


def test_networks_without_arguments_are_those_without_flags():
    args = train_gan.parse_args([])
    shape, rest = (1, 28, 28), [args.batch_norm, args.dropout, args.g_leak]
    G = Generator(args.z_dim, args.g_hidden, shape, *rest)
    D = Discriminator(args.d_hidden, shape, args.dropout, args.d_leak)
    assert repr(Generator().net) == repr(G.net), "Generator() is another G"
    assert repr(Discriminator().net) == repr(D.net), "Discriminator() is another D"


# --- one step and one epoch: train_epoch ----------------------------------------------
def make_game(flags="", shape=(64, 1, 28, 28)):
    """All that train_epoch takes, with images of noise, in the fourth epoch."""
    torch.manual_seed(0)
    G = Generator(64, [8], shape[1:], True, 0.0, 0.0)
    D = Discriminator([8], shape[1:])
    return SimpleNamespace(
        args=train_gan.parse_args(f"--batch-size 16 {flags}".split()),
        images=torch.randint(0, 256, shape, dtype=torch.uint8),
        epoch=4,
        G=G,
        D=D,
        G_ema=copy.deepcopy(G).eval().requires_grad_(False),
        opt_G=torch.optim.SGD(G.parameters(), 0.1),
        opt_D=torch.optim.SGD(D.parameters(), 0.1),
    )


def play(game):
    return train_gan.train_epoch(**vars(game))


def naive_epoch(args, images, epoch, G, D, G_ema, opt_G, opt_D):
    """As tutorials write it: a pass for each half, and gradients for everyone."""
    torch.manual_seed(args.seed * 1_000_003 + epoch)
    n = len(images)
    n_shown = max(n, train_gan.EPOCH_IMAGES)
    order = torch.cat([torch.randperm(n) for _ in range(math.ceil(n_shown / n))])
    batches = order[:n_shown].tensor_split(n_shown // args.batch_size)
    step = (epoch - 1) * len(batches)
    for batch in batches:
        step += 1
        x = images[batch] / 255 * 2 - 1
        fake = G(torch.randn(len(x), args.z_dim))
        loss_D = losses.discriminator_loss(D(x), D(fake.detach()))
        if step % 4 == 0:
            loss_D = loss_D + 4 * args.r1 * losses.r1_penalty(D, x)
        learn(loss_D, opt_D)
        if step % args.k == 0:
            learn(losses.generator_loss(D(fake)), opt_G)
            G_steps = step // args.k
            decay = min(args.ema, (1 + G_steps) / (10 + G_steps))
            for name, old in G_ema.state_dict().items():
                if old.is_floating_point():  # all but BatchNorm's count of batches
                    old.copy_(decay * old + (1 - decay) * G.state_dict()[name])


@mark.parametrize(
    "flags, shape",
    [
        ("--k 2 --r1 3 --batch-size 21 --seed 4", (64, 1, 28, 28)),
        ("--ema 0.3", (30, 1, 28, 28)),
        ("", (64, 3, 28, 28)),
    ],
    ids=["k", "average, few images", "colour"],
)
def test_step_by_step_equals_the_naive_loop(flags, shape):
    ours, naive = make_game(flags, shape), make_game(flags, shape)
    play(ours)
    naive_epoch(**vars(naive))
    for part in ("D", "G", "G_ema"):
        states = [getattr(game, part).state_dict() for game in (ours, naive)]
        assert_close(*states, rtol=1e-3, atol=1e-4, msg=f"{part} differs")


def test_step_of_D_ends_at_the_fakes():
    game = make_game("--r1 0")
    inputs = []
    game.D.register_forward_pre_hook(lambda D, x: inputs.extend(x))
    with suppress(RuntimeError):  # PyTorch's, where G's step has lost its graph
        play(game)
    assert not inputs[0].requires_grad, "D's step goes on into G: detach() the fakes"


@mark.parametrize("name", ["D", "G"])
def test_step_clears_the_gradients_of_the_last_step(name):
    game = make_game()
    weights = list(getattr(game, name).parameters())
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e9)
    play(game)
    largest = max(weight.grad.max() for weight in weights)
    assert largest < 1e6, f"zero_grad: {name}'s old gradients are still there"


@mark.parametrize("one, other", [("D", "G"), ("G", "D")])
def test_step_of_one_network_does_not_move_the_other(one, other):
    game = make_game()
    getattr(game, f"opt_{other}").step = Mock()
    before = copy.deepcopy(list(getattr(game, other).parameters()))
    play(game)
    after = list(getattr(game, other).parameters())
    assert_close(after, before, msg=f"{one}'s step moved {other}")


def test_step_of_G_comes_after_each_k_steps_of_D_also_across_epochs():
    steps = []
    for epoch in (1, 2, 3):
        game = make_game("--k 3")  # an epoch has four steps of D
        game.epoch = epoch
        game.opt_D.step = lambda: steps.append("D")
        game.opt_G.step = lambda: steps.append("G")
        play(game)
    assert "".join(steps) == "DDDG" * 4, "k must count over all epochs"


def test_step_of_G_learns_through_the_updated_D():
    """D(x) is 0.6 for all images, by its last bias alone. Its update makes it 0.75."""
    game = make_game("--r1 0 --batch-size 64")
    weights = list(game.D.parameters())
    for weight in weights:
        nn.init.zeros_(weight)
    nn.init.constant_(weights[-1], math.log(0.6 / 0.4))
    game.opt_D.step = lambda: nn.init.constant_(weights[-1], math.log(3))
    means = play(game)
    assert means["D_x"] == approx(0.6), "the logged D_x is not the sigmoid of D's logit"
    before, after = torch.tensor([math.log(0.6 / 0.4), math.log(3)])  # D's logits
    assert means["loss_D"] == approx(float(losses.discriminator_loss(before, before)))
    assert means["loss_G"] == approx(float(losses.generator_loss(after)))
    assert means["acc_D"] == 0.5, "acc_D is not 0.5, though D says real of all images"
    assert means["D_G_z1"] == approx(0.6), "D_G_z1 is not from before D's update"
    assert means["D_G_z2"] == approx(0.75), "D_G_z2 is not from after D's update"


def test_step_logs_the_loss_of_D_without_r1():
    """Each epoch is one step here. The penalty is in the fourth."""
    plain = make_game("--batch-size 64 --r1 0")
    steep = make_game("--batch-size 64 --r1 100")
    assert play(plain)["loss_D"] == play(steep)["loss_D"], "loss_D includes R1"


def test_step_logs_tensors_and_numbers():
    log = defaultdict(list, mine=[1, torch.tensor(2.0), numpy.float64(6)])
    train_gan.defaultdict = lambda kind: log
    mean = play(make_game())["mine"]
    assert mean == 3, "a column of the log is not the mean of its values"
    assert type(mean) is float, "a mean that is no plain number cannot be saved"


def times_shown(n_images, flags):
    """How often an epoch shows each image."""
    args = train_gan.parse_args(flags.split())
    batches = train_gan.shuffled_batches(args, torch.zeros(n_images))
    return torch.cat(batches).bincount().tolist()


def test_epoch_shows_every_image_once():
    assert times_shown(100, "--batch-size 30") == [1] * 100


@mark.parametrize("flags, n", [("--batch-size 9", 64), ("--k 3 --batch-size 30", 90)])
def test_epoch_shows_few_images_again_and_all_of_them_equally_often(flags, n):
    times = times_shown(7, flags)
    assert sum(times) == n, "not EPOCH_IMAGES, or not enough for one step of G"
    assert max(times) - min(times) <= 1, f"unequally often: {times}"


# --- evaluation -----------------------------------------------------------------------
def test_evaluation_is_a_mixture_of_gaussians_around_the_samples():
    """Sigma suits the first 1,000 of the last 10,000 training images, here black."""
    images = torch.full((10_500, 2), 150)
    images[500:1500] = validation = torch.tensor([[0, 0]])
    test = torch.randint(0, 256, (30, 2))
    samples = 0.4 + 0.4 * torch.rand(50, 2)

    def log_density(images, sigma):
        windows = distributions.Normal(samples, sigma)
        densities = windows.log_prob(images[:, None] / 255).sum(2).exp()
        return densities.mean(1).log()

    sigmas = torch.logspace(-1, 0, 10)
    best = max(sigmas, key=lambda sigma: log_density(validation, sigma))
    assert 0.5 < best < 0.7, "the best sigma of this test should be one in the middle"
    scores = log_density(test, best)
    torch.set_float32_matmul_precision("medium")  # as the training leaves it
    mean, error = train_gan.parzen(samples, images, test)
    assert mean == approx(float(scores.mean()), abs=1e-4), "not of the best mixture"
    expected = float(scores.std()) / math.sqrt(30)
    assert error == approx(expected, rel=1e-4), "not std / sqrt(n)"
    assert torch.get_float32_matmul_precision() == "highest", "products are rounded"


def test_evaluation_scales_10_000_samples_to_the_images():
    """Each of two pixels is 0.2 in G's range, 153 of 255: the best sigma is 0.1."""
    images = torch.full((9001, 2), 153)
    G = Mock(side_effect=lambda z: 0 * z[:, :2] + 0.2)
    mean, _ = train_gan.score(G, 3, images, images[:5])
    expected = -math.log(2 * math.pi * 0.1**2)
    assert mean == approx(expected, rel=1e-3), "samples must be scaled to [0, 1]"
    assert G.call_args.args[0].shape == (10_000, 3), "not 10,000 samples"


# --- data -----------------------------------------------------------------------------
def test_data_keeps_colours_is_cropped_to_a_square_and_lies_on_white():
    colour, wide, transparent = [[255, 100, 0]], [5, 1, 1, 5], [[255, 0, 0, 0]]
    save_pictures("mine", [[colour * 2] * 2, [wide] * 2, [transparent * 2] * 2])
    pixels = load_folder("mine", 2)[:, :, 1, 1].tolist()
    assert pixels == [[255, 100, 0], [1, 1, 1], [255, 255, 255]]


def test_data_is_turned_as_the_camera_was():
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.linear_gradient("L").save("photo.png", exif=turned)  # black above white
    pixels = train_gan.load_image("photo.png", 2)
    assert pixels[0, 0, 0] > pixels[0, 1, 0], "the photo is upside down"


RGB_OF_16_BITS = bytes.fromhex(  # a PNG of one pixel: 65535, 32768, 1000
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d0000000f494441"
    "54789c63f8ffbf8181f905000dea036a33b0259b0000000049454e44ae426082"
)


def test_data_of_16_bits_a_colour_keeps_the_upper_8():
    Path("deep.png").write_bytes(RGB_OF_16_BITS)
    assert train_gan.load_image("deep.png", 1).flatten().tolist() == [255, 128, 3]


def test_data_refuses_what_it_would_read_wrongly():
    grey = Image.new("I;16", (2, 2))
    grey.save("grey.tiff")
    Image.new("L", (2, 2)).save("stack.tiff", save_all=True, append_images=[grey])
    with raises(ValueError, match="grey with more than 8 bits: convert it to 8"):
        train_gan.load_image("grey.tiff", 4)
    with raises(ValueError, match="several images in one file: save each as a file"):
        train_gan.load_image("stack.tiff", 4)


def test_data_counts_what_it_cannot_read_and_names_the_first(capsys):
    os.truncate("photos/00.tiff", 300)
    for name in ("IMG_0.AAE", "IMG_1.HEIC", "IMG_2.heic", "notes"):
        Path("photos", name).write_text("no picture")
    assert len(load_folder("photos", 4)) == 63
    first = f"The first is {Path('photos', '00.tiff')}: "
    counts = "2 .heic, 1 .tiff, 1 .aae, 1 other"
    assert f"warning: unreadable: {counts}. {first}" in capsys.readouterr().err


def test_data_is_read_from_files_in_all_folders_but_hidden_ones():
    shutil.copytree("photos", "photos/.hidden")
    shutil.copytree("photos", "photos/below/it")
    os.rename("photos/below/it/00.tiff", "photos/.hidden.tiff")
    if hasattr(os, "mkfifo"):  # a named pipe: to open it would wait for ever
        os.mkfifo("photos/pipe.png")
    assert len(load_folder("photos", 2)) == 64 + 63


def test_data_set_has_channels_and_test_images(monkeypatch):
    def mnist(folder, train, download):
        assert download, "on a new machine, nothing is downloaded"
        assert socket.getdefaulttimeout() == 10, "a dead network would hang"
        images = torch.ones(9 if train else 5, 28, 28)
        return SimpleNamespace(data=images, targets=None)

    monkeypatch.setitem(train_gan.DATASETS, "mnist", mnist)
    images, test_images = train_gan.load_data(train_gan.parse_args([]))[1:3]
    assert [images.shape, test_images.shape] == [(9, 1, 28, 28), (5, 1, 28, 28)]
    assert socket.getdefaulttimeout() is None, "the limit of 10 seconds is still on"


def test_data_set_without_internet_is_drawn_and_a_resumed_run_keeps_it():
    text = run(f"{SMALL} --epochs 1")
    assert text.startswith("warning: training on --dataset drawn: no mnist in --data-")
    assert "no network" in text, "the reason is lost"
    os.mkdir("drawn")  # a folder of this name changes nothing
    assert "warning" not in run("--resume runs/001 --epochs 2")


def test_data_drawn_is_white_on_black_and_the_same_at_every_call():
    images, test_images = train_gan.draw_digits()[:2]
    assert len(test_images) == 16
    assert torch.equal(images, train_gan.draw_digits()[0])
    assert 20 < images.float().mean() < 80


# --- a whole run ----------------------------------------------------------------------
def test_run_saves_a_picture_in_every_epoch():
    run(f"{SMALL} --dataset drawn --epochs 3")
    pictures = sorted(path.name for path in RUN.glob("epoch_*"))
    expected = [f"epoch_0000{n}.png" for n in (1, 2, 3)]
    assert pictures == expected, "an epoch has no picture of its own"


def test_run_draws_real_images_and_the_average_of_G_in_eval_mode():
    run(f"{SMALL} --dataset drawn --epochs 1 --dropout 0.3")
    G = load_generator(RUN)
    torch.manual_seed(0)
    samples = G(torch.randn(64, 4)) / 2 + 0.5
    real = train_gan.draw_digits()[0][:64] / 255
    for name, images in {"epoch_00001.png": samples, "real.png": real}.items():
        save_image(images, "expected.png")
        ours, expected = Image.open(RUN / name), Image.open("expected.png")
        pixels = [pil_to_tensor(picture).int() for picture in (ours, expected)]
        message = f"{name}: other images, another grid, or G in training mode"
        assert_close(*pixels, rtol=0, atol=2, msg=message)  # GPUs round


def test_run_takes_numbers_and_returns_its_folder_and_the_average_of_G():
    folder, G = train_gan.main([*PHOTOS.split(), "--epochs", 1, "--lr", 0.1])
    z = torch.randn(5, 4)
    assert folder == RUN
    assert not G.training, "the average of G is not in eval mode"
    assert_close(load_generator(folder)(z), G(z), rtol=0, atol=0)


def test_run_writes_its_history_into_the_table_and_prints_it():
    text = run(f"{PHOTOS} --epochs 2")
    history = load_checkpoint(RUN)["history"]
    table = table_of(RUN)
    values = [{name: float(row[name]) for name in row} for row in table]
    assert values == history, "losses.csv and the checkpoint tell two stories"
    header, _, row = [line.split() for line in text.splitlines()[2:5]]
    assert header == list(table[0]), "the printed names are not the table's columns"
    assert row[:2] == ["2/2", f"{history[1]['loss_D']:.3f}"]
    assert 0 < history[1]["seconds"] < 60


def test_run_keeps_each_value_under_its_name_where_the_columns_change():
    epochs = [{"a": 1.0, "b": 2.0}, {"b": 3.0, "new": 4.0, "a": 5.0}, {"a": 6.0}]
    train_gan.train_epoch = Mock(side_effect=epochs)
    text = run(f"{PHOTOS} --epochs 3")
    table = table_of(RUN)
    assert [row["a"] for row in table] == ["1.0", "5.0", "6.0"]
    assert [row["b"] for row in table] == ["2.0", "3.0", "nan"]
    assert [row["new"] for row in table] == ["", "4.0", "nan"]
    names, values = [line.split() for line in text.splitlines()[4:6]]
    assert values[names.index("new")] == "4.000", "the new column has no name above it"


def test_run_says_at_once_where_its_files_go():
    printed = io.BytesIO()
    train_gan.train = Mock(side_effect=lambda *run: sys.exit(printed.getvalue()))
    with redirect_stdout(io.TextIOWrapper(printed)), raises(SystemExit) as stop:
        train_gan.main(PHOTOS.split())
    assert "photos [64, 1, 28, 28] on" in str(stop.value), "a log stays empty: flush"
    assert f", into {RUN}" in str(stop.value)


def test_run_says_in_json_what_it_was():
    text = run(f"{SMALL} --dataset drawn --device mps --epochs 1")
    info = info_of(RUN)
    assert info["images"] == [210, 1, 28, 28]
    assert f"{info['log_likelihood']:.1f} +- {info['standard_error']:.1f} nats" in text
    assert load_checkpoint(RUN)["args"]["device"] == "mps", "a flag is kept as named"


def test_run_learns():
    flags = "--dataset drawn --batch-size 32 --device cpu"
    run(f"{flags} --lr 0 --epochs 1")
    run(f"{flags} --epochs 20")
    before = info_of("runs/001")["log_likelihood"]
    after = info_of("runs/002")["log_likelihood"]
    assert after > before + 100, f"no better: {before}, then {after} nats"


GAME_FLAGS = ["--z-dim 5", "--g-hidden 9", "--d-hidden 9", "--no-batch-norm", "--k 2"]
GAME_FLAGS += ["--dropout 0.3", "--g-leak 0.2", "--d-leak 0.1", "--loss minimax"]
GAME_FLAGS += ["--real-label 0.9", "--label-noise 0.1", "--r1 0", "--batch-size 7"]
GAME_FLAGS += ["--lr 0.02", "--beta1 0.5", "--ema 0.1", "--seed 1"]


def test_run_is_changed_by_every_flag_of_the_game():
    pictures = {}
    for flag in ["", *GAME_FLAGS]:
        run(f"{PHOTOS} --epochs 1 --lr 0.01 {flag} --out-dir new")
        picture = Path("new/epoch_00001.png").read_bytes()
        assert picture not in pictures, f"{flag} changes nothing"
        pictures[picture] = flag
        shutil.rmtree("new")


def test_run_makes_a_gif_in_the_order_of_the_epochs():
    for grey, epoch in enumerate(["00002", "00010", "99999"]):
        Image.new("L", (8, 8), 100 * grey).save(f"epoch_{epoch}.png")
    train_gan.save_gif(Path())
    with Image.open("training.gif") as gif:
        gif.seek(2)
        assert gif.convert("L").getpixel((0, 0)) == 200, "the last picture is not last"
        assert gif.info["loop"] == 0, "it does not go on for ever"


def test_run_keeps_the_old_gif_where_a_picture_is_damaged():
    run(f"{PHOTOS} --epochs 2")
    before = contents(RUN)["training.gif"]
    Path(RUN, "epoch_00002.png").write_text("half a picture")
    assert "warning: training.gif: " in run("--resume runs/001")
    assert contents(RUN)["training.gif"] == before


def test_run_goes_on_where_excel_locks_the_table(monkeypatch):
    monkeypatch.setattr(Path, "replace", Mock(side_effect=PermissionError("locked")))
    text = run(f"{PHOTOS} --epochs 1")
    assert f"warning: {RUN / 'losses.csv'} stays as it was: locked" in text


def test_run_that_diverges_names_the_epoch_and_writes_the_table():
    text = run(f"{PHOTOS} --lr 1e38", 1)
    assert "epoch 1 diverged: try a lower --lr" in text
    assert [row["epoch"] for row in table_of(RUN)] == ["1"]
    assert not Path(RUN, "checkpoint.pt").exists(), "a broken run would be resumed"


def test_run_stopped_before_its_first_epoch_says_that_nothing_is_saved():
    losses.generator_loss = Mock(side_effect=KeyboardInterrupt)
    assert "warning: stopped; nothing is saved yet" in run(f"{PHOTOS} --epochs 1", 130)
    assert list(contents(RUN)) == ["real.png"], "real images are there at once"
    text = run(f"{PHOTOS} --out-dir runs/001", 1)
    assert f"error: --out-dir {RUN} is not empty: name a new folder\n" in text


def test_run_of_the_script_prints_names_that_the_console_lacks():
    os.mkdir("\u0444")
    command = [sys.executable, train_gan.__file__, "--dataset", "\u0444"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(command, env=ascii_only, stdout=-1, stderr=-1)
    out, err = process.communicate()
    assert b"reading \\u0444 ..." in out
    assert b"0 images, 2 are needed" in err


# --- resume and faults ----------------------------------------------------------------
def test_resume_ends_as_if_never_cut_off():
    """64 images are few here, and the second epoch ends between two steps of G."""
    train_gan.EPOCH_IMAGES = 100
    flags = f"{PHOTOS} --dropout 0.3 --label-noise 0.1 --k 3 --batch-size 14"
    run(f"{flags} --epochs 4")
    run(f"{flags} --epochs 2")
    run("--resume runs/002 --epochs 4")
    whole, resumed = load_checkpoint("runs/001"), load_checkpoint("runs/002")
    for name in ("D", "G", "G_ema", "opt_D", "opt_G"):
        assert_close(resumed[name], whole[name], rtol=0, atol=0, msg=f"{name} differs")
    assert contents("runs/001")["training.gif"] == contents("runs/002")["training.gif"]


def test_resume_takes_new_flags_and_keeps_the_others():
    run(f"{PHOTOS} --k 3 --epochs 1 --out-dir my/run")
    text = run("--resume my/run --epochs 2 --lr 0.5 --beta1 0.3")
    assert info_of("my/run")["k"] == 3
    for optimizer in ("opt_G", "opt_D"):
        (group,) = load_checkpoint("my/run")[optimizer]["param_groups"]
        assert group["lr"] == 0.5, f"{optimizer} has the old learning rate"
        assert group["betas"] == (0.3, 0.999), f"{optimizer} has the old --beta1"
    assert "epoch  loss_D" in text, "the names of the columns are missing"


def test_resume_refuses_flags_that_do_not_fit_and_touches_nothing():
    run(f"{PHOTOS} --epochs 1")
    before = contents(RUN)
    assert "size mismatch" in run("--resume runs/001 --epochs 4 --z-dim 5", 1)
    assert contents(RUN) == before


def test_resume_of_a_finished_run_scores_it_and_keeps_its_flags():
    run(f"{SMALL} --dataset drawn --epochs 1")
    before = info_of(RUN)
    Path(RUN, "run.json").write_text("")
    text = run("--resume runs/001 --lr 0.5 --seed 77 --dataset kmnist")
    assert text.startswith("warning: 1 epochs are done: to go on, add --epochs 2\n")
    assert info_of(RUN) == before, "run.json does not tell what made the weights"


def test_resume_after_ctrl_c():
    train_gan.print_row = Mock(side_effect=[None, KeyboardInterrupt])
    text = run(f"{PHOTOS} --epochs 6", 130)
    assert f'stopped; go on with --resume "{RUN}"' in text
    assert os.path.exists(RUN / "training.gif")
    text = run(f"{PHOTOS} --out-dir runs/001", 1)
    assert f"error: a run is in {RUN}: name a new folder, or --resume it" in text
    text = run("--resume runs/001 --epochs 2")
    assert "warning: 2 epochs are done: to go on, add --epochs 4\n" in text
    assert len(load_checkpoint(RUN)["history"]) == 2, "it has trained on"
    train_gan.train_epoch = Mock(side_effect=KeyboardInterrupt)
    run("--resume runs/001 --epochs 3 --lr 0.5", 130)
    assert info_of(RUN)["lr"] == 0.001, "no epoch was trained with the new rate"


def test_resume_after_a_full_disk_has_the_last_whole_checkpoint():
    resource = importorskip("resource", reason="Windows cannot limit a file's size")
    run(f"{PHOTOS} --epochs 1")
    before = contents(RUN)["checkpoint.pt"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1000, limits[1]))
    with suppress(RuntimeError):  # the words of torch.save, if it writes the file
        run("--resume runs/001 --epochs 2", 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(RUN)["checkpoint.pt"] == before, "not saved as another file first"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("marker",)


@mark.parametrize("content", ["half", {"epoch": 3}, Evil()], ids=type)
def test_resume_refuses_what_is_no_checkpoint(content):
    torch.save(content, "checkpoint.pt")
    if content == "half":
        os.truncate("checkpoint.pt", 300)
    text = run("--resume .", 1)
    assert 'error: no whole run of this version in --resume ".": ' in text
    assert text.count("\n") == 1
    assert not os.path.exists("marker"), "a program in the file was run"


# --- command line ---------------------------------------------------------------------

WRONG = {
    "--k 0": (2, "0 is not in "),
    "--batch-size 1": (2, "1 is not in "),
    "--lr nan": (2, "nan is not in "),
    "--seed -1": (2, "-1 is not in "),
    "--out-dir new --resume runs/001": (2, "not allowed with"),
    "--resume ''": (1, 'error: no whole run of this version in --resume "": '),
    "--out-dir ''": (1, "is not empty"),
    "--dataset cifar10": (1, "['auto', 'mnist', 'fashion-mnist', 'kmnist', 'drawn']"),
    "--data-dir data --dataset mnist": (1, "are its four files in "),
    "--device cdua --dataset photos": (1, "Expected one of cpu, cuda, "),
}


@mark.parametrize("flags", WRONG)
def test_command_line_refuses_in_one_line(flags):
    code, words = WRONG[flags]
    text = run(flags, code)
    assert flags.split()[0] in text, "the flag is not named"
    assert words in text
    assert text.count("\n") == 1


def test_command_line_has_the_defaults_of_the_published_score():
    args = train_gan.parse_args([])
    assert [args.epochs, args.batch_size, args.k, args.seed] == [40, 128, 1, 0]
    assert [args.lr, args.beta1, args.ema, args.r1] == [1e-3, 0.0, 0.9999, 1.0]
    assert [args.real_label, args.label_noise, args.image_size] == [1.0, 0.0, 28]


def test_command_line_takes_the_ends_of_its_ranges():
    args = train_gan.parse_args(["--batch-size=2", "--lr=0", "--seed=4294967295"])
    assert [args.batch_size, args.lr, args.seed] == [2, 0, 2**32 - 1]


def test_command_line_takes_the_best_device(monkeypatch):
    monkeypatch.setattr(torch, "ones", Mock())  # every device works
    monkeypatch.setattr(torch.cuda, "is_available", Mock(side_effect=[True, False]))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    best = [train_gan.choose_device("auto"), train_gan.choose_device("auto")]
    assert best == ["cuda", "mps"], "with a card, and without one"


def test_command_line_takes_the_cpu_where_the_card_cannot_work(monkeypatch):
    """A whole run: Adam, too, would ask a card that is available."""
    ones = torch.ones

    def ones_of_a_broken_card(*sizes, device=None, dtype=None):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel\nimage here. Search for it in")
        return ones(*sizes, dtype=dtype)

    monkeypatch.setattr(torch, "ones", ones_of_a_broken_card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    text = run(f"{PHOTOS} --epochs 1 --device auto")
    reason = "RuntimeError: CUDA error: no kernel image here"
    assert f"warning: cuda cannot be used: {reason}; the CPU is taken\n" in text
