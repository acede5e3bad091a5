"""What a GAN must satisfy: python -m pytest test_gan.py (no network, no GPU, 30 s).

The tests stand in the order of a course. One part alone: -k test_losses_ (or networks,
step, evaluation, data, run, resume, command_line, replay or readme in its place).
"""

import copy
import csv
import importlib
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
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
from models import Discriminator, Generator, load_generator, update_average
from train_gan import load_folder

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(THEORY,) = [block for block in SNIPPETS if "Normal" in block]
SNIPPETS.remove(THEORY)  # it has a test of its own
SMALL = "--z-dim 4 --g-hidden 8 --d-hidden 8 --batch-size 16 --device cpu"
PHOTOS = f"{SMALL} --dataset photos"
RUN = Path("runs/001")
pytestmark = mark.filterwarnings("error:::(train_gan|models|losses|argparse)")


@fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """An empty folder with 64 photos of noise, few digits to draw, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gan, "DRAWN", [210, 16])
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=OSError("no network")))
    torch.manual_seed(0)
    save_pictures("photos", torch.randint(0, 256, (64, 28, 28)))


@fixture(autouse=True)
def modules_stay_as_they_are():
    """A test may put its own functions into our modules. They are taken out again."""
    before = [(module, dict(vars(module))) for module in (losses, train_gan)]
    torch.set_float32_matmul_precision("highest")
    yield
    for module, names in before:
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
            train_gan.main(flags.split())
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # Python prints such a text, and exits with 1
                code = print(code) or 1
    assert code == expected_code, text.getvalue()
    return text.getvalue()


def load(folder):
    return torch.load(f"{folder}/checkpoint.pt", weights_only=True)


def info_of(folder):
    return json.loads(Path(folder, "run.json").read_text())


def table_of(folder):
    with open(f"{folder}/losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- losses ---------------------------------------------------------------------------


def test_losses_by_hand():
    real = torch.tensor(1.3863)  # the logit of D(x) = 0.8, log(0.8 / 0.2)
    fake = torch.tensor(-0.4055)  # the logit of D(G(z)) = 0.4, log(0.4 / 0.6)
    loss_D = float(losses.discriminator_loss(real, fake))
    loss_G = float(losses.generator_loss(fake))
    assert round(loss_D, 4) == 0.734, f"D's {loss_D} is not -log 0.8 - log(1 - 0.4)"
    assert round(loss_G, 4) == 0.9163, f"G's loss {loss_G} is not -log 0.4"


def test_losses_where_D_cannot_tell_are_log_4_and_log_2():
    zeros = torch.zeros(5)
    loss_D = float(losses.discriminator_loss(zeros, zeros))
    loss_G = float(losses.generator_loss(zeros))
    assert loss_D == approx(math.log(4)), "D's loss is not log 4"
    assert loss_G == approx(math.log(2)), "G's loss is not log 2"


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
    assert_close(*values, msg="the value differs")
    gradients = [torch.autograd.grad(value, logits) for value in values]
    assert_close(*gradients, msg="the gradient differs")
    assert loss(1e4 * logits).isfinite(), "not finite where D is very sure"


def test_losses_draw_noisy_labels_from_both_sides():
    labels = losses.labels(torch.zeros(999), 1.0, 0.1)
    assert 0.9 <= labels.min() < 0.91
    assert 1.09 < labels.max() <= 1.1


def test_losses_r1_is_half_the_squared_slope_of_a_linear_D():
    slope = torch.randn(6, requires_grad=True)
    penalty = losses.r1_penalty(lambda x: x @ slope, torch.rand(3, 6))
    assert_close(penalty, slope.square().sum() / 2)
    penalty.backward()
    assert_close(
        slope.grad, slope.detach(), msg="D cannot learn from it: create_graph?"
    )


def test_losses_lead_D_to_p_over_p_plus_q():
    """The README's theory, run (Goodfellow et al. 2014, proposition 1)."""
    names = {}  # all variables of the snippet
    exec(THEORY, names)  # noqa: S102
    D_x = names["D"](names["x"]).sigmoid()[:2]  # at 0 and 0.5; at 3 lies no data
    best = names["p_x"] / (names["p_x"] + names["q_x"])
    assert_close(D_x, best[:2], rtol=0, atol=0.05, msg="D is not p / (p + q)")


# --- networks -------------------------------------------------------------------------


def test_networks_D_returns_logits_not_probabilities():
    logits = Discriminator()(1000 * torch.randn(20, 1, 28, 28))
    assert logits.shape == (20, 1)
    assert logits.abs().max() > 1, "D must not end in a sigmoid"


def test_networks_are_the_mlps_of_their_arguments():
    rest = [nn.LeakyReLU(0.1, inplace=True), nn.Dropout(0.2)]
    hidden = [nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), *rest]
    G = nn.Sequential(*hidden, nn.Linear(4, 12), nn.Tanh())
    D = nn.Sequential(nn.Linear(12, 4), *rest, nn.Linear(4, 1))
    assert repr(Generator(3, [4], (3, 2, 2), True, 0.2, 0.1).net) == repr(G)
    assert repr(Discriminator([4], (3, 2, 2), 0.2, 0.1).net) == repr(D)


def test_networks_without_arguments_are_the_mlps_of_the_readme():
    G = Generator(64, [256, 512], (1, 28, 28), True, 0.0, 0.0)
    D = Discriminator([512, 256], (1, 28, 28), 0, 0.2)
    assert repr(Generator().net) == repr(G.net)
    assert repr(Discriminator().net) == repr(D.net)


def test_networks_average_moves_by_its_formula():
    G_ema, G = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    G(torch.randn(5, 3))
    update_average(G_ema, G, 0.3)
    assert_close(G_ema.running_var, 0.3 + 0.7 * G.running_var)


# --- one step: play and train_epoch ---------------------------------------------------


def make_game(flags="", shape=(1, 28, 28)):
    """All that train_epoch takes: 64 images of noise, in the fourth epoch."""
    args = train_gan.parse_args(f"--batch-size 16 --lr 0.1 {flags}".split())
    torch.manual_seed(0)
    G = Generator(64, [8], shape, True, 0.0, 0.0)
    D = Discriminator([8], shape)
    betas = (args.beta1, 0.999)
    return SimpleNamespace(
        args=args,
        images=torch.randint(0, 256, (64, *shape), dtype=torch.uint8),
        epoch=4,
        G=G,
        D=D,
        G_ema=copy.deepcopy(G).eval().requires_grad_(False),
        # eps: else Adam would make large steps out of rounding errors
        opt_G=torch.optim.Adam(G.parameters(), args.lr, betas, eps=1),
        opt_D=torch.optim.Adam(D.parameters(), args.lr, betas, eps=1),
    )


def play(game):
    return train_gan.train_epoch(**vars(game))


def naive_epoch(args, images, epoch, G, D, G_ema, opt_G, opt_D):
    """As tutorials write it: a pass for each half, and gradients for everyone."""
    torch.manual_seed(args.seed * 1_000_003 + epoch)
    n = max(1, len(images) // args.batch_size)
    losses_D = []
    losses_G = []
    for i, batch in enumerate(torch.randperm(len(images)).tensor_split(n), 1):
        x = images[batch] / 255 * 2 - 1
        fake = G(torch.randn(len(x), args.z_dim))
        loss_D = losses.discriminator_loss(D(x), D(fake.detach()))
        losses_D.append(loss_D.item())
        if ((epoch - 1) * n + i) % 4 == 0:
            loss_D = loss_D + 4 * args.r1 * losses.r1_penalty(D, x)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        if i % args.k == 0 or i == n:
            loss_G = losses.generator_loss(D(fake))
            losses_G.append(loss_G.item())
            opt_G.zero_grad()
            loss_G.backward()
            opt_G.step()
            G_steps = (epoch - 1) * math.ceil(n / args.k) + math.ceil(i / args.k)
            update_average(G_ema, G, min(args.ema, (1 + G_steps) / (10 + G_steps)))
    return {"loss_D": numpy.mean(losses_D), "loss_G": numpy.mean(losses_G)}


@mark.parametrize(
    "flags, channels",
    [("--k 2 --r1 3 --batch-size 21 --seed 4", 1), ("--ema 0.3", 1), ("", 3)],
    ids=["k", "average", "colour"],
)
def test_step_by_step_equals_the_naive_loop(flags, channels):
    shape = (channels, 28, 28)
    ours, theirs = make_game(flags, shape), make_game(flags, shape)
    means = play(ours)
    expected = naive_epoch(**vars(theirs))
    for part in ("D", "G", "G_ema"):
        state = getattr(ours, part).state_dict()
        naive = getattr(theirs, part).state_dict()
        message = f"{part} is not that of the naive loop"
        assert_close(state, naive, rtol=0.01, atol=1e-3, msg=message)
    for column in expected:
        message = f"{column} of the log is not the mean of the naive loop"
        assert means[column] == approx(expected[column], rel=1e-3), message


def test_step_shows_D_pixels_from_minus_1_to_1():
    game = make_game("--batch-size 64")
    game.images[0] = 0
    shown = []
    game.D.register_forward_pre_hook(lambda D, inputs: shown.append(inputs[0][:64]))
    play(game)
    assert shown[0].min() == -1, "a black pixel is not -1 for D"
    assert shown[0].max() == 1, "a white pixel is not 1 for D"


def test_step_clears_the_gradients_of_the_last_step():
    game = make_game()
    for weight in [*game.D.parameters(), *game.G.parameters()]:
        weight.grad = torch.full_like(weight, 1e9)
    play(game)
    for name in ("D", "G"):
        for weight in getattr(game, name).parameters():
            message = f"{name}'s gradients of the last step were not cleared"
            assert weight.grad.max() < 1e6, message


@mark.parametrize("one, other", ["DG", "GD"])
def test_step_of_one_network_does_not_move_the_other(one, other):
    game = make_game()
    getattr(game, f"opt_{other}").step = Mock()
    before = copy.deepcopy(list(getattr(game, other).parameters()))
    play(game)
    after = list(getattr(game, other).parameters())
    assert_close(after, before, msg=f"{one}'s step moved {other}")


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
    assert means["acc_D"] == 0.5, "acc_D is not 0.5, though D says real of all images"
    assert means["D_G_z1"] == approx(0.6), "D_G_z1 is not from before D's update"
    assert means["D_G_z2"] == approx(0.75), "D_G_z2 is not from after D's update"


def test_step_logs_the_loss_of_D_without_r1():
    """Each epoch is one step here. The penalty is in the fourth."""
    plain = make_game("--batch-size 64 --r1 0")
    steep = make_game("--batch-size 64 --r1 100")
    assert play(plain)["loss_D"] == play(steep)["loss_D"], "loss_D includes R1"


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
    assert float(best) == approx(0.599, abs=0.001), "the test needs an inner sigma"
    scores = log_density(test, best)
    ours = train_gan.log_density(test, samples, best)
    assert_close(ours, scores, msg="log_density is not that of the mixture")
    torch.set_float32_matmul_precision("medium")  # as the training leaves it
    mean, error = train_gan.parzen(samples, images, test)
    assert mean == approx(float(scores.mean()), abs=1e-4), "sigma is not the best"
    assert error == approx(float(scores.std()) / math.sqrt(30), rel=1e-4)
    assert torch.get_float32_matmul_precision() == "highest", "products are rounded"


def test_evaluation_scales_10_000_samples_to_the_images():
    """Each of two pixels is 0.2 in G's range, 153 of 255: the best sigma is 0.1."""
    images = torch.full((9001, 2), 153)
    G = Mock(side_effect=lambda z: 0 * z[:, :2] + 0.2)
    mean, _ = train_gan.score(G, 3, images, images[:5])
    assert mean == approx(-math.log(2 * math.pi * 0.1**2), rel=1e-3)
    assert G.call_args.args[0].shape == (10_000, 3)


# --- data -----------------------------------------------------------------------------


def test_data_keeps_colours_is_cropped_to_a_square_and_lies_on_white():
    colour, wide, transparent = [[255, 100, 0]], [5, 1, 1, 5], [[255, 0, 0, 0]]
    save_pictures("mine", [[colour * 2] * 2, [wide] * 2, [transparent * 2] * 2])
    pixels = load_folder("mine", 2)[:, :, 1, 1].tolist()
    assert pixels == [[255, 100, 0], [1, 1, 1], [255, 255, 255]]


def test_data_is_turned_as_the_camera_was():
    save_pictures("mine", [[[0, 0, 200]] * 3])
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.open("mine/00.tiff").save("mine/turned.png", exif=turned)
    assert load_folder("mine", 3)[:, 0, 0].tolist() == [[0, 0, 200], [200, 0, 0]]


def test_data_of_a_large_photo_is_made_small():
    os.mkdir("mine")
    photo = Image.radial_gradient("L").resize((900, 600))
    photo.save("mine/drafted.jpg")
    photo.save("mine/exact.png")
    drafted, exact = load_folder("mine", 28).float()
    assert (drafted - exact).abs().mean() < 1


def save_frames(path):
    frames = [Image.new("L", (4, 4), 60 * n) for n in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def test_data_of_an_animation_is_its_first_picture():
    os.mkdir("mine")
    save_frames("mine/0.gif")
    save_frames("mine/1.png")
    assert load_folder("mine", 1).flatten().tolist() == [0, 0]


RGB_OF_16_BITS = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d0000000c494441"
    "54789c6360640241000025000a042d47f50000000049454e44ae426082"
)
REFUSED = {
    "grey.tiff": "ValueError: more than 8 bits a channel: convert it to 8",
    "colour.png": "ValueError: more than 8 bits a channel: convert it to 8",
    "stack.tiff": "ValueError: several images in one file: save each as a file",
    "half.tiff": "",  # Pillow's own words
}


@mark.parametrize("name", REFUSED)
def test_data_names_what_it_refuses_and_why(name, capsys):
    Image.new("I;16", (2, 2)).save("grey.tiff")
    Path("colour.png").write_bytes(RGB_OF_16_BITS)
    save_frames("stack.tiff")
    Path("half.tiff").write_bytes(Path("photos/00.tiff").read_bytes()[:300])
    shutil.copy(name, f"photos/{name}")
    assert len(load_folder("photos", 4)) == 64
    path = Path("photos", name)
    warning = f"1 unreadable, the first is {path}: {REFUSED[name]}"
    assert warning in capsys.readouterr().err


def test_data_of_a_locked_folder_is_an_error(monkeypatch):
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError("no entry")))
    text = run("--dataset photos", 1)
    assert "warning: 1 unreadable, the first is no entry" in text
    assert "--dataset photos: 0 images, 2 are needed; links to folders do not" in text


def test_data_is_read_from_all_folders_but_hidden_ones():
    shutil.copytree("photos", "photos/.hidden")
    shutil.copytree("photos", "photos/below/it")
    os.rename("photos/below/it/00.tiff", "photos/.hidden.tiff")
    assert len(load_folder("photos", 2)) == 64 + 63


def test_data_set_has_channels_and_test_images(monkeypatch):
    def mnist(folder, train, download):
        assert download, "on a new machine, nothing is downloaded"
        assert socket.getdefaulttimeout() == 10, "a dead network would hang"
        data = torch.ones(9 if train else 5, 28, 28)
        return SimpleNamespace(data=data, targets=None)

    monkeypatch.setitem(train_gan.DATASETS, "mnist", mnist)
    _, images, test_images = train_gan.load_data(train_gan.parse_args([]))[:3]
    assert images.shape == (9, 1, 28, 28)
    assert test_images.shape == (5, 1, 28, 28)
    assert socket.getdefaulttimeout() is None, "a notebook's own waits are cut, too"


def test_data_set_does_not_hide_errors_of_your_own_code(monkeypatch):
    """Here, the data set has no `data`. It could be a typo."""
    monkeypatch.setitem(train_gan.DATASETS, "mnist", lambda *args, **kwargs: "typo")
    with raises(AttributeError):
        train_gan.load_data(train_gan.parse_args([]))


def test_data_set_that_cannot_be_had_says_why_and_what_is_missing():
    text = run("--dataset mnist", 1)
    assert text.startswith("error: no mnist in --data-dir data: ")
    assert "no network" in text
    assert "train-images-idx3-ubyte" in text
    assert "delete" not in text, "there is nothing to delete"
    raw = Path("data/MNIST/raw")
    Path(raw, "train-images-idx3-ubyte").write_text("half of it")
    assert f"if a file is damaged, delete {raw}" in run("--dataset mnist", 1)


def test_data_set_without_internet_is_drawn_and_a_resumed_run_keeps_it():
    text = run(f"{SMALL} --epochs 1")
    assert text.startswith("warning: training on --dataset drawn: no mnist in --data-")
    assert f"{RUN}: drawn [210, 1, 28, 28], " in text
    assert "warning" not in run("--resume runs/001 --epochs 2")


def test_data_set_that_is_not_known_is_told_the_known_names():
    text = run("--dataset cifar10", 1)
    assert "--dataset cifar10: no folder" in text
    assert "'auto', 'mnist', 'fashion-mnist', 'kmnist', 'drawn'" in text


def test_data_drawn_is_white_on_black_and_the_same_at_every_call():
    images, test_images = train_gan.draw_digits()[:2]
    assert len(test_images) == 16
    assert torch.equal(images, train_gan.draw_digits()[0])
    assert 20 < images.float().mean() < 80


# --- a whole run ----------------------------------------------------------------------


def test_run_draws_after_about_100_steps_and_at_its_end():
    run(f"{SMALL} --dataset drawn --batch-size 20 --epochs 25")  # of 10 steps each
    pictures = sorted(path.name for path in RUN.glob("epoch_*"))
    assert pictures == ["epoch_00010.png", "epoch_00020.png", "epoch_00025.png"]


def test_run_takes_numbers_and_paths_and_returns_its_folder_and_the_average_of_G():
    folder, G = train_gan.main(
        [*SMALL.split(), "--epochs", 1, "--dataset", Path("photos")]
    )
    z = torch.randn(5, 4)
    assert folder == RUN
    assert not G.training, "the average of G is not in eval mode"
    assert_close(G(z), load_generator(folder)(z), rtol=0, atol=0)
    assert not load_generator(folder)(z).requires_grad, "a picture would need detach()"


def test_run_draws_real_images_and_the_average_of_G_in_eval_mode():
    run(f"{SMALL} --dataset drawn --epochs 1 --dropout 0.3")
    G = load_generator(RUN)
    torch.manual_seed(0)
    samples = G(torch.randn(64, 4)) / 2 + 0.5
    real = train_gan.draw_digits()[0][:64] / 255
    for name, images in {"epoch_00001.png": samples, "real.png": real}.items():
        save_image(images, "expected.png")
        expected = pil_to_tensor(Image.open("expected.png")).int()
        ours = pil_to_tensor(Image.open(RUN / name)).int()
        message = f"{name} shows other images, or G in training mode"
        assert_close(ours, expected, rtol=0, atol=2, msg=message)  # GPUs round


def test_run_writes_its_history_into_the_table_and_prints_some_rows():
    text = run(f"{PHOTOS} --epochs 30")
    history = load(RUN)["history"]
    table = table_of(RUN)
    assert [row["epoch"] for row in history] == list(range(1, 31))
    assert len(table) == 30, "rows are missing in losses.csv"
    for row, expected in zip(table, history):
        assert {name: float(row[name]) for name in row} == expected
    header, *rows = [line.split() for line in text.splitlines()[2:]]
    assert header == list(table[0]), "the printed names are not the table's columns"
    assert [row[0] for row in rows] == ["25", "30"]
    assert float(rows[-1][1]) == approx(history[-1]["loss_D"], abs=0.001)
    assert 0 < history[-1]["seconds"] < 60


def test_run_says_in_json_what_it_was():
    text = run(f"{SMALL} --dataset drawn --device quantum --epochs 1")
    info = info_of(RUN)
    assert info["images"] == [210, 1, 28, 28]
    assert info["device"] != "quantum", "the device was not there"
    assert load(RUN)["args"]["device"] == "quantum", "a flag is kept as it was named"
    assert info["torch"] == torch.__version__
    assert f"{info['log_likelihood']:.1f} +- {info['standard_error']:.1f} nats" in text


def test_run_shows_real_images_before_it_trains():
    losses.generator_loss = Mock(side_effect=KeyboardInterrupt)
    text = run(f"{PHOTOS} --epochs 1", 130)
    assert sorted(contents(RUN)) == ["real.png", "run.json"]
    assert "--resume" not in text, "there is nothing to resume"


def test_run_learns():
    flags = "--dataset drawn --batch-size 32 --device cpu"
    run(f"{flags} --lr 0 --epochs 1")
    run(f"{flags} --epochs 20")
    before = info_of("runs/001")["log_likelihood"]
    after = info_of("runs/002")["log_likelihood"]
    assert after > before + 100, f"the score goes from {before} to {after} nats only"


GAME_FLAGS = [
    "--z-dim 5",
    "--g-hidden 9",
    "--d-hidden 9",
    "--no-batch-norm",
    "--dropout 0.3",
    "--g-leak 0.2",
    "--d-leak 0.1",
    "--loss minimax",
    "--k 2",
    "--real-label 0.9",
    "--label-noise 0.1",
    "--r1 0",
    "--batch-size 7",
    "--lr 0.02",
    "--beta1 0.5",
    "--ema 0.1",
    "--seed 1",
]


def test_run_is_changed_by_every_flag_of_the_game():
    pictures = {}
    for flag in ["", *GAME_FLAGS]:
        run(f"{PHOTOS} --epochs 1 --lr 0.01 {flag} --out-dir new")
        picture = Path("new/epoch_00001.png").read_bytes()
        assert picture not in pictures, f"{flag} changes nothing"
        pictures[picture] = flag
        shutil.rmtree("new")


def test_run_warns_where_k_is_more_than_an_epoch_has():
    assert "warning: --k 5 does what --k 4 does" in run(f"{PHOTOS} --epochs 1 --k 5")
    assert "warning" not in run(f"{PHOTOS} --epochs 1 --k 4")


def test_run_makes_a_gif_in_the_order_of_the_epochs(tmp_path, capsys):
    for grey, epoch in enumerate(["00002", "00010", "99999"]):
        Image.new("L", (8, 8), 100 * grey).save(f"epoch_{epoch}.png")
    train_gan.save_gif(tmp_path)
    gif = Image.open("training.gif")
    gif.seek(2)
    assert gif.convert("L").getextrema() == (200, 200)
    assert gif.info["loop"] == 0, "it does not go on for ever"
    Path("epoch_00002.png").write_text("no picture")
    train_gan.save_gif(tmp_path)
    assert "warning: training.gif: " in capsys.readouterr().err
    assert Image.open("training.gif").n_frames == 3, "the old GIF is lost"


def test_run_goes_on_where_excel_locks_the_table(monkeypatch):
    monkeypatch.setattr(Path, "replace", Mock(side_effect=PermissionError("locked")))
    text = run(f"{PHOTOS} --epochs 1")
    assert f"warning: {RUN / 'losses.csv'} stays as it was: locked" in text


def test_run_is_saved_before_its_row_is_printed():
    train_gan.print_row = Mock(side_effect=OSError("the terminal is gone"))
    assert "error: the terminal is gone" in run(f"{PHOTOS} --epochs 1", 1)
    assert len(load(RUN)["history"]) == 1


def test_run_that_diverges_names_the_epoch_and_writes_the_table():
    text = run(f"{PHOTOS} --lr 1e38", 1)
    assert "epoch 1 diverged: try a lower --lr" in text
    assert [row["epoch"] for row in table_of(RUN)] == ["1"]
    assert not Path(RUN, "checkpoint.pt").exists(), "a broken run would be resumed"


def test_run_of_the_script_prints_names_that_the_console_lacks():
    os.rename("photos", "\u0444")
    command = [sys.executable, train_gan.__file__, "--dataset", "\u0444", "--epochs=1"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    text = subprocess.check_output(command, env=ascii_only, text=True)
    assert "reading \\u0444 ..." in text


# --- resume and faults ----------------------------------------------------------------


def test_resume_ends_as_if_never_cut_off():
    flags = f"{PHOTOS} --dropout 0.3 --label-noise 0.1 --k 2"
    run(f"{flags} --epochs 50")
    run(f"{flags} --epochs 25")
    run("--resume runs/002 --epochs 50")
    whole, resumed = load("runs/001"), load("runs/002")
    for name in ("D", "G", "G_ema", "opt_D", "opt_G"):
        message = f"{name} differs from that of the whole run"
        assert_close(resumed[name], whole[name], rtol=0, atol=0, msg=message)
    assert contents("runs/001")["training.gif"] == contents("runs/002")["training.gif"]


def test_resume_takes_new_flags_and_keeps_the_others():
    run(f"{PHOTOS} --k 3 --epochs 1 --out-dir my/run")
    run("--resume my/run --epochs 2 --lr 0.5 --beta1 0.3")
    info = info_of("my/run")
    assert [info["k"], info["lr"], info["epochs"]] == [3, 0.5, 2]
    for optimizer in ("opt_G", "opt_D"):
        (group,) = load("my/run")[optimizer]["param_groups"]
        assert group["lr"] == 0.5, f"{optimizer} has the old learning rate"
        assert group["betas"] == (0.3, 0.999), f"{optimizer} has the old --beta1"


WRONG_RESUMES = {
    "--epochs 2 --lr 0.5": "error: --epochs 2: 3 are done already",
    "--epochs 4 --z-dim 5": "size mismatch",
}


@mark.parametrize("flags", WRONG_RESUMES)
def test_resume_refuses_flags_that_do_not_fit_and_touches_nothing(flags):
    run(f"{PHOTOS} --epochs 3")
    before = contents(RUN)
    assert WRONG_RESUMES[flags] in run(f"--resume runs/001 {flags}", 1)
    assert contents(RUN) == before


def test_resume_of_a_finished_run_says_so_and_scores_it_again():
    run(f"{SMALL} --dataset drawn --epochs 2")
    before = info_of(RUN)["log_likelihood"]
    text = run("--resume runs/001")
    assert text.startswith("warning: 2 epochs are done: to go on, add --epochs 4\n")
    assert info_of(RUN)["log_likelihood"] == approx(before)


def test_resume_never_empties_the_table_where_the_columns_change():
    run(f"{PHOTOS} --epochs 1")
    train_epoch = train_gan.train_epoch
    train_gan.train_epoch = lambda *game: (
        train_epoch(*game) | {"mine": numpy.float64(7)}
    )
    run("--resume runs/001 --epochs 2")
    train_gan.train_epoch = train_epoch
    run("--resume runs/001 --epochs 3")  # a NumPy number could not be loaded
    new_column = [row["mine"] for row in table_of(RUN)]
    assert new_column == ["", "7.0", ""], "losses.csv lost a new column or old rows"


def test_resume_after_ctrl_c():
    run(f"{PHOTOS} --epochs 1")
    os.remove(RUN / "training.gif")
    losses.generator_loss = Mock(side_effect=KeyboardInterrupt)
    text = run("--resume runs/001 --epochs 2", 130)
    assert f'stopped; go on with --resume "{RUN}"' in text
    assert os.path.exists(RUN / "training.gif")


def test_resume_after_a_full_disk_has_the_last_whole_checkpoint():
    resource = importorskip("resource", reason="Windows cannot limit a file's size")
    run(f"{PHOTOS} --epochs 1")
    before = contents(RUN)["checkpoint.pt"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1000, limits[1]))
    with suppress(RuntimeError):  # the words of torch.save, if it writes the file
        run("--resume runs/001 --epochs 2", 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(table_of(RUN)) == 2, "the table is small enough: it should be written"
    message = "checkpoint.pt is broken: write another file, then replace it"
    assert contents(RUN)["checkpoint.pt"] == before, message


class Evil:
    def __reduce__(self):
        return os.mkdir, ("marker",)


@mark.parametrize("content", ["half", {"epoch": 3}, Evil()], ids=type)
def test_resume_refuses_what_is_no_checkpoint(content):
    torch.save(content, "checkpoint.pt")
    if content == "half":
        os.truncate("checkpoint.pt", 300)
    text = run("--resume .", 1)
    assert "error: no whole run of this version in --resume .: " in text
    assert text.count("\n") == 1
    assert not os.path.exists("marker"), "a program in the file was run"


# --- command line ---------------------------------------------------------------------

WRONG = {
    "--k 0": "0 is not in ",
    "--batch-size 1": "1 is not in ",
    "--lr nan": "nan is not in ",
    "--seed -1": "-1 is not in ",
    "--out-dir new --resume runs/001": "not allowed with",
}


@mark.parametrize("flags", WRONG)
def test_command_line_refuses_in_one_line(flags):
    text = run(flags, 2)
    assert flags.split()[0] in text
    assert WRONG[flags] in text
    assert text.count("\n") == 1


def test_command_line_takes_the_ends_of_its_ranges():
    args = train_gan.parse_args(f"--batch-size 2 --lr 0 --k 1 --seed {2**32}".split())
    assert [args.batch_size, args.lr, args.k, args.seed] == [2, 0, 1, 2**32]


def test_command_line_shows_every_flag_with_its_default():
    text = run("--help")
    flags = vars(train_gan.parse_args([]))
    for name in flags:
        assert f"--{name.replace('_', '-')}" in text
    assert text.count("(default:") == len(flags)


@mark.parametrize(
    "name, there, broken, taken",  # `broken` are there, but cannot work
    [
        ("auto", ["cuda", "mps"], [], "cuda"),
        ("auto", ["cuda", "mps"], ["cuda"], "mps"),
        ("auto", [], [], "cpu"),
        ("cuda:1", ["cuda"], [], "cuda:1"),
        ("cuda", ["cuda"], ["cuda"], "cpu"),
    ],
)
def test_command_line_takes_the_first_device_that_works(
    name, there, broken, taken, monkeypatch, capsys
):
    pretend_devices(there, broken, monkeypatch)
    assert train_gan.choose_device(name) == taken
    reason = "cannot be used: RuntimeError: CUDA error: no kernel image here\n"
    expected = "".join(f"warning: {device} {reason}" for device in broken)
    assert capsys.readouterr().err == expected


def test_command_line_takes_the_cpu_for_a_whole_run_where_cuda_cannot_work(monkeypatch):
    pretend_devices(["cuda"], ["cuda"], monkeypatch)
    run(f"{PHOTOS} --epochs 1 --device auto")


def pretend_devices(there, broken, monkeypatch):
    ones = torch.ones

    def ones_on(*sizes, device=None, **options):
        if device in broken:
            raise RuntimeError("CUDA error: no kernel\nimage here. Search for it in")
        return ones(*sizes, **options)

    monkeypatch.setattr(torch, "ones", ones_on)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)


def test_command_line_writes_over_nothing_but_an_empty_folder():
    os.mkdir("empty")
    Path("empty/.DS_Store").write_text("Apple's")
    run(f"{PHOTOS} --epochs 1 --out-dir empty")
    text = run(f"{PHOTOS} --out-dir photos", 1)
    assert "error: photos is not empty: name a new one, or --resume it" in text


# --- .ci/replay.py --------------------------------------------------------------------


@fixture
def replay(monkeypatch):
    monkeypatch.syspath_prepend(Path(train_gan.__file__).with_name(".ci"))
    return importlib.import_module("replay")


@mark.parametrize("cuda", [True, False])
def test_replay_without_cuda_or_on_the_cpu_is_one_line(cuda, replay, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with raises(SystemExit, match="error: no CUDA .*: run train_gan.py itself"):
        replay.main([*PHOTOS.split(), "--device", "cpu"])
    assert not RUN.exists()


def test_replay_takes_the_turns_of_the_program(replay, monkeypatch):
    """Each turn is played here, with the numbers that its recording would get."""

    def play_turn(args, images, batches, D_steps, decay, players):
        args = copy.copy(args)
        args.ema = decay  # below the limit of so many steps
        return replay.play(args, images, batches, D_steps, 10**9, *players)

    played, replayed = make_game("--k 3 --r1 2"), make_game("--k 3 --r1 2")
    expected = play(played)
    monkeypatch.setattr(replay, "replay_turn", play_turn)
    train_gan.play = replay.replay
    assert play(replayed) == expected
    assert_close(replayed.G_ema.state_dict(), played.G_ema.state_dict(), rtol=0, atol=0)


@mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a card")
def test_replay_equals_the_program(replay):
    flags = f"{PHOTOS} --device cuda --epochs 6 --dropout 0.2"
    run(flags)
    replay.main(flags.split())
    played, replayed = load("runs/001")["G_ema"], load("runs/002")["G_ema"]
    assert_close(replayed, played, rtol=0, atol=0, msg="replayed is not played")


# --- README ---------------------------------------------------------------------------

WIDTHS = {  # length of z, units of G and of D, as the tutorials publish them
    "A": [64, [128, 256, 512, 1024], [512, 256, 128]],
    "B": [100, [256, 512, 1024], [1024, 512, 256]],
    "D": [64, [256, 256], [256, 256]],
}


@mark.parametrize("system", ["A", "B", "C", "D", "E"])
def test_readme_builds_the_five_systems(system):
    (flags,) = re.findall(rf"\| {system}\. .*`python train_gan.py (.*)`", README)
    args = train_gan.parse_args(flags.split())
    built = [args.z_dim, args.g_hidden, args.d_hidden]
    assert built == WIDTHS.get(system, built), "not the widths of the tutorial"


def test_readme_commands_run():
    os.rename("photos", "my_photos")
    for flags in re.findall(r"train_gan\.py (--(?!help)[^`\n]+)", README):
        run(f"{flags} --dataset my_photos --device cpu --epochs 1")


def test_readme_snippets_run(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    run(f"{SMALL} --dataset drawn --epochs 1")
    for block in SNIPPETS:
        with suppress(ModuleNotFoundError):  # pandas
            exec(block, {})  # noqa: S102
