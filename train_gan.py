"""Train a generative adversarial network by Algorithm 1 of Goodfellow et al. 2014.

python train_gan.py                           # MNIST, 40 epochs, the best device
python train_gan.py --resume runs/001         # go on where a run was cut off
"""

import argparse
import contextlib
import copy
import csv
import io
import itertools
import math
import os
import pickle
import shlex
import shutil
import socket
import struct
import sys
import time
import zipfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision import datasets, transforms, utils

import losses
from models import Discriminator, Generator, load_generator

DATASETS = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
    "cifar10": datasets.CIFAR10,
}
NAMES = [*DATASETS, "drawn"]
DRAWN_TRAIN, DRAWN_TEST = 60_000, 10_000
G_LOSSES = {
    "non-saturating": losses.generator_loss,
    "minimax": losses.minimax_generator_loss,
}
DAMAGED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError)
DAMAGED += (AssertionError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile)
R1_EVERY = 4  # the penalty costs half a step: take it every 4th step, 4 times as heavy
COLUMNS = ["epoch", "loss_D", "loss_G", "D_x", "D_G_z1", "D_G_z2", "acc_D", "seconds"]


def checked(kind, accepts, words):
    """An argparse type: kind(text) where that is accepted, else an error in words."""

    def number(text):
        if accepts(value := kind(text)):
            return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return number


def parse_args(argv):
    """Return the settings, those that were given, and a checkpoint to go on from."""
    size = checked(int, lambda v: v >= 1, "a whole number of 1 or more")
    seed = checked(int, lambda v: 0 <= v < 2**63, "a whole number from 0 to 2^63 - 1")
    part = checked(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")
    label = checked(float, lambda v: 0 < v <= 1, "a number above 0, at most 1")
    rate = checked(float, lambda v: 0 < v < math.inf, "a finite number above 0")
    weight = checked(float, lambda v: 0 <= v < math.inf, "a finite number of 0 or more")
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count() or 16)]
    devices = ["auto", "cpu", "mps", "cuda", *gpus]

    def add(flag, type, default, help, **more):
        group.add_argument(flag, type=type, default=default, help=help, **more)

    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = parser.add_argument_group("data")
    add("--dataset", str, "mnist", f"{', '.join(NAMES)}, or a folder's path")
    add("--data-dir", os.path.abspath, "data", "where data sets are, or will be put")
    add("--image-size", size, 28, "side in pixels that a folder's images are cut to")
    group = parser.add_argument_group("model")
    add("--z-dim", size, 64, "length of G's noise: in how many directions images vary")
    add("--g-hidden", size, [256, 512], "widths of G's hidden layers", nargs="+")
    add("--d-hidden", size, [512, 256], "of D's: if too wide, D wins", nargs="+")
    switch = {"action": argparse.BooleanOptionalAction}
    add("--batch-norm", None, True, "in G: keeps samples from growing alike", **switch)
    add("--dropout", part, 0.0, "share of units dropped, in both networks: weakens D")
    add("--g-leak", weight, 0.0, "slope of G's LeakyReLU below 0; 0 is ReLU")
    add("--d-leak", weight, 0.2, "of D's: above 0, G's gradient passes every unit")
    group = parser.add_argument_group("game")
    add("--loss", str, "non-saturating", "what G minimises", choices=[*G_LOSSES])
    add("--k", size, 1, "D steps for each G step (Algorithm 1)")
    add("--real-label", label, 1.0, "0.9: D is not rewarded for being too sure")
    add("--label-noise", part, 0.0, "n: labels are drawn from label - n to label + n")
    add("--r1", weight, 1.0, "gamma, the weight of the R1 penalty: keeps D smooth")
    group = parser.add_argument_group("optimisation")
    add("--epochs", size, 40, "passes over the data in all")
    add("--batch-size", size, 128, "images for each step")
    add("--lr", rate, 1e-3, "Adam's step size: too large, and the game goes in circles")
    add("--beta1", part, 0.0, "Adam's momentum: in a game, it overshoots")
    add("--ema", part, 0.9999, "highest decay of the shown average of G, 0: off")
    add("--seed", seed, 0, "of the weights, the noise and the order of the images")
    add("--device", str, "auto", "cuda, mps or cpu", choices=devices, metavar="D")
    group = parser.add_argument_group("output")
    add("--out-dir", str, argparse.SUPPRESS, "a new folder (runs/001, 002, ...)")
    add("--resume", str, argparse.SUPPRESS, "the run to go on with", metavar="RUN")
    settings = vars(parser.parse_args([]))
    # Parsed into a None for each, so that no default is filled in: the rest was given.
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(settings))))
    given = {name: value for name, value in given.items() if value is not None}
    state = None
    if "resume" in given:
        if extra := given.keys() - {"resume", "epochs", "device", "data_dir"}:
            parser.error(f"leave out --{min(extra).replace('_', '-')} with --resume")
        path = Path(given["resume"], "checkpoint.pt")
        try:
            with zipfile.ZipFile(path):  # or else it is not of torch.save
                state = dict(torch.load(path, map_location="cpu", weights_only=True))
            state["n_images"], state["history"]  # or else it is not of this program
            settings |= state["settings"]
        except (OSError, *DAMAGED):
            sys.exit(f"error: {path} is missing, damaged or not of this program")
    args = argparse.Namespace(**settings | given)
    if args.dataset not in NAMES and not os.path.isdir(args.dataset):
        parser.error(f"--dataset {args.dataset}: not a folder, nor {', '.join(NAMES)}")
    if args.batch_size == 1 and args.batch_norm:
        parser.error("--batch-size 1: BatchNorm needs 2 or more, or --no-batch-norm")
    return args, given, state


def load_data(args, may_fall_back):
    """Return train and test images, uint8 (N, C, H, W); no test images of a folder."""
    if args.dataset in DATASETS:
        data_set = DATASETS[args.dataset]
        socket.setdefaulttimeout(10)  # seconds: a dead network must not hang
        try:
            sets = [data_set(args.data_dir, t, download=True) for t in (True, False)]
            sets = [torch.as_tensor(part.data) for part in sets]
            # (N, H, W), or (N, H, W, C) of CIFAR-10 -> (N, C, H, W)
            return [x.reshape(*x.shape[:3], -1).permute(0, 3, 1, 2) for x in sets]
        except (OSError, *DAMAGED) as error:
            reason = " ".join(str(error).split())
            absent = isinstance(error, OSError) or "Error downloading" in reason
        message = f"no {args.dataset} in --data-dir {args.data_dir} ({reason})"
        message += ": go online to download it, copy it there, or delete a damaged copy"
        if not (absent and may_fall_back):
            sys.exit(f"error: {message}")
        sys.stderr.write(f"warning: {message}. Now training on --dataset drawn\n")
        args.dataset = "drawn"
    if args.dataset == "drawn":
        return draw_digits()
    args.dataset = os.path.abspath(args.dataset)
    return load_folder(args.dataset, args.image_size), None


def load_folder(folder, size):
    """Every image below the folder, cropped to size x size; grey if all of them are."""
    images, skipped = [], 0
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            images.append(transforms.PILToTensor()(ImageOps.fit(image, (size, size))))
        except (OSError, SyntaxError, Image.DecompressionBombError, *DAMAGED):
            skipped += 1
    if skipped:
        sys.stderr.write(f"warning: {folder}: {skipped} unreadable files skipped\n")
    if len(images) < 2:
        sys.exit(f"error: {folder}: {len(images)} readable images, 2 are needed")
    images = torch.stack(images)
    grey = images[:, :1]
    return grey if (images == grey).all() else images


def draw_digits():
    """Ten digits in Pillow's own font, warped at random: the same at every call."""
    font, templates = ImageFont.load_default(size=44), []
    for digit, stroke in itertools.product("0123456789", range(4)):
        image = Image.new("L", (56, 56))
        draw = ImageDraw.Draw(image)
        draw.text((28, 28), digit, 255, font, anchor="mm", stroke_width=stroke)
        templates.append(transforms.PILToTensor()(image) / 255)
    n, random = DRAWN_TRAIN + DRAWN_TEST, torch.Generator().manual_seed(0)
    which = torch.randint(len(templates), (n,), generator=random)
    # A matrix near the identity rotates, scales and shears; the last column shifts.
    warp = torch.eye(2, 3) + 0.5 * torch.rand(n, 2, 3, generator=random) - 0.25
    images = []
    for i, theta in zip(which.split(1000), warp.split(1000), strict=True):
        grid = F.affine_grid(theta, (len(i), 1, 28, 28), align_corners=False)
        drawn = F.grid_sample(torch.stack(templates)[i], grid, align_corners=False)
        images.append((drawn * 255).round().byte())
    return torch.cat(images).split([DRAWN_TRAIN, DRAWN_TEST])


@torch.no_grad()
def parzen(G, train_images, test_images):
    """Parzen-window log-likelihood of the test images (Goodfellow et al. 2014, sec. 5).

    uint8 images, G on the CPU -> mean and standard error in nats, pixels in [0, 1].
    """
    z = torch.randn(10_000, G.z_dim, generator=torch.Generator().manual_seed(0))
    samples = G(z).flatten(1) / 2 + 0.5
    validation = torch.cdist(train_images[-10_000:][:1000].flatten(1) / 255, samples)
    test = (torch.cdist(x.flatten(1) / 255, samples) for x in test_images.split(500))

    def log_p(distances, sigma):  # log of the mean of N(x; sample, sigma^2 I)
        norm = samples.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))
        log_sum = distances.square().div_(-2 * sigma**2).logsumexp(1)
        return log_sum - math.log(len(samples)) - norm

    sigmas = torch.logspace(-1, 0, 10).tolist()
    sigma = max(sigmas, key=lambda sigma: log_p(validation, sigma).mean())
    scores = torch.cat([log_p(distances, sigma) for distances in test])
    return scores.mean().item(), scores.std().item() / len(scores) ** 0.5


def write(path, data):
    """Replace a file whole: cut off at any moment, the old or the new one is there."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def create_run(out_dir, save):
    """Make a run folder that never lacks a checkpoint and never replaces another."""
    new = Path(out_dir or "runs/001").parent / f".{os.getpid()}-{time.time_ns()}"
    new.mkdir(parents=True)
    try:
        save(new)
        for number in itertools.count(1):
            run = Path(out_dir or f"runs/{number:03}")
            with contextlib.suppress(OSError):  # of a rename to where a run is
                return new.rename(run)
            if out_dir or not run.exists():
                sys.exit(f"error: --out-dir {run} is in use: use another, or --resume")
    finally:
        shutil.rmtree(new, ignore_errors=True)


def png(images):
    """A grid of images in [-1, 1], eight in a row, as the bytes of a PNG file."""
    file = io.BytesIO()
    utils.save_image(images, file, "png", nrow=8, normalize=True, value_range=(-1, 1))
    return file.getvalue()


def write_gif(run, epochs):
    """training.gif: the grids of at most 100 epochs, the last one held longer."""
    shown = reversed(range(epochs, 0, -math.ceil(epochs / 100)))
    paths = [run / f"epoch_{epoch:03}.png" for epoch in shown]
    first, *rest = [Image.open(path) for path in paths if path.exists()]
    file, times = io.BytesIO(), [150] * len(rest) + [3000]  # milliseconds
    first.save(file, "gif", save_all=True, append_images=rest, duration=times, loop=0)
    write(run / "training.gif", file.getvalue())


def train_epoch(args, images, epoch, G, D, G_average, opt_G, opt_D):
    """Algorithm 1 over all images once; return the means that losses.csv shows."""
    D_log, G_log, shown = [], [], time.perf_counter()
    pairs = zip(G_average.state_dict().values(), G.state_dict().values(), strict=True)
    average, current = zip(*[p for p in pairs if p[0].is_floating_point()], strict=True)
    # The whole set is one uint8 tensor on the device, a batch a slice of it in random
    # order: a DataLoader, image by image, takes 100 times as long to give an epoch.
    order = torch.randperm(len(images), device=images.device)
    batches = images[order].tensor_split(max(1, len(images) // args.batch_size))
    G_step = (epoch - 1) * math.ceil(len(batches) / args.k)
    for step, batch in enumerate(batches, 1):
        # (1) Update D: maximise log D(x) + log(1 - D(G(z)))
        x = batch / 127.5 - 1  # uint8 -> [-1, 1], the range of G's tanh
        z = torch.randn(len(x), args.z_dim, device=x.device)
        fake = G(z)
        # detach() ends D's step at the images: else backward() would go on into G and
        # free the graph that G's step needs. No BatchNorm in D, so one pass for both.
        real_logits, fake_logits = D(torch.cat([x, fake.detach()])).split(len(x))
        labels = args.real_label, args.label_noise
        loss_D = losses.discriminator_loss(real_logits, fake_logits, *labels)
        D_log.append([t.detach().flatten() for t in (loss_D, real_logits, fake_logits)])
        if args.r1 and ((epoch - 1) * len(batches) + step) % R1_EVERY == 0:
            loss_D = loss_D + args.r1 * R1_EVERY * losses.r1_penalty(D, x)
        loss_D.backward()
        opt_D.step()
        opt_D.zero_grad()  # already here: G's step can use the memory again
        if step % args.k and step < len(batches):
            continue

        # (2) Update G: maximise log D(G(z)), on D's fakes: Algorithm 1 draws new noise
        # here, but the same noise saves a pass through G.
        fake_logits = D(fake)
        loss_G = G_LOSSES[args.loss](fake_logits)
        loss_G.backward(inputs=list(G.parameters()))  # through D, not into its weights
        opt_G.step()
        opt_G.zero_grad()
        G_log.append([t.detach().flatten() for t in (loss_G, fake_logits)])
        # (3) Average G's weights over about the last ninth of its steps so far.
        G_step += 1
        decay = min(args.ema, (1 + G_step) / (10 + G_step))
        get_ema_multi_avg_fn(decay)(average, current, None)  # in place
        if sys.stdout.isatty() and time.perf_counter() > shown + 1:
            shown = time.perf_counter()
            print(f"batch {step} of {len(batches)}", end="\r", flush=True)

    loss_D, real, fake = map(torch.cat, zip(*D_log, strict=True))
    loss_G, fake_after = map(torch.cat, zip(*G_log, strict=True))
    correct = torch.cat([real > 0, fake < 0]).float()
    D_x, D_G_z1, D_G_z2 = (logits.sigmoid() for logits in (real, fake, fake_after))
    means = [t.mean() for t in (loss_D, loss_G, D_x, D_G_z1, D_G_z2, correct)]
    return torch.stack(means).tolist()  # the epoch's only wait for the device


def train(args, device, images, state=None):
    """Train on uint8 images (N, C, H, W), or go on from the state of a checkpoint."""
    torch.manual_seed(args.seed)
    images, shape = images.to(device), list(images.shape[1:])
    G_arguments = [args.z_dim, args.g_hidden, shape, args.batch_norm, args.dropout]
    G_arguments += [args.g_leak]
    G = Generator(*G_arguments).to(device)
    D = Discriminator(args.d_hidden, shape, args.dropout, args.d_leak).to(device)
    parts = {"G": G, "D": D, "G_average": copy.deepcopy(G).eval().requires_grad_(False)}
    for name, net in ("opt_G", G), ("opt_D", D):
        betas = args.beta1, 0.999
        parts[name] = torch.optim.Adam(net.parameters(), args.lr, betas, fused=True)
    rng = torch if device.type == "cpu" else getattr(torch, device.type)

    def save(folder):
        state.update({name: part.state_dict() for name, part in parts.items()})
        state.update(settings=vars(args), rng={device.type: rng.get_rng_state()})
        file, table = io.BytesIO(), io.StringIO()
        torch.save(state, file)
        csv.writer(table, lineterminator="\n").writerows([COLUMNS, *state["history"]])
        if not state["history"]:
            write(folder / "real.png", png(images[:64] / 127.5 - 1))
        write(folder / "checkpoint.pt", file.getvalue())
        write(folder / "losses.csv", table.getvalue().encode())

    if state:
        run = Path(args.resume)
        try:
            load_generator(run)(state["fixed_z"])  # a test that they fit
            for name, part in parts.items():
                part.load_state_dict(state[name])
            if device.type in state["rng"]:
                rng.set_rng_state(state["rng"][device.type])
        except DAMAGED:
            sys.exit(f"error: {run}/checkpoint.pt does not fit its own settings")
        save(run)
    else:
        state = {"n_images": len(images), "history": [], "G_arguments": G_arguments}
        state["fixed_z"] = torch.randn(64, args.z_dim, device=device)
        run = create_run(getattr(args, "out_dir", None), save)
    history, fixed_z = state["history"], state["fixed_z"].to(device)
    n_G, n_D = (sum(p.numel() for p in net.parameters()) for net in (G, D))
    print(f"{device}: {len(images):,} images {shape} of {args.dataset}; {run}")
    print(f"parameters: G {n_G:,}, D {n_D:,}")
    done = len(history)
    if done >= args.epochs:
        print(f"nothing left to train: {done} epochs are done")
    try:
        for epoch in range(done + 1, args.epochs + 1):
            start = time.perf_counter()
            means = train_epoch(args, images, epoch, **parts)
            means.append(time.perf_counter() - start)
            grid = parts["G_average"](fixed_z)
            if not all(map(math.isfinite, [*means, grid.sum()])):
                sys.exit(f"error: epoch {epoch} diverged: start anew with a lower --lr")
            history.append([epoch, *(round(mean, 6) for mean in means)])
            write(run / f"epoch_{epoch:03}.png", png(grid))
            save(run)
            done = epoch
            shown = [f"{n} {v:.3f}" for n, v in zip(COLUMNS[1:], means, strict=True)]
            left = means[-1] * (args.epochs - epoch) / 60
            print(f"epoch {epoch}/{args.epochs}", *shown, f"({left:.0f} min left)")
    except KeyboardInterrupt:
        command = f"python train_gan.py --resume {shlex.quote(str(run))}"
        raise KeyboardInterrupt(f"; epoch {done} is safe: {command}") from None
    finally:
        if (run / f"epoch_{done:03}.png").exists():
            write_gif(run, done)
    return run, parts["G_average"]


def main(argv=None):
    args, given, state = parse_args(argv)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    auto = "cuda" if cuda else "mps" if mps else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    if not {"cuda": cuda, "mps": mps, "cpu": True}[device.type]:
        sys.stderr.write(f"warning: --device {device}: none here, training on cpu\n")
        device = torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision("high")  # TF32
    images, test_images = load_data(args, "dataset" not in given and not state)
    if state and len(images) != state["n_images"]:
        sys.exit(f"error: {args.dataset} no longer has {state['n_images']} images")
    try:
        run, G = train(args, device, images, state)
    except OSError as error:  # a full disk, a folder that must not be written to
        sys.exit(f"error: cannot write: {error}; make room, then --resume the run")
    if test_images is not None:
        mean, error = parzen(G.cpu(), images, test_images)
        paper = " (Goodfellow et al. 2014: 225 +- 2)" if args.dataset == "mnist" else ""
        print(f"log-likelihood of test images: {mean:.1f} +- {error:.1f} nats{paper}")
    print(f"{run}: real.png, epoch_*.png, training.gif, losses.csv, checkpoint.pt")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"\nstopped{stop}\n")
        sys.exit(130)
