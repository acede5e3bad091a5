"""What a GAN must satisfy: python -m pytest test_gan.py (no network, no GPU, 30 s).

The tests stand in the order of a course. One part alone: pytest test_gan.py -k losses,
or networks, step, evaluation, data, run, resume, command, readme.
"""

import copy
import csv
import filecmp
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

import torch
from PIL import Image
from pytest import approx, fixture, importorskip, mark, skip
from torch import distributions, nn
from torch.testing import assert_close
from torchvision.utils import save_image

import losses
import models
import train_gan
from models import Discriminator, Generator, load_generator, update_average
from train_gan import load_folder

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
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
    before = [(module, dict(vars(module))) for module in (losses, models, train_gan)]
    torch.set_float32_matmul_precision("highest")
    yield
    for module, names in before:
        vars(module).update(names)


def save_pictures(folder, pictures, dtype="u1"):
    os.mkdir(folder)
    for n, pixels in enumerate(pictures):
        pixels = torch.as_tensor(pixels).numpy().astype(dtype)
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


def assert_same_run(a, b):
    """Equal weights, optimisers and pictures, bit for bit."""
    one, two = load(a), load(b)
    for name in ("D", "G", "G_ema", "opt_D", "opt_G"):
        assert_close(one[name], two[name], rtol=0, atol=0, msg=f"{name} differs")
    assert filecmp.cmp(f"{a}/training.gif", f"{b}/training.gif", shallow=False)


# --- losses ---------------------------------------------------------------------------


def test_losses_by_hand():
    real = torch.tensor(1.3863)  # the logit of D(x) = 0.8, log(0.8 / 0.2)
    fake = torch.tensor(-0.4055)  # the logit of D(G(z)) = 0.4, log(0.4 / 0.6)
    loss_D = float(losses.discriminator_loss(real, fake))
    loss_G = float(losses.generator_loss(fake))
    assert round(loss_D, 4) == 0.734, f"{loss_D} is not -log 0.8 - log(1 - 0.4)"
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
    "G": (
        lambda x: losses.generator_loss(x),
        lambda p: -p.log(),
    ),
    "minimax": (
        lambda x: losses.minimax_generator_loss(x),
        lambda p: (1 - p).log(),
    ),
}


@mark.parametrize("name", LOSSES)
def test_losses_are_the_logarithms_of_the_paper(name):
    loss, paper = LOSSES[name]
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    values = [loss(logits), paper(logits.sigmoid()).mean()]
    assert_close(*values, msg="the value differs")
    gradients = [torch.autograd.grad(value, logits) for value in values]
    assert_close(*gradients, msg="the gradient differs")


@mark.parametrize("name", LOSSES)
def test_losses_of_a_very_sure_D_are_finite(name):
    loss, _ = LOSSES[name]
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    value = loss(logits)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all(), "the gradient is not finite"


def test_losses_draw_noisy_labels_from_both_sides():
    labels = losses.labels(torch.zeros(999), 1.0, 0.1)
    assert 0.9 <= labels.min() < 0.91
    assert 1.09 < labels.max() <= 1.1


def test_losses_r1_is_half_the_squared_slope_of_a_linear_D():
    slope = torch.randn(6, requires_grad=True)
    penalty = losses.r1_penalty(lambda x: x @ slope, torch.rand(3, 6))
    assert_close(penalty, slope.square().sum() / 2)
    penalty.backward()
    assert_close(slope.grad, slope.detach(), msg="D cannot learn from the penalty")


def test_losses_lead_D_to_p_over_p_plus_q():
    """The best D is p(x) / (p(x) + q(x)) (Goodfellow et al. 2014, proposition 1)."""
    p = distributions.Normal(-1.0, 1.0)  # the real numbers
    q = distributions.Normal(1.0, 0.5)  # the fake ones
    D = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    D.append(nn.Linear(64, 1))
    opt_D = torch.optim.Adam(D.parameters(), 3e-3)
    for _ in range(600):
        loss_D = losses.discriminator_loss(D(p.sample((512, 1))), D(q.sample((512, 1))))
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
    x = torch.tensor([[-2.0], [-1.0], [0.0], [0.5], [1.0], [1.5]])  # where data lies
    p_x = p.log_prob(x).exp()
    q_x = q.log_prob(x).exp()
    best = p_x / (p_x + q_x)
    assert_close(D(x).sigmoid(), best, rtol=0, atol=0.05, msg="D is not p / (p + q)")


# --- networks -------------------------------------------------------------------------


def test_networks_D_returns_logits_not_probabilities():
    logits = Discriminator()(1000 * torch.randn(20, 1, 28, 28))
    assert logits.shape == (20, 1)
    assert logits.abs().max() > 1, "D must not end in a sigmoid"


def test_networks_begin_with_D_near_one_half():
    images = Generator()(torch.randn(20, 64))
    D_G_z = Discriminator()(images).sigmoid()
    assert images.shape == (20, 1, 28, 28)
    assert (D_G_z - 0.5).abs().max() < 0.2


def test_networks_are_the_mlps_of_their_arguments():
    rest = [nn.LeakyReLU(0.1, inplace=True), nn.Dropout(0.2)]
    hidden = [nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), *rest]
    G = nn.Sequential(*hidden, nn.Linear(4, 12), nn.Tanh())
    assert repr(Generator(3, [4], (3, 2, 2), True, 0.2, 0.1).net) == repr(G)
    D = nn.Sequential(nn.Linear(12, 4), *rest, nn.Linear(4, 1))
    assert repr(Discriminator([4], (3, 2, 2), 0.2, 0.1).net) == repr(D)


def test_networks_are_without_arguments_the_mlps_of_the_program():
    args = train_gan.parse_args([])
    shape = (1, 28, 28)
    norm, dropout = args.batch_norm, args.dropout
    G = Generator(args.z_dim, args.g_hidden, shape, norm, dropout, args.g_leak)
    D = Discriminator(args.d_hidden, shape, dropout, args.d_leak)
    assert repr(Generator().net) == repr(G.net)
    assert repr(Discriminator().net) == repr(D.net)


def test_networks_average_moves_by_its_formula():
    G_ema, G = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    G(torch.randn(5, 3))
    update_average(G_ema, G, 0.3)
    assert_close(G_ema.running_var, 0.3 + 0.7 * G.running_var)
    assert G_ema.num_batches_tracked == 0


# --- one step: train_epoch ------------------------------------------------------------


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
    rows_D = []
    rows_G = []
    for i, batch in enumerate(torch.randperm(len(images)).tensor_split(n), 1):
        x = images[batch] / 255 * 2 - 1
        fake = G(torch.randn(len(x), args.z_dim))
        real_logits = D(x)
        fake_logits = D(fake.detach())
        loss_D = losses.discriminator_loss(real_logits, fake_logits)
        right = (real_logits > 0).float().mean() + (fake_logits < 0).float().mean()
        D_x = real_logits.sigmoid().mean()
        D_G_z1 = fake_logits.sigmoid().mean()
        rows_D.append(torch.stack([loss_D, D_x, D_G_z1, right / 2]))
        if ((epoch - 1) * n + i) % 4 == 0:
            loss_D = loss_D + 4 * args.r1 * losses.r1_penalty(D, x)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        if i % args.k == 0 or i == n:
            D_G_z2 = D(fake).sigmoid().mean()
            loss_G = losses.generator_loss(D(fake))
            rows_G.append(torch.stack([loss_G, D_G_z2]))
            opt_G.zero_grad()
            loss_G.backward()
            opt_G.step()
            G_steps = (epoch - 1) * math.ceil(n / args.k) + math.ceil(i / args.k)
            update_average(G_ema, G, min(args.ema, (1 + G_steps) / (10 + G_steps)))
    means = [*torch.stack(rows_D).mean(0), *torch.stack(rows_G).mean(0)]
    names = ["loss_D", "D_x", "D_G_z1", "acc_D", "loss_G", "D_G_z2"]
    return {name: mean.item() for name, mean in zip(names, means)}


GAMES = {
    "k": ["--k 2 --r1 3 --batch-size 21 --seed 4", (1, 28, 28)],
    "average": ["--ema 0.3", (1, 28, 28)],
    "colour": ["", (3, 28, 28)],
}


@mark.parametrize("name", GAMES)
def test_step_by_step_equals_the_naive_loop(name):
    ours, theirs = make_game(*GAMES[name]), make_game(*GAMES[name])
    means = play(ours)
    expected = naive_epoch(**vars(theirs))
    for part in ("D", "G", "G_ema"):
        state = getattr(ours, part).state_dict()
        naive = getattr(theirs, part).state_dict()
        assert_close(state, naive, rtol=0.01, atol=1e-3, msg=f"{part} differs")
    assert list(means) == list(expected)
    for column in means:
        message = f"{column} of the log is not that of the naive loop"
        assert means[column] == approx(expected[column], rel=1e-3), message


def test_step_clears_the_gradients_of_the_last_step():
    game = make_game()
    for weight in [*game.D.parameters(), *game.G.parameters()]:
        weight.grad = torch.full_like(weight, 1e9)
    play(game)
    for name in ("D", "G"):
        for weight in getattr(game, name).parameters():
            message = f"{name}'s gradients of the last step were not cleared"
            assert weight.grad.max() < 1e6, message


def test_step_of_D_leaves_G():
    game = make_game()
    game.opt_G.step = Mock()
    before = copy.deepcopy(list(game.G.parameters()))
    play(game)
    assert_close(list(game.G.parameters()), before, msg="D's step moved G")


def test_step_of_G_leaves_D():
    game = make_game()
    game.opt_D.step = Mock()
    before = copy.deepcopy(list(game.D.parameters()))
    play(game)
    assert_close(list(game.D.parameters()), before, msg="G's step moved D")


def test_step_of_G_learns_through_the_updated_D():
    """D is 1/2 everywhere, with all weights 0; its update sets the last to log 3."""
    game = make_game("--r1 0 --batch-size 64")
    weights = list(game.D.parameters())
    for weight in weights:
        nn.init.zeros_(weight)
    game.opt_D.step = lambda: nn.init.constant_(weights[-1], math.log(3))
    means = play(game)
    assert means["D_x"] == approx(0.5), "D_x is not the sigmoid of D's logit"
    assert means["acc_D"] == 0, "a logit of 0 is neither real nor fake"
    assert means["D_G_z1"] == approx(0.5), "D_G_z1 is not from before D's update"
    assert means["D_G_z2"] == approx(0.75), "G was shown to the D before its update"


def test_step_logs_the_loss_of_D_without_r1():
    """Each epoch is one step here. The penalty is in the fourth."""
    plain = make_game("--batch-size 64 --r1 0")
    steep = make_game("--batch-size 64 --r1 100")
    message = "the logged loss_D holds the penalty"
    assert play(plain)["loss_D"] == play(steep)["loss_D"], message


def test_step_of_G_comes_after_k_steps_of_D():
    game = make_game("--k 3")
    game.opt_G, game.opt_D = Mock(), Mock()
    play(game)
    assert game.opt_D.step.call_count == 4
    assert game.opt_G.step.call_count == 2, "after step 3, and after the last"


# --- evaluation -----------------------------------------------------------------------


def test_evaluation_is_a_mixture_of_gaussians_around_the_samples():
    """Sigma suits the first 1,000 of the last 10,000 training images, here black."""
    images = torch.full((10_500, 2), 150)
    images[500:1500] = validation = torch.tensor([[0, 0]])
    test = torch.randint(0, 256, (30, 2))
    samples = 0.4 + 0.4 * torch.rand(50, 2)

    def mixture(sigma):
        windows = distributions.Independent(distributions.Normal(samples, sigma), 1)
        weights = distributions.Categorical(torch.ones(50))
        return distributions.MixtureSameFamily(weights, windows)

    sigmas = torch.logspace(-1, 0, 10)
    best = max(sigmas, key=lambda sigma: mixture(sigma).log_prob(validation / 255))
    assert float(best) == approx(0.599, abs=0.001), "the test needs an inner sigma"
    scores = mixture(best).log_prob(test / 255)
    ours = train_gan.log_density(test, samples, best)
    assert_close(ours, scores, msg="log_density is not that of the mixture")
    mean, error = train_gan.parzen(samples, images, test)
    message = "sigma is not the best of ten for the validation images"
    assert mean == approx(float(scores.mean()), abs=1e-4), message
    assert error == approx(float(scores.std()) / math.sqrt(30), rel=1e-4)


def test_evaluation_does_not_round_its_products():
    torch.set_float32_matmul_precision("medium")  # as the training leaves it
    train_gan.parzen(torch.rand(3, 2), torch.zeros(9001, 2), torch.zeros(4, 2))
    assert torch.get_float32_matmul_precision() == "highest"


def test_evaluation_scales_the_samples_to_the_images():
    """Each of two pixels is 0.2 in G's range, 153 of 255: the best sigma is 0.1."""
    images = torch.full((9001, 2), 153)
    mean, _ = train_gan.score(lambda z: 0 * z[:, :2] + 0.2, 3, images, images[:5])
    assert mean == approx(-math.log(2 * math.pi * 0.1**2), rel=1e-3)


# --- data -----------------------------------------------------------------------------


def link_folder(target, name):
    try:
        os.symlink(os.path.abspath(target), name, target_is_directory=True)
    except OSError as error:
        skip(f"no links can be made here: {error}")


@mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<f4"])
def test_data_of_16_bits_or_more_has_one_scale(dtype):
    save_pictures("mine", [[[1000, 20000]] * 2, [[40000, 65535]] * 2], dtype)
    assert load_folder("mine", 2)[:, 0, 0].tolist() == [[0, 75], [154, 255]]


def test_data_of_floats_may_be_negative():
    save_pictures("mine", [[[-70000, 70000]] * 2] * 2, "f4")
    assert load_folder("mine", 2)[:, 0, 0].tolist() == [[0, 255], [0, 255]]


def test_data_of_8_bits_keeps_its_white_beside_16_bits():
    save_pictures("mine", [[[1000, 40000]] * 2], "<u2")
    Image.new("L", (2, 2), 131).save("mine/8bits.png")
    assert load_folder("mine", 2)[:, 0, 0].tolist() == [[0, 255], [131, 131]]


def test_data_keeps_red_green_and_blue_and_crops_to_a_square():
    save_pictures("mine", [[[[255, 100, 0]] * 2] * 2, [[5, 1, 1, 5]] * 2])
    assert load_folder("mine", 2)[:, :, 1, 1].tolist() == [[255, 100, 0], [1, 1, 1]]


def test_data_lies_on_white():
    save_pictures("mine", [[[[255, 0, 0, 0]] * 2] * 2] * 2)
    assert load_folder("mine", 2).float().mean() == 255


def test_data_is_turned_as_the_camera_was():
    save_pictures("mine", [[[0, 0, 200], [0, 0, 200], [0, 0, 200]]] * 2)
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.open("mine/00.tiff").save("mine/turned.png", exif=turned)
    assert load_folder("mine", 3)[:, 0, 0].tolist() == [[0, 0, 200]] * 2 + [[200, 0, 0]]


def test_data_of_few_levels_warns(capsys):
    save_pictures("mine", [[[0, 63]] * 2] * 2)
    load_folder("mine", 2)
    assert "mine has only the levels 0 to 63 of 0 to 255" in capsys.readouterr().err


def test_data_of_16_bits_and_one_level_warns(capsys):
    save_pictures("mine", [[[5000, 5000]] * 2] * 2, "u2")
    load_folder("mine", 2)
    assert "mine has only the levels 0 to 0 of 0 to 255" in capsys.readouterr().err


def test_data_of_many_levels_does_not_warn(capsys):
    save_pictures("mine", [[[0, 64]] * 2] * 2)
    load_folder("mine", 2)
    assert capsys.readouterr().err == ""


@mark.parametrize("pixel", [math.inf, math.nan, 1e38, -3.4e38])
def test_data_without_a_value_is_unreadable(capsys, pixel):
    save_pictures(
        "mine", [[[1.0, pixel]] * 2, [[1.0, 2.0]] * 2, [[3.0, 4.0]] * 2], "f4"
    )
    assert load_folder("mine", 2)[:, 0, 0].tolist() == [[0, 85], [170, 255]]
    path = Path("mine/00.tiff")
    assert f"1 unreadable, the first is {path}: ValueError" in capsys.readouterr().err


def test_data_names_what_it_cannot_open(capsys, monkeypatch):
    save_pictures("mine", torch.randint(0, 256, (2, 4, 4)))
    Path("mine/notes.txt").write_text("no picture")
    os.mkdir("mine/locked")
    scandir = os.scandir

    def guard(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "no entry", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guard)
    assert len(load_folder("mine", 4)) == 2
    text = capsys.readouterr().err
    assert "2 unreadable, the first is [Errno 13] no entry: " in text


def test_data_of_one_image_is_too_little():
    save_pictures("mine", [[[0, 255]]])
    assert "--dataset mine: 1 images, 2 are needed" in run("--dataset mine", 1)


def test_data_follows_links_and_leaves_out_what_is_hidden():
    os.mkdir("mine")
    link_folder("photos", "mine/link")
    shutil.copytree("photos", "mine/.hidden")
    shutil.copy("photos/00.tiff", "mine/.hidden.tiff")
    assert len(load_folder("mine", 2)) == 64


def test_data_in_a_loop_of_links_is_read_once():
    link_folder("photos", "photos/self")
    os.mkdir("photos/below")
    link_folder(".", "photos/below/up")
    assert len(load_folder("photos", 2)) == 64


def save_frames(path):
    frames = [Image.new("L", (4, 4), 60 * n) for n in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def test_data_of_a_tiff_stack_is_all_its_frames():
    os.mkdir("mine")
    save_frames("mine/stack.tiff")
    assert load_folder("mine", 1).flatten().tolist() == [0, 60, 120, 180]


@mark.parametrize("suffix", ["gif", "png", "mpo"])
def test_data_of_other_files_is_their_first_frame(suffix):
    os.mkdir("mine")
    for n in range(2):
        save_frames(f"mine/{n}.{suffix}")
    try:
        Image.open(f"mine/0.{suffix}").load()
    except OSError as error:
        skip(f"this Pillow cannot write it: {error}")  # mpo, Pillow 10.1
    assert load_folder("mine", 1).flatten().tolist() == [0, 0]


MEMORY = """
import resource
import sys
sys.path.insert(0, sys.argv[1])
from train_gan import load_folder

def peak():  # in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

load_folder("photos", 28)  # what Pillow and torch need themselves
before = peak()
for folder in ("eight", "sixteen"):
    size = load_folder(folder, 128).numel()
    print("times:", (peak() - before) / size)
"""


def test_data_fits_into_memory():
    importorskip("resource", reason="Windows does not tell the memory of a process")
    save_pictures("eight", [torch.randint(0, 256, (128, 128, 3))] * 700)
    save_pictures("sixteen", [torch.randint(0, 256, (128, 128))] * 2100, "u2")
    command = [sys.executable, "-c", MEMORY, os.path.dirname(train_gan.__file__)]
    text = subprocess.check_output(command, text=True)
    eight, sixteen = re.findall("times: (.*)", text)
    assert float(eight) <= 2.5, "8 bits need more than 2.5 times the images' size"
    assert float(sixteen) <= 6, "16 bits need more than 6 times the images' size"


def test_data_sets_have_channels_and_test_images(monkeypatch):
    def mnist(folder, train, download):
        assert download, "on a new machine, nothing is downloaded"
        return SimpleNamespace(data=torch.ones(9 if train else 5, 28, 28))

    monkeypatch.setitem(train_gan.DATASETS, "mnist", mnist)
    name, images, test_images = train_gan.load_data(train_gan.parse_args([]))
    assert name == "mnist"
    assert images.shape == (9, 1, 28, 28)
    assert test_images.shape == (5, 1, 28, 28)


def test_data_set_waits_10_seconds_for_the_network_and_not_longer(monkeypatch):
    def download(*args, **kwargs):
        seen.append(socket.getdefaulttimeout())
        raise OSError("no network")

    seen = []
    monkeypatch.setitem(train_gan.DATASETS, "kmnist", download)
    run("--dataset kmnist", 1)
    assert seen == [10]
    assert socket.getdefaulttimeout() is None, "the notebook's own waits are cut, too"


def test_data_set_that_cannot_be_had_says_why_and_what_is_missing():
    text = run("--dataset mnist", 1)
    assert text.startswith("error: no mnist in --data-dir data: ")
    assert "no network" in text
    assert "train-images-idx3-ubyte" in text
    assert text.count("\n") == 1


def test_data_set_that_is_damaged_is_to_be_deleted():
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    header = b"\0\0\x08\x03\0\0\xea\x60\0\0\0\x1c\0\0\0\x1c"  # 60,000 of 28 x 28
    for part in ("train-images-idx3", "train-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(header + b"too little")
        part = part.replace("train", "t10k")
        (raw / f"{part}-ubyte").write_bytes(header + b"too little")
    text = run("--dataset mnist", 1)
    assert "if a file is damaged, delete data/MNIST/raw" in text


def test_data_set_without_a_network_is_drawn():
    text = run(f"{SMALL} --epochs 1")
    assert text.startswith("warning: training on --dataset drawn: no mnist in --data-")
    assert "drawing 226 digits ..." in text
    assert f"{RUN}: drawn [210, 1, 28, 28], cpu" in text


@mark.parametrize("name", ["cifar10", "MNIST", ""])
def test_data_set_that_is_not_known_is_told_the_known_names(name, capsys):
    with suppress(SystemExit):
        train_gan.main(["--dataset", name])
    text = capsys.readouterr().err
    assert f"--dataset: {name!r} is no folder" in text
    assert "'auto', 'mnist', 'fashion-mnist', 'kmnist', 'drawn'" in text


def test_data_drawn_is_the_same_at_every_call():
    images, test_images = train_gan.draw_digits()
    assert len(test_images) == 16
    assert torch.equal(images, train_gan.draw_digits()[0])
    assert 42 < images.float().mean() < 44


def test_data_drawn_is_thin_and_thick():
    images, _ = train_gan.draw_digits()
    thin, normal, thick = (images[n::3].float().mean() for n in range(3))
    assert thin + 10 < normal
    assert normal + 10 < thick


# --- a whole run ----------------------------------------------------------------------


def test_run_writes_its_files():
    run(f"{SMALL} --dataset drawn --batch-size 20 --epochs 25")
    assert sorted(contents(RUN)) == [
        "checkpoint.pt",
        "epoch_00010.png",  # every 100 steps; an epoch has 10
        "epoch_00020.png",
        "epoch_00025.png",
        "losses.csv",
        "real.png",
        "run.json",
        "training.gif",
    ]


def test_run_returns_its_folder_and_the_average_of_G():
    folder, G = train_gan.main(f"{PHOTOS} --epochs 1".split())
    z = torch.randn(5, 4)
    assert folder == RUN
    assert not G.training, "the average of G is not in eval mode"
    assert_close(G(z), load_generator(folder)(z), rtol=0, atol=0)
    assert not load_generator(folder)(z).requires_grad, "a picture would need detach()"


def test_run_writes_its_history_into_the_table():
    run(f"{PHOTOS} --epochs 30")
    history = load(RUN)["history"]
    table = table_of(RUN)
    assert len(history) == 30
    assert len(table) == 30, "rows are missing in losses.csv"
    assert list(table[0]) == list(history[0]), "the columns differ"
    for row, expected in zip(table, history):
        assert {name: float(row[name]) for name in row} == expected
    assert [row["epoch"] for row in history] == list(range(1, 31))


def test_run_prints_the_columns_of_its_table_once():
    text = run(f"{PHOTOS} --epochs 50")
    text += run("--resume runs/001 --epochs 75")
    with open(RUN / "losses.csv") as file:
        names = file.readline().strip().split(",")
    lines = [line.split() for line in text.splitlines()]
    assert names in lines, "the printed names are not the columns of losses.csv"
    assert lines.count(names) == 2, "the names are not printed once in each call"
    rows = [line for line in lines if len(line) == len(names) and line != names]
    assert [row[0] for row in rows] == ["25", "50", "75"]
    last = table_of(RUN)[-1]
    assert rows[-1][1:] == [f"{float(last[name]):.3f}" for name in names[1:]]


def test_run_says_in_json_what_it_was():
    text = run(f"{SMALL} --dataset drawn --epochs 1")
    info = info_of(RUN)
    assert info["z_dim"] == 4
    assert info["dataset"] == "drawn"
    assert info["images"] == [210, 1, 28, 28]
    assert info["torch"] == torch.__version__
    assert "scoring 10,000 samples ..." in text
    assert f"{info['log_likelihood']:.1f} +- {info['standard_error']:.1f} nats" in text
    assert "\n  " in Path(RUN, "run.json").read_text(), "not easy to read"


def test_run_keeps_the_flags_as_they_were_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    run(f"{SMALL} --device auto --epochs 1")
    flags = load(RUN)["args"]
    assert flags["device"] == "auto"
    assert flags["dataset"] == "auto"
    assert info_of(RUN)["device"] == "cpu"


def test_run_draws_the_average_of_G_in_eval_mode():
    run(f"{PHOTOS} --epochs 1 --dropout 0.3")
    G = load_generator(RUN)
    torch.manual_seed(0)
    save_image(G(torch.randn(64, 4)) / 2 + 0.5, "expected.png")
    same = filecmp.cmp(RUN / "epoch_00001.png", "expected.png", shallow=False)
    assert same, "the picture is not of the average of G in eval mode"


def test_run_shows_the_first_64_real_images():
    run(f"{SMALL} --dataset drawn --epochs 1")
    save_image(train_gan.draw_digits()[0][:64] / 255, "expected.png")
    assert filecmp.cmp(RUN / "real.png", "expected.png", shallow=False)


def test_run_learns():
    flags = "--dataset drawn --batch-size 32 --device cpu"
    run(f"{flags} --lr 0 --epochs 1")
    run(f"{flags} --epochs 20")
    before = info_of("runs/001")["log_likelihood"]
    after = info_of("runs/002")["log_likelihood"]
    assert after > before + 100, "20 epochs do not raise the score by 100 nats"


GAME_FLAGS = {
    "z_dim": "--z-dim 5",
    "g_hidden": "--g-hidden 9",
    "d_hidden": "--d-hidden 9",
    "batch_norm": "--no-batch-norm",
    "dropout": "--dropout 0.3",
    "g_leak": "--g-leak 0.2",
    "d_leak": "--d-leak 0.1",
    "loss": "--loss minimax",
    "k": "--k 2",
    "real_label": "--real-label 0.9",
    "label_noise": "--label-noise 0.1",
    "r1": "--r1 0",
    "batch_size": "--batch-size 7",
    "lr": "--lr 0.02",
    "beta1": "--beta1 0.5",
    "ema": "--ema 0.1",
    "seed": "--seed 1",
}
OTHER_FLAGS = {
    "dataset",
    "data_dir",
    "image_size",
    "out_dir",
    "resume",
    "epochs",
    "device",
}


def test_run_is_changed_by_every_flag_of_the_game():
    flags = vars(train_gan.parse_args([]))
    assert set(flags) == {*GAME_FLAGS, *OTHER_FLAGS}, "a flag is missing in this test"
    pictures = {}
    for flag in ["", *GAME_FLAGS.values()]:
        run(f"{PHOTOS} --epochs 1 --lr 0.01 {flag} --out-dir new")
        picture = Path("new/epoch_00001.png").read_bytes()
        assert picture not in pictures, f"{flag} changes nothing"
        pictures[picture] = flag
        shutil.rmtree("new")


def test_run_makes_a_gif_in_the_order_of_the_epochs(tmp_path):
    for grey, epoch in enumerate(["00002", "99999", "100000"]):
        Image.new("L", (8, 8), 100 * grey).save(f"epoch_{epoch}.png")
    train_gan.save_gif(tmp_path)
    gif = Image.open("training.gif")
    gif.seek(2)
    assert gif.convert("L").getextrema() == (200, 200)
    assert gif.info["duration"] == 150
    assert gif.info["loop"] == 0, "it does not go on for ever"


def test_run_goes_on_where_excel_locks_the_table(monkeypatch):
    replace = Path.replace

    def locked(path, target):
        if Path(target).name == "losses.csv":
            raise PermissionError("losses.csv is locked")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", locked)
    assert "warning: losses.csv is locked" in run(f"{PHOTOS} --epochs 1")
    assert load(RUN)["history"]


def test_run_goes_on_where_a_picture_is_locked(monkeypatch):
    save = Mock(side_effect=PermissionError("real.png is locked"))
    monkeypatch.setattr("torchvision.utils.save_image", save)
    assert "warning: real.png is locked" in run(f"{PHOTOS} --epochs 1")
    assert load(RUN)["history"]


@mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # open file
def test_run_keeps_the_old_gif_where_a_picture_is_damaged():
    run(f"{PHOTOS} --epochs 1")
    before = contents(RUN)["training.gif"]
    os.truncate(RUN / "epoch_00001.png", 100)
    assert "warning: training.gif: " in run("--resume runs/001")
    assert contents(RUN)["training.gif"] == before


def test_run_is_saved_before_its_row_is_printed():
    class ClosedTerminal(io.StringIO):
        def write(self, text):
            if "loss_D" in text:
                raise OSError("the terminal is gone")
            return super().write(text)

    with redirect_stdout(ClosedTerminal()), suppress(SystemExit):
        train_gan.main(f"{PHOTOS} --epochs 1".split())
    assert len(load(RUN)["history"]) == 1


def test_run_stopped_before_its_first_save_leaves_an_empty_folder():
    losses.generator_loss = Mock(side_effect=KeyboardInterrupt)
    text = run(f"{PHOTOS} --epochs 1", 130)
    assert contents(RUN) == {}
    assert "--resume" not in text, "there is nothing to resume"


def test_run_names_the_epoch_that_diverges():
    text = run(f"{PHOTOS} --lr 1e38", 1)
    assert "epoch 1 diverged: try a lower --lr" in text
    assert contents(RUN) == {}


# --- resume and faults ----------------------------------------------------------------


def test_resume_ends_as_if_never_cut_off():
    flags = f"{PHOTOS} --dropout 0.3 --label-noise 0.1 --k 2"
    run(f"{flags} --epochs 50")
    run(f"{flags} --epochs 25")
    Path("runs/002/mine.tmp").write_text("not ours")
    run("--resume runs/002 --epochs 50")
    assert_same_run("runs/001", "runs/002")
    assert Path("runs/002/mine.tmp").exists()


@mark.parametrize("optimizer", ["opt_G", "opt_D"])
def test_resume_takes_the_settings_of_the_optimizers_from_the_flags(optimizer):
    run(f"{PHOTOS} --epochs 1")
    run("--resume runs/001 --epochs 2 --lr 0.5 --beta1 0.3")
    (group,) = load(RUN)[optimizer]["param_groups"]
    assert group["lr"] == 0.5, f"{optimizer} has not the --lr of the resumed run"
    assert group["betas"] == (0.3, 0.999), f"{optimizer} has not its --beta1"


def test_resume_keeps_the_run_s_flags_and_its_own():
    run(f"{PHOTOS} --k 3 --epochs 1 --out-dir my/run")
    run("--resume my/run --epochs 2 --r1 5")
    info = info_of("my/run")
    assert [info["k"], info["r1"], info["epochs"]] == [3, 5, 2]


def test_resume_keeps_to_the_data_set_that_auto_found():
    run(f"{SMALL} --epochs 1")
    assert "drawn [210, 1, 28, 28]" in run("--resume runs/001 --epochs 2")
    assert "warning" not in run("--resume runs/001 --epochs 3")


def test_resume_refuses_flags_that_do_not_fit_and_touches_nothing():
    run(f"{PHOTOS} --epochs 1")
    before = contents(RUN)
    text = run("--resume runs/001 --epochs 2 --z-dim 5", 1)
    assert "size mismatch" in text
    del before["training.gif"]
    after = contents(RUN)
    assert {name: after[name] for name in before} == before


def test_resume_refuses_fewer_epochs_and_touches_nothing():
    run(f"{PHOTOS} --epochs 3")
    before = contents(RUN)
    text = run("--resume runs/001 --epochs 2 --lr 0.5", 1)
    assert text == "error: --epochs 2: runs/001 has 3 epochs already\n"
    assert contents(RUN) == before


def test_resume_of_a_finished_run_scores_it_again_and_trains_nothing():
    run(f"{SMALL} --dataset drawn --epochs 1")
    before = info_of(RUN)
    assert "nats" in run("--resume runs/001 --lr 0.5")
    after = info_of(RUN)
    assert after["log_likelihood"] == approx(before["log_likelihood"])
    assert after["lr"] == before["lr"], "a flag that trained nothing was written"


def test_resume_warns_of_changed_data_before_any_error():
    run(f"{PHOTOS} --epochs 1")
    os.remove("photos/00.tiff")
    text = run("--resume runs/001 --epochs 2")
    assert "changed from [64, 1, 28, 28] to [63, 1, 28, 28]" in text
    Image.new("RGB", (28, 28), "red").save("photos/colour.png")
    text = run("--resume runs/001 --epochs 3", 1)
    assert "changed from [63, 1, 28, 28] to [64, 3, 28, 28]" in text
    assert text.index("warning") < text.index("error")


def test_resume_never_empties_the_table_where_the_columns_change():
    run(f"{PHOTOS} --epochs 1")
    train_epoch = train_gan.train_epoch
    train_gan.train_epoch = lambda *game: train_epoch(*game) | {"mine": 7.0}
    run("--resume runs/001 --epochs 2")
    train_gan.train_epoch = train_epoch
    run("--resume runs/001 --epochs 3")
    new_column = [row["mine"] for row in table_of(RUN)]
    assert new_column == ["", "7.0", ""], "losses.csv lost a new column or old rows"


def test_resume_after_a_kill():
    command = [sys.executable, train_gan.__file__, *PHOTOS.split(), "--epochs=999"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("      50"):
                process.kill()
    run("--resume runs/001 --epochs 100")
    run(f"{PHOTOS} --epochs 100")
    assert_same_run("runs/001", "runs/002")


def test_resume_after_ctrl_c():
    run(f"{PHOTOS} --epochs 1")
    os.remove(RUN / "training.gif")
    losses.generator_loss = Mock(side_effect=KeyboardInterrupt)
    text = run("--resume runs/001 --epochs 2", 130)
    assert f'--resume "{RUN}"' in text
    assert os.path.exists(RUN / "training.gif")


def test_resume_after_a_full_disk(monkeypatch):
    run(f"{PHOTOS} --epochs 1")
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=OSError("disk full")))
    assert "error: disk full" in run("--resume runs/001 --epochs 2", 1)
    assert len(load(RUN)["history"]) == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("marker",)


@mark.parametrize("content", [Evil(), {"epoch": 3}])
def test_resume_refuses_what_is_no_checkpoint(content):
    torch.save(content, "checkpoint.pt")
    text = run("--resume .", 1)
    assert "error: no whole run of this version in --resume .: " in text
    assert text.count("\n") == 1
    assert not os.path.exists("marker"), "a program in the file was run"


def test_resume_refuses_half_a_checkpoint():
    run(f"{PHOTOS} --epochs 1")
    os.truncate(RUN / "checkpoint.pt", 9000)
    assert run("--resume runs/001", 1).count("\n") == 1


def test_resume_names_the_file_that_is_not_there():
    assert f"{Path('nowhere/checkpoint.pt').name}" in run("--resume nowhere", 1)


# --- command line ---------------------------------------------------------------------

WRONG = {
    "--k 0": "0 is not in [1, inf)",
    "--epochs 1.5": "1.5",
    "--g-hidden 10,20": "10,20",
    "--batch-size 1": "1 is not in [2, inf)",
    "--lr -1": "-1 is not in [0, inf)",
    "--lr nan": "nan is not in [0, inf)",
    "--r1 inf": "inf is not in [0, inf)",
    "--dropout 1": "1 is not in [0, 1)",
    "--ema -0.1": "-0.1 is not in [0, 1)",
    "--seed x": "x",
    "--seed -1": "-1 is not in [0, ",
    "--loss hinge": "choose from",
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
    for group in ("data and files:", "the networks:", "the game:", "the optimisation:"):
        assert group in text


@mark.parametrize(
    "cuda, mps, best",
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_command_line_takes_the_best_device(monkeypatch, capsys, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert train_gan.choose_device("auto") == best
    assert train_gan.choose_device("quantum") == best
    text = capsys.readouterr().err
    assert f"no quantum here, training on {best}: RuntimeError: Expected one of" in text


def test_command_line_takes_any_device_that_torch_has():
    assert train_gan.choose_device("cpu:0") == "cpu:0"


def test_command_line_gives_torch_s_reason_in_one_line(monkeypatch, capsys):
    error = RuntimeError("invalid device ordinal\nCompile with DSA. See the manual.")
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=error))
    train_gan.choose_device("cuda:7")
    text = capsys.readouterr().err
    assert "RuntimeError: invalid device ordinal Compile with DSA\n" in text
    assert text.count("\n") == 1


def test_command_line_writes_over_nothing_but_an_empty_folder():
    os.mkdir("empty")
    Path("empty/.DS_Store").write_text("Apple's")
    run(f"{PHOTOS} --epochs 1 --out-dir empty")
    text = run(f"{PHOTOS} --out-dir photos", 1)
    assert text == "error: --out-dir photos is not empty: name a new one\n"


# --- README ---------------------------------------------------------------------------

COLUMNS = [
    "z_dim",
    "g_hidden",
    "d_hidden",
    "batch_norm",
    "dropout",
    "g_leak",
    "d_leak",
    "lr",
    "batch_size",
    "epochs",
]
SYSTEMS = {
    "A": [64, [128, 256, 512, 1024], [512, 256, 128], True, 0, 0, 0.2, 1e-5, 128, 100],
    "B": [
        100,
        [256, 512, 1024],
        [1024, 512, 256],
        False,
        0.2,
        0.01,
        0.01,
        2e-4,
        128,
        40,
    ],
    "D": [64, [256, 256], [256, 256], False, 0, 0, 0.2, 2e-4, 100, 300],
}


@mark.parametrize("system", ["A", "B", "C", "D", "E"])
def test_readme_builds_the_five_systems(system):
    os.rename("photos", "my_photos")
    (flags,) = re.findall(rf"\| {system}\. .*`python train_gan.py (.*)`", README)
    args = train_gan.parse_args(flags.split())
    assert [args.k, args.beta1, args.r1, args.ema] == [1, 0.9, 0, 0]
    ours = [vars(args)[column] for column in COLUMNS]
    assert SYSTEMS.get(system, ours) == ours


def test_readme_commands_run():
    os.rename("photos", "my_photos")
    for flags in re.findall(r"train_gan\.py (--(?!help)[^`\n]+)", README):
        run(f"{flags} --dataset my_photos --device cpu --epochs 1")


def test_readme_snippets_run(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    run(f"{SMALL} --dataset drawn --epochs 1")
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        with suppress(ModuleNotFoundError):  # pandas
            exec(block, {})  # noqa: S102
