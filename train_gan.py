# For uv: what `uv run train_gan.py` installs.
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.10", "torchvision>=0.25", "pillow>=10.1"]
# ///
"""Train a generative adversarial network (GAN): Goodfellow et al. 2014, Algorithm 1.

A generator G makes images from noise z. A discriminator D answers D(x), the probability
that an image x is real. They learn in turn: D learns to tell real images from G's, and
G learns to make images that D takes for real.

python train_gan.py                          # MNIST, or drawn digits without internet
python train_gan.py --resume runs/001        # continue a run that was stopped

40 epochs of MNIST take 4 to 6 minutes on two CPU cores, and score 237.7 nats, the mean
of ten seeds (see parzen(); higher is better). The paper has 225, real images get 241.

Newer than the paper are Adam and these four. The flag in brackets undoes each:
- BatchNorm in G keeps G's images varied (--no-batch-norm).
- No momentum in Adam, because old gradients belong to an older D (--beta1 0.9).
- The R1 penalty keeps D's slope small: G does not jump from side to side (--r1 0).
- Pictures and score use an average of G: G's weights move in circles (--ema 0).

Read the section "The game" first: train_epoch, then train. The rest can wait.
"""

import argparse
import copy
import csv
import glob
import itertools
import json
import math
import os
import socket
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import transforms
from torchvision.datasets import KMNIST, MNIST, FashionMNIST
from torchvision.utils import save_image

import losses
from models import Discriminator, Generator, load_checkpoint, update_average

R1_EVERY = 4  # R1 is slow, so every 4th step adds it, times 4 (StyleGAN2, 3.1)
EPOCH_IMAGES = 10_000  # in an epoch, at least: a smaller data set is shown again
DRAWN = [30_000, 5_000]  # how many digits are drawn: for training, for the test
DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST, "kmnist": KMNIST}
NAMES = f"auto, {', '.join(DATASETS)}, drawn"


# --- The game -------------------------------------------------------------------------
def train_epoch(args, images, epoch, G, D, G_ema, opt_G, opt_D):
    """Algorithm 1 for one epoch: after every k steps of D, one step of G.

    `images` are uint8 (N, C, H, W): number, channels, height, width. train() makes the
    networks, their optimisers, and G_ema, a running average of G. Returns the mean of
    each logged column: D_x is D(x), D_G_z1 and D_G_z2 are D(G(z)) before and after D's
    update, acc_D is the share of images, real and fake, that D judges rightly.
    """
    # One seed for each epoch: a resumed run draws the same numbers. The large factor
    # keeps runs apart: epoch 2 of --seed 0 must not repeat epoch 1 of --seed 1.
    torch.manual_seed(args.seed * 1_000_003 + epoch)
    batches = shuffled_batches(args, images)
    first_step = (epoch - 1) * len(batches) + 1  # k counts on across epochs
    log = defaultdict(list)  # of tensors: .item() would wait for the GPU in each step
    for step, batch in enumerate(batches, first_step):
        # (1) Update D: maximise log D(x) + log(1 - D(G(z))). loss_D is minus this.
        # D(x) is a probability in formulas and in losses.csv, and a logit in code.
        x = images[batch] / 127.5 - 1  # 0 .. 255 -> [-1, 1], the range of G's tanh
        z = torch.randn(len(x), args.z_dim, device=x.device)
        fake = G(z)
        real_logits = D(x)
        # detach(): this step gives G no gradients. Otherwise backward() would also
        # delete G's graph (what autograd remembers of G(z)), which step (2) needs.
        fake_logits = D(fake.detach())
        loss_D = losses.discriminator_loss(
            real_logits, fake_logits, args.real_label, args.label_noise
        )
        penalty = 0.0  # R1 is not in every step
        if args.r1 and step % R1_EVERY == 0:
            penalty = args.r1 * R1_EVERY * losses.r1_penalty(D, x)
        opt_D.zero_grad()  # otherwise backward() would add to the old gradients
        (loss_D + penalty).backward()
        opt_D.step()

        # detach(): a logged value must not keep its graph in memory.
        log["loss_D"].append(loss_D.detach())  # without R1; log 4 if D can only guess
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
            # `inputs`: G's weights only. Gradients for D's weights would cost time.
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

    A small data set is shown again, until there are EPOCH_IMAGES images and k batches
    (so that G has a step). No DataLoader: the images are already on the device.
    """
    n = len(images)
    n_shown = max(n, EPOCH_IMAGES, args.k * args.batch_size)
    repeats = math.ceil(n_shown / n)  # MNIST: 1; a folder of 60 images: 167
    orders = [torch.randperm(n, device=images.device) for _ in range(repeats)]
    order = torch.cat(orders)[:n_shown]
    # Batches of nearly equal size: BatchNorm could not use a last batch of one image.
    return order.tensor_split(n_shown // args.batch_size)


def train(args, images, run, checkpoint=None):
    """Make the players, train them, and save each epoch into the folder `run` (a Path).

    `images` are uint8 (N, C, H, W), on the device that will train. With a `checkpoint`,
    its run goes on. Returns G_ema, in eval mode, on the CPU.
    """
    device = images.device
    # Matrix products may keep fewer digits (TF32, bfloat16): faster, and good enough.
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(args.seed)
    fixed_z = torch.randn(64, args.z_dim).to(device)  # for all pictures
    image_shape = images.shape[1:]
    G_args = {  # in the checkpoint, too: load_generator() makes G from them
        "z_dim": args.z_dim,
        "hidden": args.g_hidden,
        "image_shape": image_shape,
        "batch_norm": args.batch_norm,
        "dropout": args.dropout,
        "leak": args.g_leak,
    }
    G = Generator(**G_args).to(device)
    D = Discriminator(args.d_hidden, image_shape, args.dropout, args.d_leak).to(device)
    # The average of G. eval(): BatchNorm uses running averages, not the batch.
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    # Each optimiser moves the weights of its own network only. fused=True is faster.
    opt_G = torch.optim.Adam(G.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    opt_D = torch.optim.Adam(D.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    parts = {"G": G, "D": D, "G_ema": G_ema, "opt_G": opt_G, "opt_D": opt_D}
    history = []  # one row of losses.csv for each epoch
    if checkpoint:
        history = checkpoint["history"]
        for name in ("opt_G", "opt_D"):  # take --lr and --beta1 of now
            checkpoint[name]["param_groups"] = parts[name].state_dict()["param_groups"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    shown = torch.randperm(len(images))[:64].to(device)  # the first 64 may look alike
    save_image(images[shown] / 255, run / "real.png")
    first_epoch = len(history) + 1

    for epoch in range(first_epoch, args.epochs + 1):
        start = time.perf_counter()
        means = train_epoch(args, images, epoch, G, D, G_ema, opt_G, opt_D)
        means["seconds"] = time.perf_counter() - start
        history.append({"epoch": epoch, **means})
        save_table(run, history)
        samples = G_ema(fixed_z) / 2 + 0.5  # [-1, 1] -> [0, 1]
        if samples.isnan().any():
            sys.exit(f"error: epoch {epoch} diverged: try a lower --lr")
        save_image(samples, run / f"epoch_{epoch:05}.png")
        facts = {"epochs_done": epoch, "device": str(device), "images": images.shape}
        (run / "run.json").write_text(json.dumps(vars(args) | facts, indent=2))
        values = {"args": vars(args), "G_args": G_args, "history": history}
        save_checkpoint(run, parts, values)
        if epoch == first_epoch:
            print("   epoch", *(f"{name:>7}" for name in means))
        done = f"{epoch}/{args.epochs}"
        print(f"{done:>8}", *(f"{mean:7.3f}" for mean in means.values()), flush=True)
    return G_ema.cpu()


# --- The files of a run ---------------------------------------------------------------
def new_folder(name):
    """Make this folder, or without a name runs/001, runs/002, ...; return its Path."""
    if name:
        run = Path(name)
        run.mkdir(parents=True, exist_ok=True)
        if set(os.listdir(run)) - {"real.png"}:  # real.png: stopped in its first epoch
            sys.exit(f"error: {run} is not empty: name a new folder, or --resume it")
        return run
    Path("runs").mkdir(exist_ok=True)
    for number in itertools.count(1):
        run = Path(f"runs/{number:03}")
        with suppress(FileExistsError):  # two runs may start at the same time
            run.mkdir()
            return run


def save_table(run, history):
    """losses.csv, one row for each epoch."""
    try:
        with open(run / "losses.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=history[-1])
            writer.writeheader()
            writer.writerows(history)
    except PermissionError as error:  # Excel locks it; the next epoch writes all rows
        print(f"warning: losses.csv stays as it was: {error}")


def save_checkpoint(run, parts, values):
    """checkpoint.pt: all that --resume needs. If this is killed, the old file stays."""
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save(states | values, run / "checkpoint.tmp")
    os.replace(run / "checkpoint.tmp", run / "checkpoint.pt")


def save_gif(run):
    """training.gif: the pictures of all epochs, 150 ms each."""
    pages = (Image.open(path) for path in sorted(run.glob("epoch_*.png")))
    first = next(pages, None)
    if first:  # otherwise the pictures were deleted
        gif = run / "training.gif"
        first.save(gif, save_all=True, append_images=pages, duration=150, loop=0)


# --- Evaluation -----------------------------------------------------------------------
def score(G, args, images, test_images, run):
    """Print parzen() of 10,000 samples of G, and add it to run.json."""
    print("scoring 10,000 samples ...", flush=True)
    torch.manual_seed(0)  # the same noise for all runs
    samples = G(torch.randn(10_000, args.z_dim)) / 2 + 0.5  # [-1, 1] -> [0, 1]
    mean, std_error = parzen(samples, images, test_images)
    print(f"log-likelihood of {args.dataset}: {mean:.1f} +- {std_error:.1f} nats")
    info = json.loads((run / "run.json").read_text())
    info |= {"log_likelihood": mean, "standard_error": std_error}
    (run / "run.json").write_text(json.dumps(info, indent=2))


def parzen(samples, images, test_images):
    """Log-likelihood of the test images, in nats (Goodfellow et al. 2014, section 5).

    G gives no density, so a Gaussian is put on each sample: a Parzen window. Its sigma
    is the best of ten for 1,000 validation images, as in the authors' parzen_ll.py (but
    our G was trained on them). It is a rough measure: look at the pictures, too.
    Samples (N, C, H, W) in [0, 1]; images uint8. Returns the mean over the test images
    and its standard error.
    """
    # Full precision again: cdist() subtracts large numbers that are nearly equal.
    torch.set_float32_matmul_precision("highest")
    validation = images[-10_000:][:1000]  # the first 1,000 of the last 10,000
    sigmas = torch.logspace(-1, 0, 10)  # from 0.1 to 1
    best = max(sigmas, key=lambda sigma: log_density(validation, samples, sigma).mean())
    scores = log_density(test_images, samples, best)
    return scores.mean().item(), scores.std().item() / len(scores) ** 0.5


def log_density(images, samples, sigma):
    """For each image x: log of the mean, over all samples s, of N(x; s, sigma^2).

    uint8 images (N, C, H, W) -> (N,). With n samples in [0, 1] and d pixels:
    log sum exp(-|x - s|^2 / (2 sigma^2)) - log n - d/2 log(2 pi sigma^2)
    """
    log_sums = []
    for chunk in images.split(1000):  # all at once would take 1 GB more
        distances = torch.cdist(chunk.flatten(1) / 255, samples.flatten(1))
        log_sums.append((-distances.square() / (2 * sigma**2)).logsumexp(1))
    log_norm = samples[0].numel() / 2 * math.log(2 * math.pi * sigma**2)
    return torch.cat(log_sums) - math.log(len(samples)) - log_norm


# --- Data: uint8 images (N, C, H, W) --------------------------------------------------
def load_data(args):
    """The name of the data set, its training images, its test images (or None)."""
    name = args.dataset
    if name == "auto":
        try:
            return "mnist", *download("mnist", args.data_dir)
        except OSError as error:
            print(f"warning: training on --dataset drawn: {error}")
            name = "drawn"
    if name == "drawn":
        return name, *draw_digits()
    if name in DATASETS:
        return name, *download(name, args.data_dir)
    if not os.path.isdir(name):
        sys.exit(f"error: --dataset {name}: no folder, and none of {NAMES}")
    return name, load_folder(name, args.image_size), None


def download(name, folder):
    """Training and test images, each downloaded once and then kept in the folder."""
    socket.setdefaulttimeout(10)  # seconds: do not wait for a dead network
    try:
        train_set = DATASETS[name](folder, train=True, download=True)
        test_set = DATASETS[name](folder, train=False, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raw = f"{folder}/{DATASETS[name].__name__}/raw"
        four = "train- and t10k-images-idx3-ubyte, train- and t10k-labels-idx1-ubyte"
        raise OSError(f"no {name}: {raw} needs {four}: {error!r}") from error
    return train_set.data.unsqueeze(1), test_set.data.unsqueeze(1)


def load_folder(folder, size):
    """All images in a folder and its subfolders; one channel if all are grey."""
    print(f"reading {folder} ...", flush=True)
    images = []
    skipped = []
    everything = os.path.join(glob.escape(folder), "**")  # glob skips hidden files
    paths = filter(os.path.isfile, glob.glob(everything, recursive=True))
    for path in sorted(paths):
        try:
            images.append(load_image(path, size))
        except Exception as error:  # noqa: BLE001 (a damaged file can raise any error)
            skipped.append(f"{path}: {error!r}")
    if skipped:
        print(f"warning: {len(skipped)} files are skipped. The first is {skipped[0]}")
    if len(images) < 2:
        sys.exit(f"error: --dataset {folder}: {len(images)} images, 2 are needed")
    images = torch.stack(images)
    grey = (images == images[:, :1]).all()
    return images[:, :1].clone() if grey else images  # clone(): frees the rest


def load_image(path, size):
    """uint8 (3, size, size): upright, cropped to a square, transparent parts white."""
    with Image.open(path) as file:
        if file.mode[0] in "IF":  # modes I;16, I and F: convert() would clip them
            raise ValueError("grey with more than 8 bits: convert it to 8")
        image = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return transforms.PILToTensor()(ImageOps.fit(white, (size, size)))


def draw_digits():
    """Digits, turned, shifted, scaled and sheared at random: the same in every call."""
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
def parse_args(argv, **defaults):
    """The flags: --z-dim is args.z_dim. A resumed run passes its own as `defaults`."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage=argparse.SUPPRESS,  # otherwise an error would print all flags first
    )
    on_off = argparse.BooleanOptionalAction
    kinds = ["non-saturating", "minimax"]
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--out-dir", help="folder of the run; None: runs/001, ...")
    either.add_argument("--resume", help="continue the run in this folder")
    add = parser.add_argument
    # The data
    add("--dataset", default="auto", help=f"{NAMES}, or a folder")
    add("--data-dir", default="data", help="where downloaded data sets are kept")
    add("--image-size", type=int, default=28, help="for a folder, in pixels")
    # The networks
    add("--z-dim", type=int, default=64, help="length of the noise vector z")
    add("--g-hidden", type=int, nargs="+", default=[256, 512], help="widths in G")
    add("--d-hidden", type=int, nargs="+", default=[512, 256], help="widths in D")
    add("--batch-norm", action=on_off, default=True, help="in G: varied images")
    add("--dropout", type=float, default=0.0, help="dropout rate in G and in D")
    add("--g-leak", type=float, default=0.0, help="negative slope in G; 0: ReLU")
    add("--d-leak", type=float, default=0.2, help="negative slope in D; 0: ReLU")
    # The game
    add("--loss", choices=kinds, default="non-saturating", help="the loss of G")
    add("--k", type=int, default=1, help="steps of D for each step of G")
    add("--real-label", type=float, default=1.0, help="D's label of real images")
    add("--label-noise", type=float, default=0.0, help="labels vary by +- this")
    add("--r1", type=float, default=1.0, help="gamma of the R1 penalty; 0: off")
    # The optimisation
    add("--epochs", type=int, default=40, help="total, resumed ones included")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate, in G and D")
    add("--beta1", type=float, default=0.0, help="Adam's momentum; 0: none")
    add("--ema", type=float, default=0.9999, help="decay of G's average; 0: off")
    add("--seed", type=int, default=0, help="of all randomness")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto: cuda or cpu")
    parser.set_defaults(**defaults)
    args = parser.parse_args([str(word) for word in argv])  # for main(["--epochs", 2])
    if min(args.epochs, args.k, args.z_dim, args.batch_size, args.image_size) < 1:
        parser.error("--epochs, --k, --z-dim, --batch-size, --image-size: 1 or more")
    return args


def choose_device(name):
    """The device of that name; auto is cuda if it is there. Without cuda, the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        print(f"warning: torch {torch.__version__} finds no GPU: training on the CPU")
        name = "cpu"
    return torch.device(name)


def main(argv):
    """Run the program; return the run's folder and the average of G, on the CPU."""
    args = parse_args(argv)
    checkpoint = None
    try:
        if args.resume is not None:
            run = Path(args.resume)
            checkpoint = load_checkpoint(run)
            args = parse_args(argv, **checkpoint["args"])
            done = len(checkpoint["history"])
            if args.epochs <= done:
                print(f"{done} epochs are done: to go on, add --epochs {2 * done}")
                flags = ["--epochs", done, "--data-dir", args.data_dir]
                args = parse_args(flags, **checkpoint["args"])  # the flags that made G
        device = choose_device(args.device)
        args.dataset, images, test_images = load_data(args)  # "auto" becomes a name
        if checkpoint is None:
            run = new_folder(args.out_dir)
    except OSError as error:  # a wrong path, or no network
        sys.exit(f"error: {error}")
    print(args.dataset, list(images.shape), f"on {device}, into {run}", flush=True)
    try:
        G = train(args, images.to(device), run, checkpoint)
    except KeyboardInterrupt:
        sys.exit(f'stopped; if an epoch is saved, --resume "{run}" goes on after it')
    save_gif(run)
    if test_images is not None:
        score(G, args, images, test_images, run)
    return run, G


if __name__ == "__main__":
    main(sys.argv[1:])
