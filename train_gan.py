# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.10", "torchvision>=0.25", "pillow>=10.1"]
# ///
"""Train a generative adversarial network (GAN): Goodfellow et al. 2014, Algorithm 1.

A generator G makes images from noise z. A discriminator D answers D(x), the probability
that an image x is real. They learn in turn: D learns to tell real images from G's, and
G learns to make images that D takes for real.

python train_gan.py                           # MNIST, 40 epochs, the best device
python train_gan.py --resume runs/001         # continue a run that was stopped

40 epochs of MNIST take 3 to 5 minutes on two CPU cores. The score (see parzen(), higher
is better) is 237.5 nats, the mean of ten seeds. The paper has 225, real images 241.

The paper has neither Adam nor these four. The flag in brackets undoes each:
- BatchNorm in G keeps G's images varied (--no-batch-norm).
- Adam has no momentum, because old gradients belong to an older D (--beta1 0.9).
- The R1 penalty makes D less steep, so G does not jump from side to side (--r1 0).
- Pictures and score use an average of G: G's weights move in circles (--ema 0).

Read the section "The game" first: train_epoch, then train. The rest can wait.
"""

import argparse
import copy
import csv
import io
import itertools
import json
import math
import os
import socket
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import transforms
from torchvision.datasets import KMNIST, MNIST, FashionMNIST
from torchvision.utils import save_image

import losses
from models import Discriminator, Generator, load_checkpoint, update_average

# The R1 penalty is slow: only every 4th step of D adds it, times 4 (StyleGAN2, 3.1).
R1_EVERY = 4
EPOCH_IMAGES = 10_000  # a smaller data set is shown again until an epoch has this many
DRAWN = [30_000, 5_000]  # numbers of drawn digits: training images, test images
DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST, "kmnist": KMNIST}
NAMES = ["auto", *DATASETS, "drawn"]  # what --dataset accepts, besides a folder


# --- The game -------------------------------------------------------------------------
def train_epoch(args, images, epoch, G, D, G_ema, opt_G, opt_D):
    """Algorithm 1 for one epoch: after every k steps of D, one step of G.

    `images` are uint8 (N, C, H, W). train() makes the networks, their optimisers, and
    G_ema, a running average of G. Returns the mean of each logged column: D_x is D(x),
    D_G_z1 and D_G_z2 are D(G(z)) before and after D's update, acc_D is D's accuracy.
    """
    # One seed for each epoch: a resumed run draws the same numbers. The large factor
    # keeps seeds apart: epoch 2 of seed 0 must not repeat epoch 1 of seed 1.
    torch.manual_seed(args.seed * 1_000_003 + epoch)
    batches = shuffled_batches(args, images)
    first_step = (epoch - 1) * len(batches) + 1  # step numbers go on across epochs
    log = defaultdict(list)  # tensors: .item() in each step would wait for the GPU
    for step, batch in enumerate(batches, first_step):
        # (1) Update D: maximise log D(x) + log(1 - D(G(z))). loss_D is minus this.
        # D(x) is a probability in formulas and in losses.csv, and a logit in code.
        x = images[batch] / 127.5 - 1  # 0 .. 255 -> [-1, 1], the range of G's tanh
        z = torch.randn(len(x), args.z_dim, device=x.device)
        fake = G(z)
        # D has no BatchNorm, so real and fake images can go through it together.
        # detach(): no gradients for G here. Otherwise backward() would also delete the
        # graph that G's own step needs.
        real_logits, fake_logits = D(torch.cat([x, fake.detach()])).chunk(2)
        loss_D = losses.discriminator_loss(
            real_logits, fake_logits, args.real_label, args.label_noise
        )
        # A logged value must not keep its graph in memory: detach().
        log["loss_D"].append(loss_D.detach())  # without R1; log 4 if D can only guess
        if args.r1 and step % R1_EVERY == 0:
            loss_D = loss_D + args.r1 * R1_EVERY * losses.r1_penalty(D, x)
        opt_D.zero_grad()  # otherwise backward() would add to the old gradients
        loss_D.backward()
        opt_D.step()

        log["D_x"].append(real_logits.detach().sigmoid().mean())
        log["D_G_z1"].append(fake_logits.detach().sigmoid().mean())
        correct = torch.cat([real_logits > 0, fake_logits < 0])  # logit > 0: D(x) > 1/2
        log["acc_D"].append(correct.float().mean())

        if step % args.k == 0:  # after k steps of D, one step of G
            # (2) Update G: maximise log D(G(z)). Minimax: minimise log(1 - D(G(z))).
            # Algorithm 1 draws new noise. We reuse the fakes: G has not changed.
            fake_logits = D(fake)  # the updated D; no detach(): G learns through D
            if args.loss == "minimax":
                loss_G = losses.minimax_generator_loss(fake_logits)
            else:
                loss_G = losses.generator_loss(fake_logits)
            opt_G.zero_grad()
            # `inputs`: gradients for G's weights only, which saves time.
            loss_G.backward(inputs=list(G.parameters()))
            opt_G.step()
            log["loss_G"].append(loss_G.detach())
            log["D_G_z2"].append(fake_logits.detach().sigmoid().mean())

            # (3) Update the average: decay * average + (1 - decay) * G. At first the
            # decay is small, so that bad first weights fade. It grows (in 40 epochs of
            # MNIST to 0.9995), but not above --ema.
            G_steps = step // args.k
            decay = min(args.ema, (1 + G_steps) / (10 + G_steps))
            update_average(G_ema, G, decay)
    return {name: float(sum(values) / len(values)) for name, values in log.items()}


def shuffled_batches(args, images):
    """All images in random order: one tensor of indices for each batch.

    A small data set is shuffled and repeated, up to EPOCH_IMAGES images and at least k
    batches. There is no DataLoader: the images are already on the device.
    """
    n = len(images)
    n_wanted = max(n, EPOCH_IMAGES, args.k * args.batch_size)
    repeats = math.ceil(n_wanted / n)  # MNIST: 1; a folder of 60 images: 167
    orders = [torch.randperm(n, device=images.device) for _ in range(repeats)]
    order = torch.cat(orders)[:n_wanted]
    # Batches of nearly equal size: BatchNorm could not use a last batch of one image.
    return order.tensor_split(n_wanted // args.batch_size)


def train(args, images, run, checkpoint=None):
    """Train on uint8 images (N, C, H, W), on their device. Save into the folder `run`.

    Continues from `checkpoint`, if given. Returns G_ema, in eval mode, on the CPU.
    """
    device = images.device
    image_shape = list(images.shape[1:])
    # Matrix products may round their inputs (to TF32 or bfloat16): fast, good enough.
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(args.seed)
    fixed_z = torch.randn(64, args.z_dim).to(device)  # the same for all pictures

    G_args = {  # saved as well: load_generator() makes G from them
        "z_dim": args.z_dim,
        "hidden": args.g_hidden,
        "image_shape": image_shape,
        "batch_norm": args.batch_norm,
        "dropout": args.dropout,
        "leak": args.g_leak,
    }
    G = Generator(**G_args).to(device)
    D = Discriminator(args.d_hidden, image_shape, args.dropout, args.d_leak).to(device)
    # The average of G. In eval mode, BatchNorm does not use the batch.
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    # Each optimiser moves the weights of its own network only. fused=True is faster.
    betas = (args.beta1, 0.999)
    opt_G = torch.optim.Adam(G.parameters(), args.lr, betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), args.lr, betas, fused=True)
    stateful = {"G": G, "D": D, "G_ema": G_ema, "opt_G": opt_G, "opt_D": opt_D}
    history = []  # one row of losses.csv for each epoch
    if checkpoint:
        load_states(stateful, checkpoint)
        history = checkpoint["history"]
    found = {"device": str(device), "images": list(images.shape)}
    info = vars(args) | found | {"torch": str(torch.__version__)}  # for run.json
    values = {"args": vars(args), "info": info, "G_args": G_args, "history": history}
    first_epoch = len(history) + 1
    if first_epoch <= args.epochs:
        save_image(images[:64] / 255, run / "real.png")

    for epoch in range(first_epoch, args.epochs + 1):
        start = time.perf_counter()
        means = train_epoch(args, images, epoch, G, D, G_ema, opt_G, opt_D)
        last = history[-1] if history else {}
        row = dict.fromkeys(last, math.nan)  # nan if this epoch logged none
        row |= {"epoch": epoch, **means, "seconds": time.perf_counter() - start}
        history.append(row)
        save_table(run, history)  # if it diverges, the last rows show how
        samples = G_ema(fixed_z) / 2 + 0.5  # [-1, 1] -> [0, 1]
        if samples.isnan().any():
            sys.exit(f"error: epoch {epoch} diverged: try a lower --lr")
        save_image(samples, run / f"epoch_{epoch:05}.png")
        save_info(run, info)  # the flags that trained this checkpoint
        save_checkpoint(run, stateful, values)
        print_row(row, args.epochs, header=epoch == first_epoch or len(row) > len(last))
    return G_ema.cpu()


# --- What a run prints and saves ------------------------------------------------------
def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def one_line(error):
    """The type of an error and its first sentence. Some errors fill a page."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words.split('. ')[0]:.400}"


def print_row(row, epochs, header):
    """Print a row of losses.csv. With `header`, print the column names first."""
    epoch, *values = row.values()
    if header:
        print(f"{'epoch':>8}", *(f"{name:>7}" for name in list(row)[1:]))
    done = f"{epoch}/{epochs}"
    print(f"{done:>8}", *(f"{value:7.3f}" for value in values), flush=True)


def new_folder():
    """Make runs/001, or the next free number. Two runs never get the same folder."""
    for number in itertools.count(1):
        run = Path(f"runs/{number:03}")
        with suppress(FileExistsError):
            os.makedirs(run)
            return run


def save_info(run, info):
    """run.json, for people: flags, device, shape of the images, version, and score."""
    replace_file(run / "run.json", json.dumps(info, indent=2).encode())


def save_table(run, rows):
    """losses.csv. A new column is empty in older rows."""
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[-1])
    writer.writeheader()
    writer.writerows(rows)
    replace_file(run / "losses.csv", table.getvalue().encode())


def save_checkpoint(run, stateful, values):
    """checkpoint.pt: all that --resume needs. After a kill, the old file is there."""
    states = {name: part.state_dict() for name, part in stateful.items()}
    data = io.BytesIO()  # torch.save to a file raises no OSError when the disk is full
    torch.save(states | values, data)
    replace_file(run / "checkpoint.pt", data.getvalue())


def load_states(stateful, checkpoint):
    """Put the saved states into networks and optimisers, or stop if they do not fit."""
    try:
        for name, part in stateful.items():
            state = checkpoint[name]
            if isinstance(part, torch.optim.Optimizer):
                # The flags given now (--lr, --beta1) replace the saved settings.
                state["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(state)
    except Exception as error:
        message = f"these flags or data do not fit the checkpoint: {one_line(error)}"
        raise SystemExit(f"error: {message}") from error


def load_run(run):
    """The checkpoint in a run's folder, the run's flags, and its number of epochs."""
    try:
        checkpoint = load_checkpoint(run)
        return checkpoint, dict(checkpoint["args"]), len(checkpoint["history"])
    except Exception as error:
        message = f'no whole run of this version in --resume "{run}": {one_line(error)}'
        raise SystemExit(f"error: {message}") from error


def save_gif(run):
    """training.gif: the pictures of all epochs, 150 ms each."""
    paths = sorted(run.glob("epoch_*.png"))
    if not paths:
        return
    print("writing training.gif ...", flush=True)  # a minute, if pictures are large
    pages = (Image.open(path).convert("RGB") for path in paths)  # opened one at a time
    gif = io.BytesIO()
    try:
        first = next(pages)
        first.save(gif, "GIF", save_all=True, append_images=pages, duration=150, loop=0)
        replace_file(run / "training.gif", gif.getvalue())
    except (OSError, SyntaxError, ValueError) as error:  # also of a bad picture
        warn(f"training.gif: {error}")


def replace_file(path, data):
    """Write a new file, then rename it: a stop in between leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    try:
        temporary.replace(path)
    except PermissionError as error:  # Windows: another program has the file open
        warn(f"{path} stays as it was: {error}")


# --- Evaluation -----------------------------------------------------------------------
def score(G, z_dim, images, test_images):
    """parzen() of 10,000 samples of G. Their noise is the same for all runs."""
    print("scoring 10,000 samples ...", flush=True)
    torch.manual_seed(0)
    samples = G(torch.randn(10_000, z_dim)) / 2 + 0.5  # [-1, 1] -> [0, 1]
    return parzen(samples, images, test_images)


def parzen(samples, images, test_images):
    """Log-likelihood of the test images, in nats (Goodfellow et al. 2014, section 5).

    G gives no density, so a Gaussian is put on each sample: a Parzen window. Its sigma
    is the best of ten for 1,000 validation images, as in the authors' parzen_ll.py. The
    authors keep these out of training; here, G has seen them. Samples (N, C, H, W) in
    [0, 1], images uint8. Returns the mean over the test images and its standard error.
    """
    # Distances are small differences of large numbers: no rounding here.
    torch.set_float32_matmul_precision("highest")
    validation = images[-10_000:-9000]  # of MNIST: images 50,000 to 50,999
    sigmas = torch.logspace(-1, 0, 10)  # from 0.1 to 1
    best = max(sigmas, key=lambda s: log_density(validation, samples, s).mean())
    scores = log_density(test_images, samples, best)
    return scores.mean().item(), scores.std().item() / len(scores) ** 0.5


def log_density(images, samples, sigma):
    """For each image x: log of the mean, over all samples s, of N(x; s, sigma^2).

    With n samples and d pixels:
    log sum exp(-|x - s|^2 / (2 sigma^2)) - log n - d/2 log(2 pi sigma^2)
    """
    log_sums = []
    for chunk in images.split(1000):  # all at once would take 1 GB more
        distances = torch.cdist(chunk.flatten(1) / 255, samples.flatten(1))
        log_sums.append(distances.square_().div_(-2 * sigma**2).logsumexp(1))
    log_norm = samples[0].numel() / 2 * math.log(2 * math.pi * sigma**2)
    return torch.cat(log_sums) - math.log(len(samples)) - log_norm


# --- Data: uint8 images (N, C, H, W) --------------------------------------------------
def load_data(args):
    """The name of the data set, its training images, its test images (or None)."""
    name = args.dataset
    if name == "drawn":
        return name, *draw_digits()
    if name in DATASETS:
        return name, *download(name, args.data_dir)
    if name == "auto":
        try:
            return "mnist", *download("mnist", args.data_dir)
        except FileNotFoundError as error:
            warn(f"training on --dataset drawn: {error}")
            return "drawn", *draw_digits()
    if not os.path.isdir(name):
        sys.exit(f"error: --dataset {name}: no folder, and none of {NAMES}")
    return name, load_folder(name, args.image_size), None


def download(name, folder):
    """Training and test images. They are downloaded once, and kept in the folder."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds: do not wait for a dead network
    try:
        train_set = DATASETS[name](folder, train=True, download=True)
        test_set = DATASETS[name](folder, train=False, download=True)
    except Exception as error:
        message = f"no {name} in --data-dir {folder}: {one_line(error)}"
        raw = Path(folder, DATASETS[name].__name__, "raw")
        message += f" (are its four files in {raw}, and whole?)"
        raise FileNotFoundError(message) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return train_set.data.unsqueeze(1), test_set.data.unsqueeze(1)


def load_folder(folder, size):
    """All images in a folder and subfolders (no links); one channel if all are grey."""
    print(f"reading {folder} ...", flush=True)
    paths = []
    locked = []  # errors of folders that cannot be read
    for parent, folders, names in os.walk(folder, onerror=locked.append):
        folders[:] = [name for name in folders if name[0] != "."]  # skip hidden folders
        paths += [os.path.join(parent, name) for name in names if name[0] != "."]
    unreadable = {error.filename: error for error in locked}
    images = []
    for path in sorted(filter(os.path.isfile, paths)):
        try:
            images.append(load_image(path, size))
        except Exception as error:  # noqa: BLE001 (a damaged file can raise any error)
            unreadable[path] = error
    if unreadable:
        endings = Counter(Path(path).suffix.lower() or "other" for path in unreadable)
        counts = ", ".join(f"{n} {ending}" for ending, n in endings.most_common())
        path, error = next(iter(unreadable.items()))
        warn(f"unreadable: {counts}. The first is {path}: {one_line(error)}")
    if len(images) < 2:
        sys.exit(f"error: --dataset {folder}: {len(images)} images, 2 are needed")
    images = torch.stack(images)
    grey = (images == images[:, :1]).all()
    return images[:, :1].clone() if grey else images


def load_image(path, size):
    """uint8 (3, size, size): upright, cropped to a square, transparent parts white."""
    with Image.open(path) as file:
        file.draft(None, (2 * size, 2 * size))  # a large JPEG: read fewer pixels
        if file.mode[0] in "IF":  # modes I;16, I and F: convert() would clip them
            raise ValueError("grey with more than 8 bits: convert it to 8")
        if file.format == "TIFF" and file.n_frames > 1:
            raise ValueError("several images in one file: save each as a file")
        image = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return transforms.PILToTensor()(ImageOps.fit(white, (size, size)))


def draw_digits():
    """Digits in Pillow's font, distorted at random. Every call draws the same ones."""
    print(f"drawing {sum(DRAWN):,} digits ...", flush=True)
    torch.manual_seed(0)
    warp = transforms.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 15, Image.BILINEAR)
    font = ImageFont.load_default(22)
    digits = []
    for n in range(sum(DRAWN)):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((8, 1), str(n % 10), 255, font, stroke_width=n % 3)
        digits.append(transforms.PILToTensor()(warp(image)))
    return torch.stack(digits).split(DRAWN)


# --- Command line and main ------------------------------------------------------------
def parse_args(argv=None, **defaults):
    """The flags. A resumed run passes its own flags as `defaults`."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage=argparse.SUPPRESS,  # otherwise an error would print all flags first
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--out-dir", help="new folder for the run; None: runs/001, ...")
    either.add_argument("--resume", help="continue the run in this folder")
    positive = in_range(int, 1)  # 1, 2, 3, ...
    from_0 = in_range(float, 0)  # 0 or more
    fraction = in_range(float, 0, 1)  # 0 or more, but below 1
    widths = {"type": positive, "nargs": "+"}
    on_off = argparse.BooleanOptionalAction

    add_data = parser.add_argument_group("the data").add_argument
    add_data("--dataset", default="auto", help=f"{', '.join(NAMES)}, or a folder")
    add_data("--data-dir", default="data", help="where downloaded data sets are kept")
    add_data("--image-size", type=positive, default=28, help="for a folder, in pixels")

    add_net = parser.add_argument_group("the networks").add_argument
    add_net("--z-dim", type=positive, default=64, help="length of the noise vector z")
    add_net("--g-hidden", **widths, default=[256, 512], help="widths of G's layers")
    add_net("--d-hidden", **widths, default=[512, 256], help="widths of D's layers")
    add_net("--batch-norm", action=on_off, default=True, help="in G: varied images")
    add_net("--dropout", type=fraction, default=0.0, help="dropout rate in G and in D")
    add_net("--g-leak", type=from_0, default=0.0, help="negative slope in G; 0: ReLU")
    add_net("--d-leak", type=from_0, default=0.2, help="negative slope in D; 0: ReLU")

    add_game = parser.add_argument_group("the game").add_argument
    kinds = ["non-saturating", "minimax"]
    add_game("--loss", choices=kinds, default=kinds[0], help="the loss of G")
    add_game("--k", type=positive, default=1, help="steps of D for each step of G")
    add_game("--real-label", type=from_0, default=1.0, help="D's label of real images")
    add_game("--label-noise", type=fraction, default=0.0, help="labels vary by +- this")
    add_game("--r1", type=from_0, default=1.0, help="gamma of the R1 penalty; 0: off")

    about = "an epoch shows every image once, or 10,000 images if there are fewer"
    add_opt = parser.add_argument_group("the optimisation", about).add_argument
    add_opt("--epochs", type=positive, default=40, help="total, resumed ones included")
    add_opt("--batch-size", type=in_range(int, 2), default=128, help="images per step")
    add_opt("--lr", type=from_0, default=1e-3, help="Adam's learning rate, in G and D")
    add_opt("--beta1", type=fraction, default=0.0, help="Adam's momentum; 0: none")
    add_opt("--ema", type=fraction, default=0.9999, help="decay of G's average; 0: off")
    add_opt("--seed", type=in_range(int, 0, 2**32), default=0, help="of all randomness")
    add_opt("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto: the best")
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def in_range(kind, low, high=math.inf):
    """A type for argparse: an int or a float with low <= number < high."""

    def parse(text):
        number = kind(text)
        if not low <= number < high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
        return number

    parse.__name__ = kind.__name__  # for argparse's message "invalid int value"
    return parse


def choose_device(name):
    """The device of that name, or the best one (auto). The CPU, if it does not work."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        torch.device(name)
    except RuntimeError as error:  # there is no such name
        raise SystemExit(f"error: --device {name}: {one_line(error)}") from error
    try:
        torch.ones(2, device=name).sum().item()  # fails on a card that is too old
        return name
    except (AssertionError, ImportError, RuntimeError) as error:
        warn(f"{name} cannot be used: {one_line(error)}; the CPU is taken")
        if name.startswith("cuda"):
            torch.cuda.is_available = lambda: False  # otherwise Adam asks the card
        return "cpu"


def main(argv=None):
    """Run the program; return the run's folder and the average of G, on the CPU."""
    if argv is not None:
        argv = [str(word) for word in argv]  # a notebook may pass numbers and paths
    args = parse_args(argv)
    checkpoint = None
    run = None
    try:
        if args.resume is not None:
            run = Path(args.resume)
            checkpoint, flags, done = load_run(args.resume)
            args = parse_args(argv, **flags)
            if args.epochs <= done:
                warn(f"{done} epochs are done: to go on, add --epochs {2 * done}")
                # Nothing is trained: these are still the flags that made the weights.
                flags.update(epochs=done, device=args.device, data_dir=args.data_dir)
                args = argparse.Namespace(**flags)
        elif args.out_dir is not None:
            run = Path(args.out_dir)
            if (run / "checkpoint.pt").exists():
                sys.exit(f"error: a run is in {run}: name a new folder, or --resume it")
            if any(run.glob("[!.]*")):  # hidden files do not count
                sys.exit(f"error: --out-dir {run} is not empty: name a new folder")
        device = choose_device(args.device)
        args.dataset, images, test_images = load_data(args)  # "auto" becomes a name
        images = images.to(device)
        run = run or new_folder()
        run.mkdir(parents=True, exist_ok=True)
        print(args.dataset, list(images.shape), f"on {device}, into {run}", flush=True)
        try:
            G = train(args, images, run, checkpoint)
        finally:  # also after Ctrl-C
            save_gif(run)
        if test_images is not None:
            mean, std_error = score(G, args.z_dim, images.cpu(), test_images)
            print(
                f"log-likelihood of {args.dataset}: {mean:.1f} +- {std_error:.1f} nats"
            )
            info = load_checkpoint(run).get("info", vars(args))  # none in old runs
            save_info(run, info | {"log_likelihood": mean, "standard_error": std_error})
        return run, G
    except OSError as error:  # a full disk, or a folder without permission to write
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        if run and (run / "checkpoint.pt").exists():
            warn(f'stopped; go on with --resume "{run}"')
        else:
            warn("stopped; nothing is saved yet")
        raise SystemExit(130) from None  # 130: stopped by Ctrl-C


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # IDLE's has none
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters it cannot show
    main()
