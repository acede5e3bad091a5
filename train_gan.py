# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.10", "torchvision>=0.25", "pillow>=10.1"]
# ///
"""Train a generative adversarial network by Algorithm 1 of Goodfellow et al. 2014.

A generator G makes images out of noise z. A discriminator D answers with D(x), the
probability that an image x is real. D learns to tell real images from G's, and G
learns to make images that D takes for real, in turn.

python train_gan.py                           # MNIST, 40 epochs, the best device
python train_gan.py --resume runs/001         # go on where a run was cut off

The game is the first section below: train_epoch and train. The sections after it
(what a run leaves behind, evaluation, data, command line, main) can wait.
"""

import argparse
import copy
import csv
import glob
import io
import json
import math
import os
import socket
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torchvision import datasets, transforms, utils

import losses
from models import Discriminator, Generator, load_checkpoint, update_average

# The R1 penalty is expensive. It is computed in every 4th step of D and made 4 times
# as heavy: lazy regularisation (Karras et al. 2020, section 3.1).
R1_EVERY = 4
SAVE_EVERY = 100  # steps of D, if epochs are shorter than that; else every epoch
DRAWN = [30_000, 5_000]  # digits for the training, and for the test
DATASETS = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
}
NAMES = ["auto", *DATASETS, "drawn"]  # what --dataset knows, beside folders


# --- The game -------------------------------------------------------------------------


def train_epoch(args, images, epoch, G, D, G_ema, opt_G, opt_D):
    """Algorithm 1 once over all images, uint8 (N, C, H, W): k steps of D, one of G.

    Returns the mean over the epoch of each column of losses.csv.
    """
    # Random numbers follow from seed and epoch: a resumed run draws the same. Without
    # a large factor, seed 0 would draw in epoch 2 what seed 1 draws in epoch 1.
    torch.manual_seed(args.seed * 1_000_003 + epoch)
    # All images lie on the device, so a batch is a list of indices: no DataLoader.
    n_batches = batches_per_epoch(args, images)
    batches = torch.randperm(len(images), device=images.device).tensor_split(n_batches)
    D_steps = (epoch - 1) * n_batches  # of the epochs before this one
    G_steps = (epoch - 1) * math.ceil(n_batches / args.k)
    generator_loss = losses.generator_loss
    if args.loss == "minimax":
        generator_loss = losses.minimax_generator_loss
    log = defaultdict(list)  # of tensors: .item() would wait for the GPU in each step

    for step, batch in enumerate(batches, 1):
        # (1) Update D: maximise log D(x) + log(1 - D(G(z)))
        x = images[batch] / 127.5 - 1  # 0 .. 255 -> [-1, 1], the range of G's tanh
        z = torch.randn(len(x), args.z_dim, device=x.device)
        fake = G(z)
        # D has no BatchNorm, so real and fake images can go through it together.
        # detach(): else backward() would go on into G, and free the graph that G's
        # own step needs.
        real_logits, fake_logits = D(torch.cat([x, fake.detach()])).chunk(2)
        loss_D = losses.discriminator_loss(
            real_logits, fake_logits, args.real_label, args.label_noise
        )
        D_steps += 1
        penalty = 0
        if args.r1 and D_steps % R1_EVERY == 0:
            penalty = args.r1 * R1_EVERY * losses.r1_penalty(D, x)
        opt_D.zero_grad()  # backward() adds to the gradients that are there
        (loss_D + penalty).backward()
        opt_D.step()

        correct = torch.cat([real_logits > 0, fake_logits < 0])  # logit 0: D(x) = 1/2
        log["loss_D"].append(loss_D.detach())  # without R1; log 4 where D guesses
        log["D_x"].append(real_logits.detach().sigmoid().mean())
        log["D_G_z1"].append(fake_logits.detach().sigmoid().mean())  # before D's update
        log["acc_D"].append(correct.float().mean())
        if step % args.k != 0 and step < n_batches:
            continue  # k steps of D, then one of G; the epoch ends with one of G

        # (2) Update G: maximise log D(G(z)), or minimise log(1 - D(G(z))).
        # Algorithm 1 draws new noise here. We keep the fakes: G has not changed.
        fake_logits = D(fake)  # by the updated D; no detach(): G learns through D
        loss_G = generator_loss(fake_logits)
        opt_G.zero_grad()
        loss_G.backward(inputs=list(G.parameters()))  # through D, but not for D
        opt_G.step()

        log["loss_G"].append(loss_G.detach())
        log["D_G_z2"].append(fake_logits.detach().sigmoid().mean())  # after D's update

        # (3) Average G: G and D chase each other, so G's weights go round and round.
        # Their average is near the centre. It covers about 1 / (1 - decay) steps: few
        # at first, so that the bad first weights are soon forgotten.
        G_steps += 1
        decay = min(args.ema, (1 + G_steps) / (10 + G_steps))
        update_average(G_ema, G, decay)

    return {name: torch.stack(values).mean().item() for name, values in log.items()}


def batches_per_epoch(args, images):
    """100 images at --batch-size 30 make 3 batches, of 34, 33 and 33: none is small."""
    return max(1, len(images) // args.batch_size)


def train(args, images, run, facts, checkpoint=None):
    """Train on uint8 images (N, C, H, W), and save into the folder `run`.

    `facts`: the data set's name, the shape of its images and the device. Goes on from
    a checkpoint, if there is one. Returns G_ema, the average of G, in eval mode, on the
    CPU.
    """
    device = facts["device"]
    # Matrix products may round their inputs (to TF32 or bfloat16): fast, good enough.
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(args.seed)
    # The noise of all pictures, drawn on the CPU: the same on every device.
    fixed_z = torch.randn(64, args.z_dim).to(device)
    image_shape = list(images.shape[1:])
    G_args = {
        "z_dim": args.z_dim,
        "hidden": args.g_hidden,
        "image_shape": image_shape,
        "batch_norm": args.batch_norm,
        "dropout": args.dropout,
        "leak": args.g_leak,
    }
    G = Generator(**G_args).to(device)
    D = Discriminator(args.d_hidden, image_shape, args.dropout, args.d_leak).to(device)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    # Each network has its own loss, and an optimiser that moves only its own weights.
    betas = (args.beta1, 0.999)
    opt_G = torch.optim.Adam(G.parameters(), args.lr, betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), args.lr, betas, fused=True)
    parts = {"G": G, "D": D, "G_ema": G_ema, "opt_G": opt_G, "opt_D": opt_D}
    history = []
    if checkpoint:
        restore(parts, checkpoint)
        history = checkpoint["history"]

    images = images.to(device)
    save_every = math.ceil(SAVE_EVERY / batches_per_epoch(args, images))  # in epochs
    # Saved beside the parts. The loop below extends this history.
    saved = {"args": vars(args), "facts": facts, "G_args": G_args, "history": history}
    header = True
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        means = train_epoch(args, images, epoch, G, D, G_ema, opt_G, opt_D)
        seconds = time.perf_counter() - start
        samples = G_ema(fixed_z) / 2 + 0.5  # [-1, 1] -> [0, 1]
        if samples.isnan().any():
            sys.exit(f"error: epoch {epoch} diverged: try a lower --lr")
        history.append({"epoch": epoch, **means, "seconds": seconds})
        if epoch % save_every == 0 or epoch == args.epochs:
            save_pictures(images, samples, epoch, run)
            save_info(vars(args) | facts, run)
            save_table(history, run)
            save_checkpoint(parts, saved, run)
            print_row(history[-1], header)
            header = False
    return G_ema.cpu()


# --- What a run leaves behind ---------------------------------------------------------


def print_row(row, header):
    """One line of the table on the screen, with the columns' names above the first."""
    epoch, *means = row.values()
    if header:
        print(f"{'epoch':>8}", *(f"{name:>7}" for name in list(row)[1:]))
    print(f"{epoch:8}", *(f"{mean:7.3f}" for mean in means), flush=True)


def save_pictures(images, samples, epoch, run):
    """Grids of this epoch's samples, in [0, 1], and of 64 real images, uint8."""
    try:
        utils.save_image(samples, run / f"epoch_{epoch:05}.png")
        utils.save_image(images[:64] / 255, run / "real.png")
    except PermissionError as error:  # Windows locks a picture that a program shows
        warn(error)


def save_info(info, run):
    """run.json, for people: the flags, and what the program found out."""
    info = info | {"torch": str(torch.__version__)}
    replace_file(run / "run.json", json.dumps(info, indent=2).encode())


def add_score(mean, error, run):
    info = json.loads((run / "run.json").read_bytes())
    save_info(info | {"log_likelihood": mean, "standard_error": error}, run)


def save_table(rows, run):
    """losses.csv. If you add a column to the log, earlier rows leave it empty."""
    columns = {}
    for row in rows:
        columns |= row
    table = io.StringIO()
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    try:
        replace_file(run / "losses.csv", table.getvalue().encode())
    except PermissionError as error:  # Excel locks the table that it shows
        warn(error)


def save_checkpoint(parts, saved, run):
    """Saved last: after a kill, --resume goes on from the last whole checkpoint."""
    states = {name: part.state_dict() for name, part in parts.items()}
    data = io.BytesIO()  # in memory: torch.save itself hides that a disk is full
    torch.save(states | saved, data)
    replace_file(run / "checkpoint.pt", data.getvalue())


def replace_file(path, data):
    """Write a new file, then put it in the old one's place: a kill leaves one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def restore(parts, checkpoint):
    """Load the networks' weights and the optimisers' moments, which must fit."""
    try:
        for name, part in parts.items():
            state = checkpoint[name]
            if isinstance(part, torch.optim.Optimizer):
                # Its settings are those of the flags, which may have changed.
                state["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(state)
    except Exception as error:
        message = f"these flags or data do not fit the checkpoint: {reason(error)}"
        raise SystemExit(f"error: {message}") from error


def save_gif(run):
    """training.gif: the pictures of all epochs, in their order, 150 ms each."""
    paths = sorted(run.glob("epoch_*.png"), key=lambda path: (len(path.name), path))
    if not paths:
        return
    pages = (Image.open(path).convert("RGB") for path in paths)  # one at a time
    gif = io.BytesIO()
    try:
        first = next(pages)
        first.save(gif, "GIF", save_all=True, append_images=pages, duration=150, loop=0)
        replace_file(run / "training.gif", gif.getvalue())
    except OSError as error:  # a locked file, or half a picture
        warn(f"training.gif: {error}")


# --- Evaluation -----------------------------------------------------------------------


def score(G, z_dim, images, test_images):
    """parzen() with 10,000 samples, whose noise is the same for all runs."""
    print("scoring 10,000 samples ...", flush=True)
    torch.manual_seed(0)
    samples = G(torch.randn(10_000, z_dim)) / 2 + 0.5
    return parzen(samples, images, test_images)


def parzen(samples, images, test_images):
    """Log-likelihood of the test images (Goodfellow et al. 2014, section 5).

    G has no density, so a Gaussian of width sigma is put on each sample: a Parzen
    window. Sigma is the best of ten for 1,000 validation images. The paper kept those
    out of training (50,000 images); here they are part of it (60,000), and G has seen
    them. Samples (N, C, H, W) in [0, 1], images uint8 -> the mean over the test images
    and its standard error, in nats.
    """
    # Distances are small differences of large numbers: exact products, please.
    torch.set_float32_matmul_precision("highest")
    validation = images[-10_000:-9000]
    sigmas = torch.logspace(-1, 0, 10)  # from 0.1 to 1
    best = max(sigmas, key=lambda s: log_density(validation, samples, s).mean())
    scores = log_density(test_images, samples, best)
    return scores.mean().item(), scores.std().item() / len(scores) ** 0.5


def log_density(images, samples, sigma):
    """For each image x: log of the mean, over all samples s, of N(x; s, sigma^2).

    With n samples and d pixels:
    log sum exp(-|x - s|^2 / (2 sigma^2)) - log n - d/2 log(2 pi sigma^2)
    """
    distances = torch.cdist(images.flatten(1) / 255, samples.flatten(1))
    log_sums = distances.square_().div_(-2 * sigma**2).logsumexp(1)
    norm = samples[0].numel() / 2 * math.log(math.tau * sigma**2)
    return log_sums - math.log(len(samples)) - norm


# --- Data -----------------------------------------------------------------------------


def load_data(args):
    """Return the data set's name, its training images and its test images.

    Images are uint8 (N, C, H, W). A folder has no test images: None.
    """
    name = args.dataset
    if name == "auto":
        name = "mnist"
    if name in DATASETS:
        try:
            return name, *download(name, args.data_dir)
        except Exception as error:
            folder = f"{args.data_dir}/{DATASETS[name].__name__}/raw"
            message = f"no {name} in --data-dir {args.data_dir}: {reason(error)}"
            message += f" (if a file is damaged, delete {folder})"
            if args.dataset != "auto":
                raise SystemExit(f"error: {message}") from error
            warn(f"training on --dataset drawn: {message}")
            name = "drawn"
    if name == "drawn":
        return name, *draw_digits()
    return name, load_folder(name, args.image_size), None


def download(name, folder):
    """Training and test images of a torchvision data set, kept in the folder."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds: a dead network must not hang
    try:
        train = DATASETS[name](folder, train=True, download=True)
        test = DATASETS[name](folder, train=False, download=True)
    finally:
        socket.setdefaulttimeout(timeout)
    return train.data.unsqueeze(1), test.data.unsqueeze(1)


def load_folder(folder, size):
    """Every image below the folder, uint8 (N, C, size, size); C = 1 if all are grey."""
    print(f"reading {folder} ...", flush=True)
    images = []
    unreadable = []
    for path in find_files(folder, unreadable):
        try:
            images += read_images(path, size)
        except Exception as error:  # noqa: BLE001 damaged files raise any
            unreadable.append(f"{path}: {reason(error)}")
    if unreadable:
        warn(f"{len(unreadable)} unreadable, the first is {unreadable[0]}")
    if len(images) < 2:
        sys.exit(f"error: --dataset {folder}: {len(images)} images, 2 are needed")
    scale_deep(images)
    # Grey images get three channels where others have colours.
    images = torch.stack(torch.broadcast_tensors(*images))
    low, high = images.aminmax()
    if high - low < 64:
        warn(f"{folder} has only the levels {low} to {high} of 0 to 255: little to see")
    return images


def find_files(folder, unreadable):
    """Sorted paths. Links are followed, each folder once; hidden files are left out."""
    paths = []
    seen = set()
    walk = os.walk(folder, onerror=unreadable.append, followlinks=True)
    for parent, folders, names in walk:
        if os.path.realpath(parent) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                paths.append(os.path.join(parent, name))
    return sorted(paths)


def read_images(path, size):
    """The image of a file, or all images of a TIFF stack, as in to_tensor."""
    with Image.open(path) as file:
        frames = [file]  # of an animated GIF, and of a photo with a preview, the first
        if file.format == "TIFF":
            frames = ImageSequence.Iterator(file)
        return [to_tensor(frame, size) for frame in frames]


def to_tensor(image, size):
    """(C, size, size), cropped to a square: uint8, or float32 from 16 bits on."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # I;16, I;16B, I and F: integers and floats
        image = image.convert("F")
    else:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")  # below transparent parts
        image = Image.alpha_composite(white, image).convert("RGB")
    x = transforms.PILToTensor()(ImageOps.fit(image, (size, size)))
    if not -(2**32) <= x.min().item() <= x.max().item() <= 2**32:  # nan: not <=
        raise ValueError("a pixel is missing, infinite or a fill value")
    if (x == x[:1]).all():
        return x[:1].clone()  # grey: one channel is enough
    return x


def scale_deep(images):
    """Give the float images of a list one scale, and uint8. One by one: less memory."""
    deep = [n for n, x in enumerate(images) if x.is_floating_point()]
    if deep:
        low = min(images[n].min() for n in deep)
        high = max(images[n].max() for n in deep)
        contrast = max(high - low, torch.tensor(1e-30))  # not 0 where all are flat
        for n in deep:
            images[n] = ((images[n] - low) * 255 / contrast).round().byte()


def draw_digits():
    """Ten digits in Pillow's own font, warped at random: the same at every call."""
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


# --- Command line ---------------------------------------------------------------------


def parse_args(argv=None, defaults=None):
    """The flags. `defaults` are those of a resumed run."""
    parser = argparse.ArgumentParser(
        description="Train a generative adversarial network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        usage=argparse.SUPPRESS,  # an error is one line
    )
    count = in_range(int, 1)
    amount = in_range(float, 0)
    share = in_range(float, 0, 1)

    group = parser.add_argument_group("data and files")
    add = group.add_argument
    names = ", ".join(NAMES)
    add("--dataset", type=data_set, default="auto", help=f"{names}, or a folder")
    add("--data-dir", default="data", help="where data sets are, or will be put")
    add("--image-size", type=count, default=28, help="pixels a side, for a folder")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--out-dir", help="a new folder; None: runs/001, ...")
    either.add_argument("--resume", help="go on with the run in this folder")

    add = parser.add_argument_group("the networks").add_argument
    add("--z-dim", type=count, default=64, help="length of G's noise")
    add("--g-hidden", type=count, nargs="+", default=[256, 512], help="G's widths")
    add("--d-hidden", type=count, nargs="+", default=[512, 256], help="D's widths")
    yes_no = argparse.BooleanOptionalAction
    add("--batch-norm", action=yes_no, default=True, help="in G: samples stay varied")
    add("--dropout", type=share, default=0.0, help="in both networks: weakens D")
    add("--g-leak", type=amount, default=0.0, help="slope of G below 0; 0 is ReLU")
    add("--d-leak", type=amount, default=0.2, help="of D; above 0, gradients pass")

    add = parser.add_argument_group("the game").add_argument
    kinds = ["non-saturating", "minimax"]
    add("--loss", choices=kinds, default=kinds[0], help="what G minimises")
    add("--k", type=count, default=1, help="D steps for each G step (Algorithm 1)")
    add("--real-label", type=amount, default=1.0, help="0.9: D need not be too sure")
    add("--label-noise", type=share, default=0.0, help="n: labels vary by n both ways")
    add("--r1", type=amount, default=1.0, help="gamma of the R1 penalty: a smooth D")

    add = parser.add_argument_group("the optimisation").add_argument
    add("--epochs", type=count, default=40, help="passes over the data in all")
    add("--batch-size", type=in_range(int, 2), default=128, help="images for each step")
    add("--lr", type=amount, default=1e-3, help="Adam's step: if too large, it circles")
    add("--beta1", type=share, default=0.0, help="Adam's momentum: here, it overshoots")
    add("--ema", type=share, default=0.9999, help="top decay of G's average; 0: off")
    add("--seed", type=in_range(int, 0, 2**33), default=0, help="of all that is random")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, ...; auto: the best")

    parser.set_defaults(**(defaults or {}))
    return parser.parse_args(argv)


def in_range(kind, low, high=math.inf):
    """A type for argparse: an int or a float, at least low and below high."""

    def parse(text):
        number = kind(text)
        if not low <= number < high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
        return number

    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


def data_set(text):
    """A type for argparse: a known name, or a folder."""
    if text in NAMES or os.path.isdir(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no folder, and none of {NAMES}")


def open_run(folder, argv):
    """The flags of a run, where argv does not say otherwise, and its checkpoint."""
    try:
        checkpoint = load_checkpoint(folder)
        done = len(checkpoint["history"])
        # auto is for new runs: this one keeps to the data that it began with.
        defaults = checkpoint["args"] | {"dataset": checkpoint["facts"]["dataset"]}
    except Exception as error:
        message = f"no whole run of this version in --resume {folder}: {reason(error)}"
        raise SystemExit(f"error: {message}") from error
    args = parse_args(argv, defaults)
    if args.epochs < done:
        sys.exit(f"error: --epochs {args.epochs}: {folder} has {done} epochs already")
    return args, checkpoint


def choose_device(name):
    """The device of that name, or the best that is here."""
    best = "cpu"
    if torch.cuda.is_available():
        best = "cuda"
    elif torch.backends.mps.is_available():
        best = "mps"
    if name == "auto":
        return best
    try:
        torch.zeros(1, device=name).item()
        return name
    except (AssertionError, ImportError, RuntimeError) as error:
        warn(f"no {name} here, training on {best}: {reason(error)}")
        return best


def new_folder():
    """Make runs/001, or the next free number. Runs that start together never share."""
    number = 1
    while True:
        run = f"runs/{number:03}"
        try:
            os.makedirs(run)
            return run
        except FileExistsError:
            number += 1


def reason(error):
    """The first sentence of an error, in one line. Some go on for a page."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words.split('. ')[0]:.400}"


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


# --- Main -----------------------------------------------------------------------------


def main(argv=None):
    """Run the program; return the run's folder and the average of G, on the CPU."""
    args = parse_args(argv)
    checkpoint = None
    run = None
    try:
        if args.resume is not None:
            args, checkpoint = open_run(args.resume, argv)
        elif args.out_dir and glob.glob("*", root_dir=args.out_dir):  # no hidden files
            sys.exit(f"error: --out-dir {args.out_dir} is not empty: name a new one")
        device = choose_device(args.device)
        dataset, images, test_images = load_data(args)
        facts = {"dataset": dataset, "images": list(images.shape), "device": device}
        run = Path(args.resume or args.out_dir or new_folder())
        run.mkdir(parents=True, exist_ok=True)
        print(f"{run}: {dataset} {facts['images']}, {device}")
        if checkpoint and checkpoint["facts"]["images"] != facts["images"]:
            before = checkpoint["facts"]["images"]
            warn(f"the data has changed from {before} to {facts['images']}")
        try:
            G = train(args, images, run, facts, checkpoint)
        finally:  # after Ctrl-C as well
            save_gif(run)
        if test_images is not None:
            mean, error = score(G, args.z_dim, images, test_images)
            print(f"log-likelihood of {dataset}: {mean:.1f} +- {error:.1f} nats")
            add_score(mean, error, run)
        return run, G
    except OSError as error:  # a full disk, a folder that must not be written to
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        if run and (run / "checkpoint.pt").exists():
            warn(f'stopped; go on with: python train_gan.py --resume "{run}"')
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
