"""What a GAN must satisfy: python -m pytest test_gan.py (no network, no GPU, 30 s)."""

import copy
import io
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import PIPE, Popen
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from torch.func import grad_and_value

import losses
import train_gan
from models import Discriminator, Generator, load_generator

README = Path(train_gan.__file__).with_name("README.md").read_text(encoding="utf-8")
SMALL = "--z-dim 4 --g-hidden 8 --d-hidden 8 --batch-size 16 --device cpu "
PHOTOS = SMALL + "--dataset photos --image-size 8 "


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gan, "DRAWN", (210, 16))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: 1 / 0)
    Path("photos").mkdir()
    for n in range(64):
        pixels = random.Random(n).randbytes(64)
        Image.frombytes("L", (8, 8), pixels).save(f"photos/{n:02}.png")
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def run(line):
    """The program's exit code, standard output, and at most one line of errors."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            train_gan.main(shlex.split(line))
        except SystemExit as stop:
            code = stop.code
    words = err.getvalue() + (code if isinstance(code, str) else "")
    code = 1 if isinstance(code, str) else code  # as Python exits with a text
    assert len(words.splitlines()) <= 1 and ("error: " in words) == (code > 0), words
    return code, out.getvalue(), words


def settings(line=""):
    return train_gan.parse_args(line.split())[0]


def state_of(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def contents(folder):
    """All of a run but its seconds: weights, optimisers, losses and pictures."""
    state, file = state_of(folder), io.BytesIO()
    parts = [state[name] for name in ("G", "D", "G_average", "opt_G", "opt_D")]
    torch.save([[row[:-1] for row in state["history"]], *parts], file)
    pictures = {p.name: hash(p.read_bytes()) for p in Path(folder).glob("*.png")}
    return {"state": hash(file.getvalue()), **pictures}.items()


@pytest.mark.parametrize("label", [1.0, 0.9, 0.3])
def test_losses_are_the_logarithms_of_the_paper(label):
    """Equal values and gradients; finite and right where D is rounded to 0 or 1."""
    logits = 3 * torch.randn(2, 5, 1, dtype=torch.float64)
    huge = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 0.0, -1e4]])

    def minus_V(x):
        D_x, D_G_z = 1 / (1 + torch.exp(-x))
        real = label * D_x.log() + (1 - label) * (1 - D_x).log()
        return -(real + (1 - D_G_z).log()).mean()

    for ours, paper in (
        (lambda x: losses.discriminator_loss(*x, label), minus_V),
        (losses.generator_loss, lambda x: -(1 / (1 + torch.exp(-x))).log().mean()),
        (losses.minimax_generator_loss, lambda x: (1 / (1 + x.exp())).log().mean()),
    ):
        found, right = (grad_and_value(loss)(logits) for loss in (ours, paper))
        assert all(torch.allclose(a, b, 1e-10, 1e-12) for a, b in zip(found, right))
        for x in huge, huge.bfloat16():
            gradient, value = grad_and_value(ours)(x)
            assert value.isfinite() and gradient.isfinite().all() and value.abs() > 1600


def test_proposition_1_the_optimal_D_is_stationary():
    """At D* = p_data / (p_data + p_g), V = -log 4 + 2 JSD (Theorem 1)."""
    p_data, p_g = torch.tensor([[50, 30, 15, 5], [10, 20, 30, 40]])  # of 100 samples
    x = (p_data.double() / p_g).log().requires_grad_()  # the logit of D*
    real, fake = x.repeat_interleave(p_data), x.repeat_interleave(p_g)
    value = losses.discriminator_loss(real, fake)
    (gradient,) = torch.autograd.grad(value, x)
    jsd = sum((p / 200 * (2 * p / (p_data + p_g)).log()).sum() for p in (p_data, p_g))
    assert value.exp().item() == pytest.approx(4 * torch.exp(-2 * jsd).item())
    assert gradient.abs().max() < 1e-12


def layers(net):
    words = {"Linear": "{0.in_features}-{0.out_features}", "Dropout": "dropout={0.p}"}
    words["LeakyReLU"] = "leak={0.negative_slope}"
    names = [(type(layer).__name__, layer) for layer in net.net]
    return " ".join(words.get(name, name).format(layer) for name, layer in names)


def test_networks_follow_from_their_arguments():
    G = Generator(3, [4, 5], (3, 2, 2), True, 0.1, 0.0)
    D, norm = Discriminator([6], (3, 2, 2), 0.3, 0.5), "BatchNorm1d leak=0.0"
    assert layers(G) == f"3-4 {norm} dropout=0.1 4-5 {norm} dropout=0.1 5-12 Tanh"
    assert layers(D) == "12-6 leak=0.5 dropout=0.3 6-1"
    assert layers(Generator(3, [4], (2,), False)) == "3-4 leak=0.0 4-2 Tanh"
    assert layers(Generator()) == f"64-256 {norm} 256-512 {norm} 512-784 Tanh"
    assert layers(Discriminator()) == "784-512 leak=0.2 512-256 leak=0.2 256-1"
    assert G.net[0].bias is None and D.net[0].bias is not None
    x = G.eval()(100 * torch.randn(50, 3))
    assert x.shape == (50, 3, 2, 2) and -1 <= x.min() < -0.5 and 0.5 < x.max() <= 1
    assert torch.equal(D.eval()(x), D(x.flatten(1))) and D(x).shape == (50, 1)
    assert D(1000 * x).abs().max() > 1, "D must return logits, not probabilities"


def the_tutorials_way(args, images):
    """The same game, naively: sigmoids, separate passes, gradients for everyone."""
    torch.manual_seed(args.seed)
    torch.randn(64, args.z_dim)  # the noise of the pictures
    G = Generator(3, [6, 5], (1, 4, 4), args.batch_norm, args.dropout, args.g_leak)
    D = Discriminator([7], (1, 4, 4), args.dropout, args.d_leak)
    average, betas = copy.deepcopy(G), (args.beta1, 0.999)
    opt_G = torch.optim.Adam(G.parameters(), args.lr, betas)
    opt_D = torch.optim.Adam(D.parameters(), args.lr, betas)

    def bce(p, y):
        y += args.label_noise and args.label_noise * (2 * torch.rand_like(p) - 1)
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()

    rows, G_steps = [], 0
    for epoch in range(1, args.epochs + 1):
        torch.manual_seed(1_000_003 * args.seed + epoch)
        D_log, G_log = [], []
        for i, batch in enumerate(torch.randperm(23).split([8, 8, 7]), 1):
            x = images[batch].double() / 255 * 2 - 1
            fake = G(torch.randn(len(x), args.z_dim))
            if args.dropout:  # whose masks are drawn for both halves at once
                real_p, fake_p = D(torch.cat([x, fake.detach()])).sigmoid().chunk(2)
            else:
                real_p, fake_p = D(x).sigmoid(), D(fake.detach()).sigmoid()
            loss_D = bce(real_p, args.real_label) + bce(fake_p, 0.0)
            right = (real_p > 0.5).sum() + (fake_p < 0.5).sum()
            D_log.append([loss_D, real_p.mean(), fake_p.mean(), right / 2 / len(x)])
            if args.r1 and (3 * epoch - 3 + i) % 4 == 0:  # gamma / 2 |Jacobian|^2
                for logit in D(x.requires_grad_()).flatten():
                    (slope,) = torch.autograd.grad(logit, x, create_graph=True)
                    loss_D = loss_D + 4 * args.r1 / 2 * slope.square().sum() / len(x)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()
            if i % args.k and i != 3:
                continue
            p = D(fake).sigmoid()
            loss_G = (1 - p).log().mean() if args.loss == "minimax" else -p.log().mean()
            opt_G.zero_grad()
            loss_G.backward()
            opt_G.step()
            G_log.append([loss_G, p.mean()])
            G_steps += 1
            decay = min(args.ema, (1 + G_steps) / (10 + G_steps))
            for mean, weight in zip(*(n.state_dict().values() for n in (average, G))):
                if mean.is_floating_point():
                    mean.copy_(decay * mean + (1 - decay) * weight)
        logs = [torch.stack([*map(torch.stack, log)]).mean(0) for log in (D_log, G_log)]
        rows.append([epoch, *torch.cat(logs).tolist()])
    return {"G": G, "D": D, "G_average": average}, rows


GAMES = """--seed 1
--loss minimax --k 3 --dropout 0.3 --real-label 0.9 --label-noise 0.05 --d-leak 0.1
--no-batch-norm --r1 0 --ema 0 --g-leak 0.2 --lr 0.01 --beta1 0.5 --k 2
--r1 20 --ema 0.3"""


@pytest.mark.parametrize("flags", GAMES.splitlines())
def test_whole_runs_equal_the_tutorials_way(flags):
    torch.set_default_dtype(torch.float64)
    images = torch.randint(0, 256, (23, 1, 4, 4), dtype=torch.uint8)
    sizes = "--epochs 4 --batch-size 7 --z-dim 3 --g-hidden 6 5 --d-hidden 7 "
    args = settings(sizes + flags)
    folder, average = train_gan.train(args, "cpu", images)
    nets, rows = the_tutorials_way(args, images)
    for name, net in nets.items():
        ours = state_of(folder)[name]
        for key in [key for key in ours if "num_batches" not in key]:
            assert torch.allclose(ours[key], net.state_dict()[key], 1e-9, 1e-11), name
    for ours, theirs in zip(state_of(folder)["history"], rows, strict=True):
        ours = [ours[i] for i in (0, 1, 3, 4, 6, 2, 5)]  # D's columns, then G's
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert not average.training and not average.net[0].weight.requires_grad


def test_the_recipe_is_what_the_readme_describes(monkeypatch):
    values = "auto data None None None 64 [256, 512] [512, 256] True 0.0 0.0 0.2 "
    values += "non-saturating 1 1.0 0.0 1.0 40 128 0.001 0.0 0.9999 0 auto"
    assert " ".join(map(str, vars(settings()).values())) == values
    assert (train_gan.R1_EVERY, train_gan.SAVE_EVERY) == (4, 100)
    monkeypatch.setattr(losses, "generator_loss", Mock(side_effect=torch.mean))
    assert run(PHOTOS + "--epochs 1 --batch-size 99")[0] == 0
    losses.generator_loss.assert_called_once()  # one's own is used, for the one batch
    with pytest.raises(TypeError, match="uint8"):
        train_gan.train(settings(), "cpu", torch.zeros(4, 1, 2, 2))


def test_an_epoch_never_waits_for_the_device():
    """On `meta`, where there are no values, only an epoch's last line can fail."""
    G, D = Generator(4, [8]).to("meta"), Discriminator([8]).to("meta")
    opt_G, opt_D = (torch.optim.SGD(net.parameters(), 0.1) for net in (G, D))
    images = torch.empty(40, 1, 28, 28, dtype=torch.uint8, device="meta")
    with pytest.raises(RuntimeError, match="meta") as stop:
        train_gan.train_epoch(settings(SMALL), images, 1, G, D, G, opt_G, opt_D)
    assert any("return {" in str(entry.statement) for entry in stop.traceback)


def test_parzen_is_the_written_out_mixture():
    """log 1/n sum_i N(x; s_i, sigma^2); sigma is the best of ten for other images."""
    grey, test = (torch.randint(90, 160, (n, 1, 1, 2)).byte() for n in (1000, 30))
    dark = torch.zeros(9500, 1, 1, 2).byte()
    train = torch.cat([dark[:500], grey, dark[500:]])  # the first of the last 10,000
    G, before = Generator(2, [3], (1, 1, 2)).eval(), torch.get_rng_state()
    mean, error = train_gan.parzen(G, train, test)
    assert torch.equal(before, torch.get_rng_state()), "noise of its own"
    assert torch.get_float32_matmul_precision() == "highest"
    z = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    centres = (G(z).detach().double().flatten(1) + 1) / 2

    def log_p(x, sigma):
        square = (x.double().view(-1, 1, 2) / 255 - centres).square().sum(2)
        normal = torch.exp(-square / 2 / sigma**2) / (2 * torch.pi * sigma**2)
        return normal.mean(1).log()

    sigmas = [10 ** (-1 + i / 9) for i in range(10)]
    best = max(sigmas, key=lambda sigma: log_p(grey[::5], sigma).mean())
    assert mean == pytest.approx(log_p(test, best).mean().item(), abs=1e-4)
    assert error == pytest.approx(log_p(test, best).std().item() / 30**0.5, rel=1e-3)


@pytest.mark.parametrize("channels, shape", [((), "1, 5, 7"), ((3,), "3, 5, 7")])
def test_named_data_sets_become_images_by_channels(monkeypatch, channels, shape):
    class Fake:
        def __init__(self, root, train, download):
            assert (root, download, socket.getdefaulttimeout()) == ("data", True, 10)
            self.data = pixels[:48] if train else pixels[48:]

    pixels = torch.randint(0, 256, (64, 5, 7, *channels)).byte().numpy()
    monkeypatch.setitem(train_gan.DATASETS, "mnist", Fake)
    assert f"mnist [48, {shape}]" in run(SMALL + "--epochs 1")[1]
    back = torch.cat(train_gan.load_data(settings())).permute(0, 2, 3, 1)
    same = (back.reshape(pixels.shape).numpy() == pixels).all()
    assert same and socket.getdefaulttimeout() is None
    drawn, test = train_gan.draw_digits()  # the same every time, and all different
    assert torch.equal(drawn, train_gan.draw_digits()[0]) and len(test) == 16
    assert drawn.shape == (210, 1, 28, 28) and len(drawn.unique(dim=0)) > 200
    centre, edge = drawn[:, 0, 8:20, 8:20].float(), drawn[..., [0, 27]].float()
    assert edge.mean() < 4 and centre[2::3].mean() > 1.3 * centre[::3].mean() > 80


def test_a_folder_of_images_is_cropped_and_grey_where_all_are():
    Path("photos/sub").mkdir()
    wide = train_gan.ImageOps.expand(Image.new("RGB", (10, 10), "white"), (10, 0))
    wide.save("photos/sub/wide.png")
    shutil.copytree("photos", "photos/.trash")
    Path("photos/cut.png").write_bytes(Path("photos/00.png").read_bytes()[:-30])
    os.chdir("photos")
    for _ in range(2):  # the second run does not train on the samples of the first
        _, out, err = run(PHOTOS.replace("photos", ".") + "--epochs 1")
        assert out.startswith("reading the images in .") and "[65, 1, 8, 8]" in out
        assert "1 unreadable files, first cut.png" in err
    images, _ = train_gan.load_folder(".", None)
    assert images.shape == (65, 1, 28, 28) and (images[-1, 0, :, 2:-2] == 255).all()
    Image.new("RGB", (4, 4), (255, 100, 0)).save("sub/x.png")
    assert train_gan.load_folder(".", 8)[0][-1, :, 3, 3].tolist() == [255, 100, 0]
    for mode in "I;16", "I", "F":  # 16 bits and floats, shown by their own range
        image = Image.new(mode, (3, 1), 1000)
        image.save("flat.tiff")
        image.putpixel((1, 0), 1100)
        image.putpixel((2, 0), 1400)
        image.save("ramp.tiff")
        assert [*train_gan.read_image("ramp.tiff").tobytes()[::3]] == [0, 63, 255]
        assert not any(train_gan.read_image("flat.tiff").tobytes())
    Image.new("RGBA", (1, 1), (255, 0, 0, 0)).save("clear.png")
    assert {*train_gan.read_image("clear.png").tobytes()} == {255}, "laid on white"


def test_a_run_from_end_to_end(monkeypatch):
    argv = SMALL + "--dataset drawn --batch-size 2 --epochs 2 --dropout 0.2 --k 2 "
    code, out, err = run(argv)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 == len(err) and max(map(len, out.splitlines())) <= 80
    assert lines[1] == [*train_gan.COLUMNS, "left"] and len(os.listdir("runs/001")) == 6
    assert [lines[2][0], lines[3][0], lines[3][-1]] == ["1/2", "2/2", "0.000"]
    assert out.endswith(" nats\n")
    rows = [train_gan.COLUMNS, *state_of("runs/001")["history"]]
    text = Path("runs/001/losses.csv").read_text().split()
    assert text == [",".join(map(str, row)) for row in rows]
    assert run(argv + "--out-dir else/where")[0] == 0
    monkeypatch.setattr(os, "isatty", lambda file: file == 1)
    assert "batch 50 of 105\r" in run(argv + "--seed 1")[1]
    assert contents("runs/001") == contents("else/where") != contents("runs/002")
    G = load_generator(Path("runs/001/checkpoint.pt"))  # the average; in eval mode
    average = state_of("runs/001")["G_average"]
    assert layers(G) == "4-8 BatchNorm1d leak=0.0 dropout=0.2 8-784 Tanh"
    assert not G.training and not G.net[0].weight.requires_grad and G.z_dim == 4
    assert all(torch.equal(G.state_dict()[key], average[key]) for key in average)
    torch.manual_seed(0)  # whose samples of the same noise the pictures show
    samples, real = G(torch.randn(64, 4)), train_gan.draw_digits()[0][:64] / 255
    for name, x in ("epoch_00002", samples / 2 + 0.5), ("real", real):
        train_gan.utils.save_image(x, "x.png", nrow=8)
        assert Path("x.png").read_bytes() == Path(f"runs/001/{name}.png").read_bytes()


def test_a_resumed_run_ends_as_one_that_was_not_cut_off():
    argv = PHOTOS + "--dropout 0.3 --label-noise 0.1 --k 2 --device cuda:15 --epochs "
    assert run(argv + "100")[0] == 0
    assert "warning: no cuda:15, training on" in run(argv + "25")[2]
    os.link("runs/002/checkpoint.pt", "checkpoint.pt")
    code, out, _ = run(argv + "100 --resume runs/002/checkpoint.pt")
    assert code == 0 and " 50/100 " in out and " 25/100 " not in out
    assert contents("runs/001") == contents("runs/002")
    saved = [f"epoch_{epoch:05}.png" for epoch in (25, 50, 75, 100)]  # of 4 steps each
    assert sorted(os.listdir("runs/001"))[1:5] == saved
    assert run("--resume runs/002 --epochs 1")[0] == 0
    assert state_of("runs/002")["settings"]["epochs"] == 100
    assert len(state_of(".")["history"]) == 25, "a checkpoint is never changed in place"


def start(argv, line):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, train_gan.__file__, *shlex.split(argv)]
    process = Popen(command, env=env, stdout=PIPE, stderr=PIPE, text=True)
    while line not in process.stdout.readline():  # each comes at once, in a pipe, too
        assert process.poll() is None, process.stderr.read()
    time.sleep(random.uniform(0.05, 0.2))  # into the middle of an epoch
    return process


def test_a_stopped_and_a_killed_run_go_on_as_if_nothing_had_happened():
    folder, argv = Path("my rün"), PHOTOS + "--batch-size 2 --epochs 40 "
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for the process, too
    process = start(argv + "--out-dir 'my rün'", "/40 ")
    if os.name != "nt":  # where no such signal can be sent to one process
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        assert 'on with: python train_gan.py --resume "my r' in err, err
        assert process.returncode == 130
        process = start("--resume 'my rün'", "/40 ")
    process.kill()
    process.communicate()
    assert run(argv)[0] == run("--resume 'my rün'")[0] == 0
    assert contents("runs/001") <= contents(folder) and not [*folder.glob("*.tmp")]


def test_a_full_disk_leaves_the_last_checkpoint_whole():
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = PHOTOS + "--d-hidden 600 --epochs "
    assert run(argv + "25")[0] == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # of 700 kB
    code, _, err = run("--resume runs/001 --epochs 50")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and "[Errno 27] File too large" in err
    assert run("--resume runs/001 --epochs 50")[0] == run(argv + "50")[0] == 0
    assert contents("runs/001") == contents("runs/002")


def test_the_gif_has_all_sound_pictures_and_holds_the_last(tmp_path):
    for n in range(1, 6):
        Image.new("L", (8, 8), 50 * n).save(f"epoch_{n:05}.png")
    Path("epoch_00002.png").write_bytes(b"damaged")
    train_gan.write_gif(tmp_path)
    gif = Image.open("training.gif")
    times = [gif.seek(i) or gif.info["duration"] for i in range(gif.n_frames)]
    assert times == [150, 150, 150, 3000] and gif.convert("L").getpixel((0, 0)) > 240


BAD = f"""2 | epochs k z-dim image-size g-hidden d-hidden lr | 0 -1 nan many | above 0
2 | epochs batch-size seed | 1.5 | no int
2 | lr g-leak d-leak r1 | -0.1 nan inf | above 0 and below inf
2 | beta1 ema dropout label-noise real-label | -0.1 1.1 nan | above 0 and below 1
2 | beta1 ema dropout label-noise batch-size | 1 | above
2 | seed | -1 9223372036854775808 | above -1 and below 9223372036854775808
2 | g-hidden | 10,20 | (10 20, not 10,20)
2 | device loss dataset | tpu cuda:-1 nmist | --
2 | image-size | 28 | --image-size: leave it out
2 | resume=used --lr | 0.1 | --lr is 0.001 in this run
1 | resume | photos | checkpoint.pt is missing, damaged or foreign: start anew
1 | dataset | lonely | lonely: 1 readable images
1 | data-dir=notes.txt --dataset | mnist fashion-mnist kmnist cifar10 | no
1 | lr=1e38 {PHOTOS}--epochs | 1 | epoch 1 diverged: start anew with a lower --lr
1 | epochs=1 {PHOTOS}--out-dir | used notes.txt notes.txt/run | error: """


def test_bad_flags_and_files_are_one_line():
    assert run(PHOTOS + "--epochs 1 --out-dir used")[0] == 0
    before = contents("used")
    Path("notes.txt").write_text("mine")
    Path("lonely").mkdir()
    shutil.copy("photos/00.png", "lonely")
    for line in BAD.splitlines():
        code, flags, values, words = line.split(" | ")
        for flag in [flags] if "=" in flags else flags.split():
            for value in values.split():
                found, _, err = run(f"--{flag} {value}")
                assert found == int(code) and words in err, (flag, value, err)
    assert contents("used") == before and Path("notes.txt").read_text() == "mine"
    _, out, err = run(SMALL + "--epochs 1")  # without --dataset mnist
    assert "no mnist in --data-dir data: go" in err and "runs/001: drawn [210, " in out


def test_damaged_foreign_and_changed_runs_are_refused():
    assert run(PHOTOS + "--epochs 1 --data-dir photos")[0] == 0
    path, state = Path("runs/001/checkpoint.pt"), state_of("runs/001")
    evil = type("Evil", (), {"__reduce__": lambda _: (os.mkdir, ("marker",))})()
    cases = [{**state, "more": evil}, [state], {"settings": state["settings"]}]
    cases += [{**state, "settings": settings} for settings in (1, {}, {"lr": 1.0})]
    cases += [path.read_bytes()[:n] for n in (0, 1, 9000, -1)]
    cases += [{**state, key: state["opt_G"]} for key in ("G", "D", "G_average")]
    for i, content in enumerate(cases):
        torch.save(content, path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        code, _, err = run("--resume runs/001 --epochs 2")
        words = "missing, damaged or foreign" if i < 10 else "data or models.py changed"
        assert code == 1 and words in err and not Path("marker").exists(), err
    torch.save(state, path)
    shutil.move("photos", "moved")
    assert "--dataset photos: no folder" in run("--resume runs/001 --epochs 2")[2]
    assert run("--resume runs/001 --epochs 2 --dataset moved")[0] == 0
    Path("moved/00.png").unlink()
    assert "images [63, 1, 8, 8], not [64, 1, 8, 8]" in run("--resume runs/001")[2]
    assert settings("--resume runs/001").data_dir == "data", "looked for here"


def test_any_standard_output_will_do_and_a_table_open_in_excel(monkeypatch, capsys):
    monkeypatch.setattr(train_gan.csv, "writer", Mock(side_effect=PermissionError))
    for stdout in Mock(spec=["write"]), None:
        monkeypatch.setattr(sys, "stdout", stdout)
        folder, G = train_gan.main(shlex.split(PHOTOS + "--epochs 1"))
        assert Path(folder, "checkpoint.pt").exists() and not G.training
    assert "losses.csv: is it open" in capsys.readouterr().err


SYSTEMS = """A 64 [128, 256, 512, 1024] [512, 256, 128] True 0.0 0.0 0.2 1e-05 128 100
B 100 [256, 512, 1024] [1024, 512, 256] False 0.2 0.01 0.01
C
D 64 [256, 256] [256, 256] False 0.0 0.0 0.2 0.0002 100 300
E 64 [256, 512] [512, 256] True 0.0 0.0 0.2 0.0002 128 40"""


@pytest.mark.parametrize("system", SYSTEMS.splitlines())
def test_the_five_systems_of_the_readme(system):
    (flags,) = re.findall(rf"\| {system[0]}\. .*`python train_gan.py (.*)` \|", README)
    args = vars(settings(flags.replace("my_photos", "photos")))
    names = "{z_dim} {g_hidden} {d_hidden} {batch_norm} {dropout} {g_leak} {d_leak} "
    names += "{lr} {batch_size} {epochs}"
    assert names.format(**args).startswith(system[2:])
    names = "{loss} {k} {real_label} {beta1} {ema} {r1}"
    assert names.format(**args) == "non-saturating 1 1.0 0.9 0.0 0.0"
    assert (args["label_noise"] > 0) == (system == "C")


def test_the_readme_is_true(monkeypatch):
    monkeypatch.setattr(train_gan, "parzen", lambda *_: (0.0, 0.0))
    Path("photos").rename("my_photos")
    commands = re.findall(r"(?:train_gan\.py\s|\n\| `)(--(?!help)[^`\n]*)", README)
    for command in {*commands, ""}:
        resumed = "--resume" in command and run("--dataset drawn --epochs 1")[0] == 0
        data = "" if resumed or "my_photos" in command else "--dataset drawn"
        code, out, _ = run(f"{command} {data} --epochs {1 + resumed} --device cpu")
        assert code == 0 and f" {1 + resumed}/" in out, command
        shutil.rmtree("runs")
    flags = {*vars(settings()), "no_batch_norm"}
    named = re.findall(r"(?<=`)--(\w[\w-]+)", README.replace("--index-url", ""))
    assert flags >= {flag.replace("-", "_") for flag in named}
    assert run(SMALL + "--dataset drawn --epochs 2")[0] == 0
    monkeypatch.setenv("MPLBACKEND", "agg")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block in sorted(blocks, key=lambda block: "pandas" in block):
        if "import pandas" in block:
            pytest.importorskip("pandas")
        exec(block, {})  # noqa: S102
