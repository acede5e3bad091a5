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
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import torch
from PIL import Image
from pytest import approx, fixture, mark
from torch import distributions, nn
from torch.testing import assert_close

import losses
import train_gan
from models import Discriminator, Generator, load_generator, update_average
from train_gan import load_folder

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
SMALL = "--z-dim 4 --g-hidden 8 --d-hidden 8 --batch-size 16 --device cpu"
PHOTOS = f"{SMALL} --dataset photos"
pytestmark = mark.filterwarnings("error:::(train_gan|models|losses|argparse)")


@fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """An empty folder with 64 photos of noise, few digits to draw, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gan, "DRAWN", [210, 16])
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=OSError("no network")))
    torch.manual_seed(0)
    save_pictures("photos", torch.randint(0, 256, (64, 28, 28)))


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


def assert_same_run(a, b):
    """Equal weights, optimisers and pictures, bit for bit."""
    one, two = load(a), load(b)
    for name in ("G", "D", "G_average", "opt_G", "opt_D"):
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
    assert float(losses.discriminator_loss(zeros, zeros)) == approx(math.log(4))
    assert float(losses.generator_loss(zeros)) == approx(math.log(2))


LOSSES = {  # as functions of the logits, and on paper, as functions of p = D(...)
    "D": (
        lambda x: losses.discriminator_loss(x[0], x[1], 0.9),
        lambda p: -(0.9 * p[0].log() + 0.1 * (1 - p[0]).log() + (1 - p[1]).log()),
    ),
    "G": (losses.generator_loss, lambda p: -p.log()),
    "minimax": (losses.minimax_generator_loss, lambda p: (1 - p).log()),
}


@mark.parametrize("loss, paper", LOSSES.values())
def test_losses_are_the_logarithms_of_the_paper(loss, paper):
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    values = [loss(logits), paper(logits.sigmoid()).mean()]
    assert_close(*values)
    gradients = [torch.autograd.grad(value, logits) for value in values]
    assert_close(*gradients, msg="the gradient differs")


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


def test_networks_are_the_perceptrons_of_their_arguments():
    rest = [nn.LeakyReLU(0.1, inplace=True), nn.Dropout(0.2)]
    hidden = [nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), *rest]
    G = nn.Sequential(*hidden, nn.Linear(4, 12), nn.Tanh())
    assert repr(Generator(3, [4], (3, 2, 2), True, 0.2, 0.1).net) == repr(G)


# --- one step: train_epoch ------------------------------------------------------------


def make_game(flags=""):
    """What a run of the photos gives to train_epoch, here for its third epoch."""
    epoch = Mock(side_effect=KeyboardInterrupt)
    with patch.object(train_gan, "train_epoch", epoch):
        run(f"{PHOTOS} {flags}", 130)
    args, images, _, *rest = epoch.call_args.args
    return [args, images, 3, *rest]  # rest: G, D, G_average, opt_G, opt_D


def naive_epoch(args, images, epoch, G, D, G_average, opt_G, opt_D):
    """As tutorials write it: a pass for each half, and gradients for everyone."""
    torch.manual_seed(args.seed * 1_000_003 + epoch)
    n = max(1, len(images) // args.batch_size)
    batches = images[torch.randperm(len(images))].tensor_split(n)
    for i, batch in enumerate(batches, 1):
        x = batch / 255 * 2 - 1
        fake = G(torch.randn(len(x), args.z_dim))
        loss = losses.discriminator_loss(D(x), D(fake.detach()))
        if ((epoch - 1) * n + i) % 4 == 0:
            loss = loss + 4 * args.r1 * losses.r1_penalty(D, x)
        opt_D.zero_grad()
        loss.backward()
        opt_D.step()
        if i % args.k == 0 or i == n:
            opt_G.zero_grad()
            losses.generator_loss(D(fake)).backward()
            opt_G.step()
            G_steps = (epoch - 1) * math.ceil(n / args.k) + math.ceil(i / args.k)
            decay = min(args.ema, (1 + G_steps) / (10 + G_steps))
            update_average(G_average, G, decay)


def test_step_clears_the_gradients_of_the_last_step():
    game = make_game()
    weights = [*game[3].parameters(), *game[4].parameters()]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e9)
    train_gan.train_epoch(*game)
    for weight in weights:
        assert weight.grad.max() < 1e6, "gradients of the last step were not cleared"


@mark.parametrize(
    "flags", ["--k 2 --r1 3 --batch-size 21 --seed 4", "--ema 0.3", "--dataset colour"]
)
def test_step_by_step_equals_the_naive_loop(flags):
    save_pictures("colour", 255 * torch.rand(9, 28, 28, 3))
    game, twin = make_game(f"--lr 0.1 {flags}"), make_game(f"--lr 0.1 {flags}")
    for opt in game[6:] + twin[6:]:
        opt.param_groups[0]["eps"] = 1  # else Adam blows up rounding errors
    train_gan.train_epoch(*game)
    naive_epoch(*twin)
    ours, theirs = ([net.state_dict() for net in nets[3:6]] for nets in (game, twin))
    assert_close(ours, theirs, rtol=0.01, atol=1e-3)


@mark.parametrize("opt, net", [(6, 3), (7, 4)])
def test_step_of_one_leaves_the_other(opt, net):
    game = make_game()
    game[opt].step = Mock()
    before = copy.deepcopy(list(game[net].parameters()))
    train_gan.train_epoch(*game)
    assert_close(list(game[net].parameters()), before, msg="the other's step moved it")


def test_step_of_G_learns_through_the_updated_D():
    """D is 1/2 everywhere, with all weights 0; its update sets the last to log 3."""
    game = make_game("--r1 0 --batch-size 64")
    weights = list(game[4].parameters())
    for weight in weights:
        nn.init.zeros_(weight)
    game[7].step = lambda: nn.init.constant_(weights[-1], math.log(3))
    means = train_gan.train_epoch(*game)
    known = {"D_x": 0.5, "D_G_z1": 0.5, "acc_D": 0, "D_G_z2": 0.75}
    assert means | known == approx(means)


def test_step_of_G_comes_after_k_steps_of_D():
    game = make_game("--k 3")
    game[6:] = Mock(), Mock()
    train_gan.train_epoch(*game)
    assert game[7].step.call_count == 4
    assert game[6].step.call_count == 2, "after step 3, and after the last"


def test_step_keeps_the_average_in_eval_mode():
    assert not make_game()[5].training, "the average of G is not in eval mode"


def test_step_moves_the_average_by_its_formula():
    average, G = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    G(torch.randn(5, 3))
    update_average(average, G, 0.3)
    assert_close(average.running_var, 0.3 + 0.7 * G.running_var)
    assert average.num_batches_tracked == 0


# --- evaluation -----------------------------------------------------------------------


def test_evaluation_is_a_mixture_of_gaussians_around_the_samples():
    """Sigma suits the first 1,000 of the last 10,000 training images, here grey."""
    images = torch.zeros(10_500, 2)
    images[500:1500] = grey = torch.tensor([[99, 150]])
    test = torch.randint(0, 256, (30, 2))
    samples = 0.3 + 0.4 * torch.rand(50, 2)

    best = max(
        torch.logspace(-1, 0, 10),
        key=lambda sigma: train_gan.log_density(grey, samples, sigma),
    )
    windows = distributions.Independent(distributions.Normal(samples, best), 1)
    weights = distributions.Categorical(torch.ones(50))
    mixture = distributions.MixtureSameFamily(weights, windows)
    scores = mixture.log_prob(test / 255)
    mean, error = train_gan.parzen(samples, images, test)
    assert mean == approx(float(scores.mean()), abs=1e-4)
    assert error == approx(float(scores.std()) / math.sqrt(30), rel=1e-4)


# --- data -----------------------------------------------------------------------------


@mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<f4"])
def test_data_of_16_bits_or_more_has_one_scale(dtype):
    save_pictures("mine", [[[1000, 20000]] * 2, [[40000, 65535]] * 2], dtype)
    assert load_folder("mine", 2)[:, 0, 0].tolist() == [[0, 75], [154, 255]]


def test_data_keeps_red_green_and_blue_and_crops_to_a_square():
    save_pictures("mine", [[[[255, 100, 0]] * 2] * 2, [[5, 1, 1, 5]] * 2])
    assert load_folder("mine", 2)[:, :, 1, 1].tolist() == [[255, 100, 0], [1, 1, 1]]


def test_data_lies_on_white_and_a_flat_folder_warns(capsys):
    save_pictures("mine", [[[[255, 0, 0, 0]] * 2] * 2] * 2)
    assert load_folder("mine", 2).float().mean() == 255
    assert "one flat colour" in capsys.readouterr().err


def test_data_counts_what_it_cannot_read(capsys, monkeypatch):
    """A folder without permission, and an infinite pixel."""
    save_pictures("mine", [[[1.0, math.inf]], [[1, 2]], [[3, 4]]], "f4")
    monkeypatch.setattr(os, "listdir", Mock(side_effect=PermissionError(13, "denied")))
    assert len(load_folder("mine", 1)) == 2
    assert "2 unreadable, the first is mine/: Perm" in capsys.readouterr().err


def test_data_follows_links_and_leaves_out_hidden_folders():
    os.mkdir("mine")
    for name in ("link", ".hidden"):
        os.symlink(os.path.abspath("photos"), f"mine/{name}")
    assert len(load_folder("mine", 2)) == 64


def test_data_sets_have_channels(monkeypatch):
    mnist = Mock(return_value=SimpleNamespace(data=torch.ones(9, 28, 28)))
    monkeypatch.setitem(train_gan.DATASETS, "mnist", mnist)
    assert "mnist [9, 1, 28, 28]" in run(f"{SMALL} --epochs 1")


def test_data_that_cannot_be_had_says_why_and_what_is_missing():
    text = run("--dataset mnist", 1)
    assert "no network" in text
    assert "train-images-idx3-ubyte" in text
    text = run(f"{SMALL} --epochs 1")
    assert text.startswith("warning: no mnist in --data-dir data: ")
    assert "runs/001: drawn [210, 1, 28, 28], cpu" in text


def test_data_drawn_is_the_same_at_every_call():
    images, _ = train_gan.draw_digits()
    assert torch.equal(images, train_gan.draw_digits()[0])
    assert 42 < images.float().mean() < 44


# --- a whole run ----------------------------------------------------------------------


def info_of(folder):
    return json.loads(Path(folder, "run.json").read_text())


def test_run_writes_its_files():
    run(f"{SMALL} --dataset drawn --batch-size 20 --epochs 25 --seed {10**30}")
    assert sorted(os.listdir("runs/001")) == [
        "checkpoint.pt",
        "epoch_00010.png",  # every 100 steps; an epoch has 10
        "epoch_00020.png",
        "epoch_00025.png",
        "losses.csv",
        "real.png",
        "run.json",
        "training.gif",
    ]
    assert (
        Path("runs/001/losses.csv")
        .read_text()
        .startswith("epoch,loss_D,D_x,D_G_z1,acc_D,loss_G,D_G_z2,seconds")
    )


def test_run_says_in_json_what_it_was():
    text = run(f"{SMALL} --dataset drawn --epochs 1")
    info = info_of("runs/001")
    assert info["torch"] == torch.__version__
    assert f"{info['log_likelihood']:.1f} +- {info['standard_error']:.1f} nats" in text


def test_run_draws_the_average_of_G_in_eval_mode():
    run(f"{PHOTOS} --epochs 1 --dropout 0.3")
    G = load_generator("runs/001")
    torch.manual_seed(0)
    train_gan.utils.save_image(G(torch.randn(64, 4)) / 2 + 0.5, "expected.png")
    same = filecmp.cmp("runs/001/epoch_00001.png", "expected.png", shallow=False)
    assert same, "the picture is not of the average of G in eval mode"


def test_run_learns():
    flags = "--dataset drawn --batch-size 32 --device cpu"
    run(f"{flags} --lr 0 --epochs 1")
    run(f"{flags} --epochs 20")
    before = info_of("runs/001")["log_likelihood"]
    assert info_of("runs/002")["log_likelihood"] > before + 100


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


def test_run_makes_a_gif_in_the_order_of_the_epochs(tmp_path):
    for grey, epoch in enumerate(["00002", "99999", "100000"]):
        Image.new("L", (8, 8), 100 * grey).save(f"epoch_{epoch}.png")
    train_gan.write_gif(tmp_path)
    gif = Image.open("training.gif")
    gif.seek(2)
    assert gif.convert("L").getextrema() == (200, 200)


def test_run_goes_on_where_excel_locks_the_table(monkeypatch):
    monkeypatch.setattr(csv, "DictWriter", Mock(side_effect=PermissionError("locked")))
    assert "warning: locked" in run(f"{PHOTOS} --epochs 1")
    assert load("runs/001")["history"]


# --- resume and faults ----------------------------------------------------------------


def test_resume_ends_as_if_never_cut_off():
    flags = f"{PHOTOS} --dropout 0.3 --label-noise 0.1 --k 2"
    run(f"{flags} --epochs 50")
    run(f"{flags} --epochs 25")
    Path("runs/002/mine.tmp").write_text("not ours")
    run("--resume runs/002 --epochs 50")
    assert_same_run("runs/001", "runs/002")
    assert Path("runs/002/mine.tmp").exists()


def test_resume_takes_a_flag_from_here_on():
    run(f"{PHOTOS} --epochs 1")
    run("--resume runs/001 --epochs 2 --lr 0.5 --beta1 0.3")
    group = load("runs/001")["opt_G"]["param_groups"][0]
    assert group["lr"] == 0.5
    assert group["betas"] == (0.3, 0.999)


def test_resume_refuses_flags_that_do_not_fit_the_weights():
    run(f"{PHOTOS} --epochs 1")
    assert "size mismatch" in run("--resume runs/001 --z-dim 5", 1)


def test_resume_after_a_kill():
    command = [sys.executable, train_gan.__file__, *PHOTOS.split(), "--epochs=999"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("      50"):
                process.kill()
    run("--resume runs/001 --epochs 150")
    run(f"{PHOTOS} --epochs 150")
    assert_same_run("runs/001", "runs/002")


def test_resume_after_ctrl_c(monkeypatch):
    run(f"{PHOTOS} --epochs 1")
    os.remove("runs/001/training.gif")
    monkeypatch.setattr(train_gan, "train_epoch", Mock(side_effect=KeyboardInterrupt))
    text = run("--resume runs/001 --epochs 2", 130)
    assert '--resume "runs/001"' in text
    assert os.path.exists("runs/001/training.gif")


def test_resume_after_a_full_disk(monkeypatch):
    run(f"{PHOTOS} --epochs 1")
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=OSError("disk full")))
    assert "error: disk full" in run("--resume runs/001 --epochs 2", 1)
    assert len(load("runs/001")["history"]) == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("marker",)


@mark.parametrize("content", [Evil(), {"epoch": 3}])
def test_resume_refuses_what_is_no_checkpoint(content):
    torch.save(content, "checkpoint.pt")
    assert "error: --resume .: " in run("--resume .", 1)
    assert not os.path.exists("marker"), "a program in the file was run"


def test_resume_refuses_half_a_checkpoint():
    run(f"{PHOTOS} --epochs 1")
    os.truncate("runs/001/checkpoint.pt", 9000)
    run("--resume runs/001", 1)


# --- command line ---------------------------------------------------------------------

WRONG = [
    "--k 0",
    "--epochs 1.5",
    "--g-hidden 10,20",
    "--lr -1",
    "--lr nan",
    "--r1 inf",
    "--dropout 1",
    "--ema -0.1",
    "--seed x",
    "--loss hinge",
]


@mark.parametrize("flag", WRONG)
def test_command_line_refuses_in_one_line(flag):
    text = run(flag, 2)
    assert flag.split()[0] in text
    assert text.count("\n") == 1


def test_command_line_takes_the_best_device_that_is_here():
    assert "no mps here" in run(f"{PHOTOS} --epochs 1 --device mps")


def test_command_line_names_a_run_that_diverges():
    assert "epoch 1 diverged" in run(f"{PHOTOS} --lr 1e38", 1)


def test_command_line_writes_over_nothing_but_an_empty_folder():
    os.mkdir("empty")
    run(f"{PHOTOS} --epochs 1 --out-dir empty")
    assert "--out-dir photos is not empty" in run(f"{PHOTOS} --out-dir photos", 1)


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
    (flags,) = re.findall(rf"\| {system}\. .*`python train_gan.py (.*)`", README)
    args, _ = train_gan.parse_args(flags.split())
    assert [args.k, args.beta1, args.r1, args.ema] == [1, 0.9, 0, 0]
    ours = [vars(args)[column] for column in COLUMNS]
    assert SYSTEMS.get(system, ours) == ours


def test_readme_commands_and_snippets_run(monkeypatch):
    monkeypatch.setattr(train_gan, "parzen", Mock(return_value=(0.0, 0.0)))
    monkeypatch.setenv("MPLBACKEND", "agg")
    os.rename("photos", "my_photos")
    for flags in re.findall(r"python train_gan\.py (--(?!help)[^`\n]+)", README):
        data = "" if "my_photos" in flags else "--dataset drawn"
        run(f"{flags} {data} --device cpu --epochs 1")
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        with suppress(ModuleNotFoundError):  # pandas
            exec(block, {})  # noqa: S102
