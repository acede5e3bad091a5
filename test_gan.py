"""What a GAN must satisfy: python -m pytest test_gan.py (no network, no GPU, 20 s).

The tests stand in the order of a course. One part alone: -k test_losses_ (or networks,
step, epoch, evaluation, data, run, resume or command_line in its place).
"""

import copy
import io
import json
import os
import shutil
from collections import defaultdict
from contextlib import redirect_stdout, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import torch
from PIL import Image
from pytest import MonkeyPatch, approx, fixture, mark, raises
from torch import distributions, nn
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

import losses
import train_gan
from models import Discriminator, Generator, load_checkpoint, load_generator

SMALL = "--z-dim 4 --g-hidden 8 --d-hidden 8 --batch-size 16 --device cpu"
PHOTOS = f"{SMALL} --dataset photos"
RUN, RUN_2 = Path("runs/001"), Path("runs/002")


def make_small_world(folder, monkeypatch):
    """An empty folder with 64 photos of noise, short epochs, and no network."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train_gan, "EPOCH_IMAGES", 64)
    monkeypatch.setattr(train_gan, "DRAWN", [210, 16])
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=OSError("no network")))
    torch.manual_seed(0)
    save_pictures("photos", torch.randint(0, 256, (64, 28, 28)))


@fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    make_small_world(tmp_path, monkeypatch)


@fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, which several tests read: its folder, its G, what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with MonkeyPatch.context() as monkeypatch, redirect_stdout(io.StringIO()) as text:
        make_small_world(folder, monkeypatch)
        run(f"{SMALL} --dataset drawn --epochs 3 --dropout 0.3")
        _, G = run("--resume runs/001 --epochs 4")
    return SimpleNamespace(run=folder / RUN, G=G, text=text.getvalue())


def save_pictures(folder, pictures):
    os.makedirs(folder)
    for n, pixels in enumerate(pictures):
        pixels = torch.as_tensor(pixels).byte().numpy()
        Image.fromarray(pixels).save(f"{folder}/{n:02}.png")


def run(flags):
    return train_gan.main(flags.split())


def info_of(folder):
    return json.loads(Path(folder, "run.json").read_text())


# --- losses ---------------------------------------------------------------------------
def test_losses_by_hand():
    """For a pocket calculator: D(x) = 0.8 is logit log(0.8 / 0.2), D(G(z)) = 0.4."""
    real, fake = torch.tensor(1.3863), torch.tensor(-0.4055)
    loss_D = float(losses.discriminator_loss(real, fake))
    loss_G = float(losses.generator_loss(fake))
    assert round(loss_D, 3) == 0.734, f"D's {loss_D} is not -log 0.8 - log(1 - 0.4)"
    assert round(loss_G, 3) == 0.916, f"G's loss {loss_G} is not -log 0.4"


def test_losses_are_the_logarithms_of_the_paper():
    """Values and gradients, with p = D(x) and q = D(G(z))."""
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    p, q = logits.sigmoid()
    loss_D = losses.discriminator_loss(*logits, real_label=0.9)
    paper = {
        "D": (loss_D, -0.9 * p.log() - 0.1 * (1 - p).log() - (1 - q).log()),
        "G": (losses.generator_loss(logits[1]), -q.log()),
        "minimax": (losses.minimax_generator_loss(logits[1]), (1 - q).log()),
    }
    for name, (ours, theirs) in paper.items():
        values = [ours, theirs.mean()]
        assert_close(*values, msg=f"the value of {name}'s loss is not the paper's")
        slopes = [torch.autograd.grad(v, logits, retain_graph=True) for v in values]
        assert_close(*slopes, msg=f"the gradient of {name}'s loss is not the paper's")


def test_losses_teach_D_where_it_is_surely_wrong():
    logits = torch.tensor([-30.0, 30.0], requires_grad=True)  # of real, of fake
    losses.discriminator_loss(*logits).backward()
    assert_close(logits.grad, torch.tensor([-1.0, 1.0]), msg="no slope of -1 and 1")


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


# --- networks -------------------------------------------------------------------------
def test_networks_D_returns_logits_not_probabilities():
    logits = Discriminator()(1000 * torch.randn(20, 1, 28, 28))
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


# --- one step and one epoch: train_epoch ----------------------------------------------
def make_game(flags="", n=64, channels=1):
    """All that train_epoch takes, with n images of noise, in the fourth epoch."""
    torch.manual_seed(0)
    shape = (channels, 28, 28)
    G = Generator(64, [8], shape)
    D = Discriminator([8], shape)
    return SimpleNamespace(
        args=train_gan.parse_args(f"--batch-size 16 {flags}".split()),
        images=torch.randint(0, 256, (n, *shape), dtype=torch.uint8),
        epoch=4,
        G=G,
        D=D,
        G_ema=copy.deepcopy(G).eval().requires_grad_(False),
        opt_G=torch.optim.SGD(G.parameters(), 0.1),
        opt_D=torch.optim.SGD(D.parameters(), 0.1),
    )


def inputs_of(*networks):
    """A list, to which each call of one of the networks adds its input."""
    inputs = []
    for network in networks:
        network.register_forward_pre_hook(lambda _, args: inputs.extend(args))
    return inputs


def test_step_of_D_ends_at_the_fakes():
    game = make_game()
    inputs = inputs_of(game.D)
    with suppress(RuntimeError):  # PyTorch's, where G's step has lost its graph
        train_gan.train_epoch(**vars(game))
    assert not inputs[1].requires_grad, "D's step goes on into G: detach() the fakes"


@mark.parametrize("name", ["D", "G"])
def test_step_clears_the_gradients_of_the_last_step(name):
    game = make_game()
    weights = list(getattr(game, name).parameters())
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e9)
    train_gan.train_epoch(**vars(game))
    largest = max(weight.grad.max() for weight in weights)
    assert largest < 1e6, f"zero_grad: {name}'s old gradients are still there"


def test_step_of_G_comes_after_each_k_steps_of_D_also_across_epochs():
    steps = []
    for epoch in (1, 2, 3):
        game = make_game("--k 3")  # an epoch has four steps of D
        game.epoch = epoch
        game.opt_D.step = lambda: steps.append("D")
        game.opt_G.step = lambda: steps.append("G")
        train_gan.train_epoch(**vars(game))
    assert "".join(steps) == "DDDG" * 4, "k must count over all epochs"


def naive_epoch(batches, args, images, epoch, G, D, G_ema, opt_G, opt_D):
    """As tutorials write it: backward() gives gradients to everyone."""
    log = defaultdict(list)
    step = (epoch - 1) * len(batches)
    for z, x in batches:
        step += 1
        fake = G(z)
        real_logits, fake_logits = D(x), D(fake.detach())
        loss_D = losses.discriminator_loss(real_logits, fake_logits)
        log["loss_D"].append(loss_D)
        log["D_x"].append(real_logits.sigmoid().mean())
        log["D_G_z1"].append(fake_logits.sigmoid().mean())
        right = (real_logits > 0).sum() + (fake_logits < 0).sum()
        log["acc_D"].append(right / (2 * len(x)))
        if step % 4 == 0:
            loss_D = loss_D + 4 * args.r1 * losses.r1_penalty(D, x)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        if step % args.k == 0:
            loss_G = losses.generator_loss(D(fake))
            log["loss_G"].append(loss_G)
            log["D_G_z2"].append(D(fake).sigmoid().mean())
            opt_G.zero_grad()
            loss_G.backward()
            opt_G.step()
            G_steps = step // args.k
            decay = min(args.ema, (1 + G_steps) / (10 + G_steps))
            for name, old in G_ema.state_dict().items():
                if old.is_floating_point():  # all but BatchNorm's count of batches
                    old.copy_(decay * old + (1 - decay) * G.state_dict()[name])
    return log


CASES = [("--k 2 --r1 3 --batch-size 21", 64, 1), ("--ema 0.3", 30, 1), ("", 64, 3)]


@mark.parametrize("flags, n, channels", CASES, ids=["k", "average", "colour"])
def test_step_by_step_equals_the_naive_loop(flags, n, channels):
    """The naive loop gets the noise of our game, and the images that D saw next."""
    game, naive = [make_game(flags, n, channels) for _ in range(2)]
    inputs = inputs_of(game.G, game.D)
    means = train_gan.train_epoch(**vars(game))
    batches = [(z, x) for z, x in pairwise(inputs) if z.dim() == 2]
    assert inputs[1].aminmax() == (-1, 1), "D must see pixels from -1 to 1"
    log = naive_epoch(batches, **vars(naive))
    for part in ("D", "G", "G_ema"):
        states = [getattr(game, part).state_dict() for game in (game, naive)]
        assert_close(*states, rtol=1e-3, atol=1e-4, msg=f"{part} differs")
    for name, values in log.items():
        expected = approx(sum(values).item() / len(values), rel=1e-4)
        assert means[name] == expected, f"{name} is logged wrongly (loss_D with R1?)"


def test_epoch_shows_all_images_equally_often():
    for n_images, k, n_shown in [(100, 1, 100), (7, 1, 64), (7, 3, 90)]:
        args = train_gan.parse_args(["--batch-size", 30, "--k", k])
        batches = train_gan.shuffled_batches(args, torch.zeros(n_images))
        times = torch.cat(batches).bincount()
        assert times.sum() == n_shown, "an epoch has another number of images"
        assert times.max() - times.min() <= 1, f"unequally often: {times}"
        assert min(len(batch) for batch in batches) >= 30, "a batch is too small"


# --- evaluation -----------------------------------------------------------------------
def test_evaluation_is_a_mixture_of_gaussians_around_the_samples():
    """The first 1,000 of the last 10,000 images are black: sigma 0.599 suits them."""
    images = torch.full((10_500, 2), 150)
    images[500:1500] = 0
    test_images = torch.randint(0, 256, (30, 2))
    samples = 0.4 + 0.4 * torch.rand(50, 2)
    windows = distributions.Normal(samples, 10 ** (-2 / 9))
    scores = windows.log_prob(test_images[:, None] / 255).sum(2).exp().mean(1).log()
    torch.set_float32_matmul_precision("medium")  # as the training leaves it
    mean, error = train_gan.parzen(samples, images, test_images)
    assert mean == approx(scores.mean().item(), abs=1e-4), "not of the best mixture"
    assert error == approx(scores.std().item() / 30**0.5), "not std / sqrt(n)"
    assert torch.get_float32_matmul_precision() == "highest", "products are rounded"


def test_evaluation_of_500_images_by_hand():
    """One pixel: images are 0.6, samples 0.2. Of the ten sigmas, 0.3594 is the best.

    -(0.6 - 0.2)^2 / (2 * 0.3594^2) - log(0.3594 * sqrt(2 pi)) = -0.6193 + 0.1044
    """
    G = Mock(side_effect=lambda z: z[:, :1] * 0 - 0.6)  # -0.6 in [-1, 1] is 0.2
    images = torch.full((500, 1), 153)
    Path("run.json").write_text('{"seed": 7}')
    train_gan.score(G, train_gan.parse_args([]), images, images[:5], Path())
    info = info_of(".")
    assert info["log_likelihood"] == approx(-0.5149, abs=1e-3), "another sigma"
    assert info["seed"] == 7, "the other facts of run.json are lost"
    assert G.call_args.args[0].shape == (10_000, 64), "not 10,000 samples"


# --- data -----------------------------------------------------------------------------
def test_data_keeps_colours_is_cropped_to_a_square_and_lies_on_white():
    colour, wide, transparent = [[255, 100, 0]], [5, 1, 1, 5], [[255, 0, 0, 0]]
    save_pictures("mine", [[colour * 2] * 2, [wide] * 2, [transparent * 2] * 2])
    pixels = train_gan.load_folder("mine", 2)[:, :, 1, 1].tolist()
    assert pixels == [[255, 100, 0], [1, 1, 1], [255, 255, 255]]


def test_data_is_turned_as_the_camera_was():
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.linear_gradient("L").save("photo.png", exif=turned)  # black above white
    pixels = train_gan.load_image("photo.png", 2)
    assert pixels[0, 0, 0] > pixels[0, 1, 0], "the photo is upside down"


def test_data_is_every_whole_image_below_the_folder_that_is_not_hidden(capsys):
    shutil.copytree("photos", "photos/.hidden")
    shutil.copytree("photos", "photos/below/it")
    Image.new("I;16", (2, 2)).save("photos/00.tiff")
    os.truncate("photos/01.png", 300)
    assert train_gan.load_folder("photos", 2).shape == (127, 1, 2, 2)
    reason = "ValueError('grey with more than 8 bits: convert it to 8')"
    first = f"The first is {Path('photos', '00.tiff')}: {reason}"
    assert f"warning: 2 files are skipped. {first}" in capsys.readouterr().out


def test_data_set_is_downloaded_and_gets_a_channel(monkeypatch):
    mnist = Mock(return_value=SimpleNamespace(data=torch.ones(9, 28, 28), targets=0))
    monkeypatch.setitem(train_gan.DATASETS, "mnist", mnist)
    images, test_images = train_gan.load_data(train_gan.parse_args([]))[1:3]
    assert images.shape == test_images.shape == (9, 1, 28, 28)
    assert mnist.call_args.kwargs == {"train": False, "download": True}


def test_data_set_with_a_programming_error_shows_it(monkeypatch):
    monkeypatch.setitem(train_gan.DATASETS, "mnist", Mock(side_effect=NameError))
    with raises(NameError):
        run(SMALL)


def test_data_set_without_internet_is_drawn_and_a_resumed_run_keeps_it(capsys):
    run(f"{SMALL} --epochs 1")
    text = capsys.readouterr().out
    assert text.startswith("warning: training on --dataset drawn: no mnist: data/")
    assert "no network" in text, "the reason is lost"
    assert 20 < train_gan.draw_digits()[0].float().mean() < 80, "not white on black"
    run("--resume runs/001 --epochs 2")
    assert "warning" not in capsys.readouterr().out


# --- a whole run ----------------------------------------------------------------------
def test_run_saves_a_picture_in_every_epoch(finished):
    names = sorted(path.name[-6:] for path in finished.run.glob("epoch_*"))
    assert names == ["01.png", "02.png", "03.png", "04.png"], "one lacks its picture"
    assert (finished.run / "training.gif").exists()


def test_run_draws_and_returns_the_average_of_G_in_eval_mode(finished):
    torch.manual_seed(0)
    z = torch.randn(64, 4)
    samples = load_generator(finished.run)(z)
    save_image(samples / 2 + 0.5, "expected.png")
    paths = ["expected.png", finished.run / "epoch_00004.png"]
    pixels = [pil_to_tensor(Image.open(path)).int() for path in paths]
    message = "G in training mode, other samples, or another grid"
    assert_close(*pixels, rtol=0, atol=2, msg=message)  # GPUs round
    assert_close(finished.G(z), samples, msg="main() returns another G")


def test_run_writes_and_prints_its_history(finished):
    history = load_checkpoint(finished.run)["history"]
    table = (finished.run / "losses.csv").read_text().splitlines()
    assert table[0] == ",".join(history[0]), "losses.csv has other columns"
    row = ",".join(str(value) for value in history[3].values())
    assert table[4] == row, "losses.csv and the checkpoint tell two stories"
    printed = [line.split() for line in finished.text.splitlines()]
    assert printed[printed.index(list(history[0])) + 1][0] == "1/3", "no names above it"
    row = [f"{value:.3f}" for value in history[3].values()]
    assert ["4/4", *row[1:]] in printed, "the printed row is not the table's"


def test_run_says_in_json_what_it_was(finished):
    info = info_of(finished.run)
    assert [info["dataset"], info["images"]] == ["drawn", [210, 1, 28, 28]]
    assert "drawn [210, 1, 28, 28] on cpu, into " in finished.text
    assert [info["epochs_done"], info["device"], info["dropout"]] == [4, "cpu", 0.3]
    score = f"{info['log_likelihood']:.1f} +- {info['standard_error']:.1f} nats\n"
    assert finished.text.endswith(score), "the printed score is not that of run.json"


def test_run_learns():
    flags = "--dataset drawn --batch-size 32 --device cpu"
    run(f"{flags} --lr 0 --epochs 1")
    run(f"{flags} --epochs 20")
    untrained, score = (info_of(path)["log_likelihood"] for path in (RUN, RUN_2))
    assert score > untrained + 100, f"no better: {untrained}, then {score} nats"


GAME_FLAGS = ["--z-dim 5", "--g-hidden 9", "--d-hidden 9", "--no-batch-norm", "--k 2"]
GAME_FLAGS += ["--dropout 0.3", "--g-leak 0.2", "--d-leak 0.1", "--loss minimax"]
GAME_FLAGS += ["--real-label 0.9", "--label-noise 0.1", "--r1 0", "--batch-size 7"]
GAME_FLAGS += ["--lr 0.02", "--beta1 0.5", "--ema 0.1", "--seed 1"]


def test_run_is_changed_by_every_flag_of_the_game():
    pictures = {}
    for flag in ["", *GAME_FLAGS]:
        folder, _ = run(f"{PHOTOS} --epochs 1 --lr 0.01 {flag}")
        picture = Path(folder, "epoch_00001.png").read_bytes()
        assert picture not in pictures, f"{flag} changes nothing"
        pictures[picture] = flag


def test_run_of_your_own_tensor_shows_real_images_of_all_classes():
    black = torch.zeros(100, 1, 8, 8, dtype=torch.uint8)
    images = torch.cat([black, black + 255])  # sorted, as folders are
    args = train_gan.parse_args([*SMALL.split(), "--epochs", 1])
    G = train_gan.train(args, images, train_gan.new_folder("mine"))
    assert G(torch.randn(2, 4)).shape == (2, 1, 8, 8)
    pixels = pil_to_tensor(Image.open("mine/real.png")).unique()
    assert pixels.tolist() == [0, 255], "real.png does not show black and white"


def test_run_makes_a_gif_in_the_order_of_the_epochs():
    train_gan.save_gif(Path())  # without pictures, there is no GIF, and no error
    for grey, epoch in enumerate(["00002", "00010", "99999"]):
        Image.new("L", (8, 8), 100 * grey).save(f"epoch_{epoch}.png")
    train_gan.save_gif(Path())
    with Image.open("training.gif") as gif:
        gif.seek(2)
        assert gif.convert("L").getpixel((0, 0)) == 200, "the last picture is not last"
        assert gif.info["loop"] == 0, "it does not go on for ever"


def test_run_goes_on_where_excel_locks_the_table(monkeypatch, capsys):
    monkeypatch.setattr("csv.DictWriter", Mock(side_effect=PermissionError("locked")))
    run(f"{PHOTOS} --epochs 1")
    assert "losses.csv stays as it was: locked" in capsys.readouterr().out


def test_run_takes_an_empty_folder_and_never_that_of_another_run():
    os.mkdir("new")
    Path("new/real.png").write_text("of a run that was stopped in its first epoch")
    run(f"{PHOTOS} --epochs 1 --out-dir new")
    with raises(SystemExit, match="error: new is not empty: name a new folder"):
        run(f"{PHOTOS} --epochs 1 --out-dir new")
    folders = [train_gan.new_folder(None), train_gan.new_folder(None)]
    assert folders == [RUN, RUN_2]


@mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_run_moves_from_cuda_to_the_cpu():
    run(f"{PHOTOS} --epochs 1 --device cuda")
    assert info_of(RUN)["device"] == "cuda:0"
    run("--resume runs/001 --epochs 2 --device cpu")


# --- resume ---------------------------------------------------------------------------
def test_resume_ends_as_if_never_cut_off(monkeypatch):
    """64 images are few here, and the second epoch ends between two steps of G."""
    monkeypatch.setattr(train_gan, "EPOCH_IMAGES", 100)
    flags = f"{PHOTOS} --dropout 0.3 --label-noise 0.1 --k 3 --batch-size 14"
    run(f"{flags} --epochs 4")
    run(f"{flags} --epochs 2")
    run("--resume runs/002 --epochs 4")
    whole, resumed = load_checkpoint(RUN), load_checkpoint(RUN_2)
    for name in ("D", "G", "G_ema", "opt_D", "opt_G"):
        assert_close(resumed[name], whole[name], rtol=0, atol=0, msg=f"{name} differs")


def test_resume_takes_new_flags_and_keeps_the_others():
    run(f"{PHOTOS} --k 3 --epochs 1 --out-dir my/run")
    run("--resume my/run --epochs 2 --lr 0.5 --beta1 0.3")
    assert info_of("my/run")["k"] == 3
    for optimizer in ("opt_G", "opt_D"):
        (group,) = load_checkpoint("my/run")[optimizer]["param_groups"]
        assert group["lr"] == 0.5, f"{optimizer}: not the rate of --lr"
        assert group["betas"] == (0.3, 0.999), f"{optimizer}: not the --beta1 of now"


def test_resume_of_a_finished_run_scores_it_again(finished, capsys):
    before = info_of(finished.run)
    train_gan.main(["--resume", finished.run, "--g-leak", 0.9, "--dataset", "kmnist"])
    text = capsys.readouterr().out
    assert text.startswith("4 epochs are done: to go on, add --epochs 8\n")
    assert "log-likelihood of drawn: " in text
    assert info_of(finished.run) == before, "run.json does not tell what it was"


def test_resume_is_what_ctrl_c_tells(monkeypatch):
    monkeypatch.setattr(train_gan, "train_epoch", Mock(side_effect=KeyboardInterrupt))
    with raises(SystemExit, match='stopped; .* --resume "runs.001" goes on after it'):
        run(PHOTOS)


def test_resume_that_diverges_leaves_the_run_as_it_was():
    run(f"{PHOTOS} --epochs 1")
    paths = [RUN / "checkpoint.pt", RUN / "run.json"]
    before = [path.read_bytes() for path in paths]
    with raises(SystemExit, match="error: epoch 2 diverged: try a lower --lr"):
        run("--resume runs/001 --epochs 3 --lr 1e38")
    assert [path.read_bytes() for path in paths] == before, "it has changed a file"


def test_resume_after_a_stop_while_saving_has_the_last_whole_checkpoint(monkeypatch):
    run(f"{PHOTOS} --epochs 1")
    before = Path(RUN, "checkpoint.pt").read_bytes()
    monkeypatch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
    with suppress(SystemExit):
        run("--resume runs/001 --epochs 2")
    after = Path(RUN, "checkpoint.pt").read_bytes()
    assert after == before, "checkpoint.pt: save another file, then rename it"


def test_resume_runs_no_code_of_the_file():
    torch.save(os.getcwd, "checkpoint.pt")  # the name of a function, as code has it
    with raises(Exception, match="[Ww]eights.only"):
        run("--resume .")


# --- command line ---------------------------------------------------------------------
WRONG = {
    "--k 0": "error: --epochs, --k, --z-dim, --batch-size, --image-size: 1 or more",
    "--out-dir new --resume none": "not allowed with",
    "--resume none": "No such file or directory: 'none/checkpoint.pt'",
    "--dataset cifar10": "error: --dataset cifar10: no folder, and none of auto, mnist",
    "--dataset one": "error: --dataset one: 1 images, 2 are needed",
    "--dataset mnist": "error: no mnist: data/MNIST/raw needs train- and t10k-images-i",
}


@mark.parametrize("flags", WRONG)
def test_command_line_refuses_in_one_line_and_leaves_no_folder(flags, capsys):
    save_pictures("one", torch.zeros(1, 4, 4))
    with raises(SystemExit) as stop:
        run(flags)
    text = f"{capsys.readouterr().err}{stop.value}"
    assert WRONG[flags] in text
    assert text.count("\n") <= 1, "more than one line"
    assert not os.path.exists("runs"), "an empty folder is left behind"


def test_command_line_takes_the_cpu_where_there_is_no_card(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    devices = [str(train_gan.choose_device(name)) for name in ("auto", "cuda:1")]
    assert devices == ["cuda", "cuda:1"], "there is a card"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run(f"{PHOTOS} --epochs 1 --device cuda")
    warning = f"warning: torch {torch.__version__} finds no GPU: training on the CPU"
    assert warning in capsys.readouterr().out
    assert info_of(RUN)["device"] == "cpu", "run.json names a device that was not used"
    args = load_checkpoint(RUN)["args"]
    assert args["device"] == "cuda", "resumed where there is a card, it must take it"
