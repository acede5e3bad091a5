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

The game is the first section below: play, train_epoch and train. The sections after
it (what a run leaves behind, evaluation, data, command line, main) can wait.
"""

import argparse
import copy
import csv
import io
import json
import math
import os
import re
import socket
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import datasets, transforms, utils

import losses
from models import Discriminator, Generator, load_checkpoint, update_average

# The R1 penalty is expensive. It is computed in every 4th step of D and made 4 times
# as heavy: lazy regularisation (Karras et al. 2020, section 3.1).
R1_EVERY = 4
SAVE_EVERY = 100  # at least so many steps of D between two saves, in whole epochs
DRAWN = [30_000, 5_000]  # digits for the training, and for the test
DATASETS = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
}
NAMES = ["auto", *DATASETS, "drawn"]  # what --dataset knows, beside folders


# --- The game -------------------------------------------------------------------------


def play(args, images, batches, D_steps, G_steps, G, D, G_ema, opt_G, opt_D):
    """Algorithm 1 on these batches: k steps of D, then one of G, in turn.

    `images` are uint8 (N, C, H, W); a batch is a tensor of indices into them. `D_steps`
    and `G_steps` count the steps before these batches. Returns the columns of
    losses.csv, each a list with a value for each step.
    """
    log = defaultdict(list)  # of tensors: .item() would wait for the GPU in each step
    for step, batch in enumerate(batches, 1):
        # (1) Update D: maximise log D(x) + log(1 - D(G(z))).
        # Here D(x) is a probability; in code, D gives its logit.
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
        # detach(): a logged value must not keep its graph in memory.
        log["loss_D"].append(loss_D.detach())  # without R1; log 4 where D guesses
        log["D_x"].append(real_logits.detach().sigmoid().mean())
        log["D_G_z1"].append(fake_logits.detach().sigmoid().mean())  # before D's update
        log["acc_D"].append(correct.float().mean())

        # After k steps of D, one of G. There is one at the end of the epoch, too.
        if step % args.k == 0 or step == len(batches):
            # (2) Update G: maximise log D(G(z)), or minimise log(1 - D(G(z))).
            # Algorithm 1 draws new noise here. We keep the fakes: G has not changed.
            fake_logits = D(fake)  # by the updated D; no detach(): G learns through D
            if args.loss == "minimax":
                loss_G = losses.minimax_generator_loss(fake_logits)
            else:
                loss_G = losses.generator_loss(fake_logits)
            opt_G.zero_grad()
            loss_G.backward(inputs=list(G.parameters()))  # through D, but not for D
            opt_G.step()

            log["loss_G"].append(loss_G.detach())
            # The second D(G(z)) is from after D's update.
            log["D_G_z2"].append(fake_logits.detach().sigmoid().mean())

            # (3) Average G: G and D chase each other, so G's weights go round and
            # round. Their average is near the centre. It covers the last ninth of G's
            # steps so far: the bad first weights are soon forgotten. --ema limits it
            # (by default from epoch 193 of MNIST on).
            G_steps += 1
            decay = min(args.ema, (1 + G_steps) / (10 + G_steps))
            update_average(G_ema, G, decay)
    return log


def train_epoch(args, images, epoch, G, D, G_ema, opt_G, opt_D):
    """Play once over all images. Returns the mean of each column of losses.csv."""
    # Random numbers follow from seed and epoch: a resumed run draws the same. Without
    # a large factor, seed 0 would draw in epoch 2 what seed 1 draws in epoch 1.
    torch.manual_seed(args.seed * 1_000_003 + epoch)
    # All images lie on the device. A batch is a tensor of indices: no DataLoader.
    n_batches = batches_per_epoch(args, images)
    batches = torch.randperm(len(images), device=images.device).tensor_split(n_batches)
    D_steps = (epoch - 1) * n_batches  # of the epochs before this one
    G_steps = (epoch - 1) * math.ceil(n_batches / args.k)
    log = play(args, images, batches, D_steps, G_steps, G, D, G_ema, opt_G, opt_D)
    return {name: torch.stack(values).mean().item() for name, values in log.items()}


def batches_per_epoch(args, images):
    """100 images, --batch-size 30: 3 batches of 34, 33 and 33, no last one of 10."""
    return max(1, len(images) // args.batch_size)


def train(args, images, run, checkpoint=None):
    """Train on uint8 images (N, C, H, W), on the images' device; save into `run`.

    Goes on from a checkpoint, if there is one. Returns G_ema, the average of G, in eval
    mode, on the CPU.
    """
    device = images.device
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
    else:
        utils.save_image(images[:64] / 255, run / "real.png")
    if len(history) < args.epochs:
        save_info(args, images, run)
    n_batches = batches_per_epoch(args, images)
    if args.k > n_batches:
        warn(f"--k {args.k} does what --k {n_batches} does: an epoch has no more steps")
    save_every = math.ceil(SAVE_EVERY / n_batches)  # in epochs
    header = True
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        means = train_epoch(args, images, epoch, G, D, G_ema, opt_G, opt_D)
        seconds = time.perf_counter() - start
        # Plain numbers: one of NumPy's, in a column of yours, would not load again.
        means = {name: float(mean) for name, mean in means.items()}
        history.append({"epoch": epoch, **means, "seconds": seconds})
        samples = G_ema(fixed_z) / 2 + 0.5  # [-1, 1] -> [0, 1]
        if samples.isnan().any():
            save_table(history, run)  # its last rows show how this came
            sys.exit(f"error: epoch {epoch} diverged: try a lower --lr")
        if epoch % save_every == 0 or epoch == args.epochs:
            utils.save_image(samples, run / f"epoch_{epoch:05}.png")
            save_table(history, run)
            save_checkpoint(run, parts, args=vars(args), G_args=G_args, history=history)
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


def save_info(args, images, run, **scores):
    """run.json, for people: the flags, and what the program found out."""
    found = {"device": str(images.device), "images": list(images.shape)}
    info = vars(args) | found | {"torch": str(torch.__version__)} | scores
    replace_file(run / "run.json", json.dumps(info, indent=2).encode())


def save_table(rows, run):
    """losses.csv. If you add a column to the log, earlier rows leave it empty."""
    columns = dict.fromkeys(name for row in rows for name in row)
    table = io.StringIO()
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    replace_file(run / "losses.csv", table.getvalue().encode())


def save_checkpoint(run, parts, **rest):
    """Saved last: after a kill, --resume goes on from the last whole checkpoint."""
    states = {name: part.state_dict() for name, part in parts.items()}
    data = io.BytesIO()  # on a full disk, torch.save to a file raises no OSError
    torch.save(states | rest, data)
    replace_file(run / "checkpoint.pt", data.getvalue())


def replace_file(path, data):
    """Write a new file, then put it in the old one's place: one of them stays whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    try:
        temporary.replace(path)
    except PermissionError as error:  # Windows: another program has it open
        warn(f"{path} stays as it was: {error}")


def restore(parts, checkpoint):
    """Load the networks' weights and Adam's moments, which must fit."""
    try:
        for name, part in parts.items():
            state = checkpoint[name]
            if isinstance(part, torch.optim.Optimizer):
                # Its settings (--lr, --beta1) are those of the flags now.
                state["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(state)
    except Exception as error:
        message = f"these flags or data do not fit the checkpoint: {reason(error)}"
        raise SystemExit(f"error: {message}") from error


def save_gif(run):
    """training.gif: the pictures of all epochs, 150 ms each."""
    paths = sorted(run.glob("epoch_*.png"))
    if not paths:
        return
    pages = (Image.open(path).convert("RGB") for path in paths)  # one at a time
    gif = io.BytesIO()
    try:
        first = next(pages)
        first.save(gif, "GIF", save_all=True, append_images=pages, duration=150, loop=0)
        replace_file(run / "training.gif", gif.getvalue())
    except (OSError, SyntaxError) as error:  # a full disk, or half a picture
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

    G has no density, so a Gaussian is put on each sample: a Parzen window. Its standard
    deviation sigma is the best of ten for 1,000 validation images. The paper kept those
    out of training (50,000 images); here they are part of it (60,000), and G has seen
    them. Samples (N, C, H, W) in [0, 1], images uint8 -> the mean over the test images
    and its standard error, in nats (natural logarithms).
    """
    # Distances are small differences of large numbers: no rounding here.
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
    log_sums = []
    for part in images.split(1000):  # all at once would take 1 GB more
        distances = torch.cdist(part.flatten(1) / 255, samples.flatten(1))
        log_sums.append(distances.square_().div_(-2 * sigma**2).logsumexp(1))
    norm = samples[0].numel() / 2 * math.log(math.tau * sigma**2)
    return torch.cat(log_sums) - math.log(len(samples)) - norm


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
        except FileNotFoundError as error:
            if args.dataset != "auto":
                raise
            warn(f"training on --dataset drawn: {error}")
            name = "drawn"
    if name == "drawn":
        return name, *draw_digits()
    if not os.path.isdir(name):
        sys.exit(f"error: --dataset {name}: no folder, and none of {NAMES}")
    return name, load_folder(name, args.image_size), None


def download(name, folder):
    """Training and test images, kept in the folder. FileNotFoundError without them."""
    data_set = DATASETS[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds: a dead network must not hang
    try:
        train = data_set(folder, train=True, download=True)
        test = data_set(folder, train=False, download=True)
    except Exception as error:
        message = f"no {name} in --data-dir {folder}: {reason(error)}"
        raw = Path(folder, data_set.__name__, "raw")
        if any(raw.glob("*")):
            message += f" (if a file is damaged, delete {raw})"
        raise FileNotFoundError(message) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return train.data.unsqueeze(1), test.data.unsqueeze(1)


def load_folder(folder, size):
    """Every image below the folder, uint8 (N, C, size, size); C = 1 if all are grey."""
    print(f"reading {folder} ...", flush=True)
    paths = []
    unreadable = []
    for parent, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if name[0] != "."]  # hidden: not entered
        paths += [os.path.join(parent, name) for name in names if name[0] != "."]
    images = []
    for path in sorted(paths):
        try:
            images.append(load_image(path, size))
        except Exception as error:  # noqa: BLE001 a damaged file: any error
            unreadable.append(f"{path}: {reason(error)}")
    if unreadable:
        warn(f"{len(unreadable)} unreadable, the first is {unreadable[0]}")
    if len(images) < 2:
        message = f"{len(images)} images, 2 are needed; links to folders do not count"
        sys.exit(f"error: --dataset {folder}: {message}")
    # Grey images get three channels where others have colours.
    return torch.stack(torch.broadcast_tensors(*images))


def load_image(path, size):
    """uint8 (C, size, size), cropped to a square; C = 1 if it is grey, else 3."""
    with Image.open(path) as file:
        file.draft(None, (2 * size, 2 * size))  # a large JPEG: not all of its pixels
        # Pillow's signs of more than 8 bits: modes I;16, I and F, colours from RGB;16B.
        if file.mode[0] in "IF" or re.search(";16[BLN]", str(file.tile)):
            raise ValueError("more than 8 bits a channel: convert it to 8")
        if file.format == "TIFF" and file.n_frames > 1:
            raise ValueError("several images in one file: save each as a file")
        image = ImageOps.exif_transpose(file).convert("RGBA")  # upright
    white = Image.new("RGBA", image.size, "white")  # below transparent parts
    image = Image.alpha_composite(white, image).convert("RGB")
    x = transforms.PILToTensor()(ImageOps.fit(image, (size, size)))
    if (x == x[:1]).all():
        return x[:1].clone()  # grey: one channel is enough
    return x


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
        usage=argparse.SUPPRESS,  # else all flags stand above an error
    )
    count = in_range(int, 1)
    amount = in_range(float, 0)
    share = in_range(float, 0, 1)
    yes_no = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data and files")
    add = group.add_argument
    names = ", ".join(NAMES)
    add("--dataset", default="auto", help=f"{names}, or a folder")
    add("--data-dir", default="data", help="where data sets are, or will be put")
    add("--image-size", type=count, default=28, help="pixels a side, for a folder")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--out-dir", help="a new folder; None: runs/001, ...")
    either.add_argument("--resume", help="go on with the run in this folder")

    add = parser.add_argument_group("the networks").add_argument
    add("--z-dim", type=count, default=64, help="length of G's noise")
    add("--g-hidden", type=count, nargs="+", default=[256, 512], help="G's widths")
    add("--d-hidden", type=count, nargs="+", default=[512, 256], help="D's widths")
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


def open_run(run):
    """The checkpoint of a run, its flags, and the number of its epochs."""
    try:
        checkpoint = load_checkpoint(run)
        return checkpoint, checkpoint["args"], len(checkpoint["history"])
    except Exception as error:
        message = f"no whole run of this version in --resume {run}: {reason(error)}"
        raise SystemExit(f"error: {message}") from error


def choose_device(name):
    """The device of that name, or else the best one that works here."""
    devices = [name]
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    devices.append("cpu")
    if name == "auto":
        devices.remove("auto")
    for device in dict.fromkeys(devices):  # each once
        try:
            torch.ones(2, device=device).sum().item()  # fails on a card that is too old
            return device
        except (AssertionError, ImportError, RuntimeError) as error:
            warn(f"{device} cannot be used: {reason(error)}")
            if device == "cuda":
                torch.cuda.is_available = lambda: False  # else Adam asks the card, too


def new_folder():
    """Make runs/001, or the next free number. Runs that start together never share."""
    number = 1
    while True:
        run = Path(f"runs/{number:03}")
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
    if argv is not None:
        argv = [str(word) for word in argv]  # in a notebook: numbers, paths
    args = parse_args(argv)
    run = None
    checkpoint = None
    try:
        if args.resume is not None:
            run = Path(args.resume)
            checkpoint, flags, done = open_run(run)
            args = parse_args(argv, defaults=flags)
            if args.epochs < done:
                sys.exit(f"error: --epochs {args.epochs}: {done} are done already")
            if args.epochs == done:
                warn(f"{done} epochs are done: to go on, add --epochs {2 * done}")
        elif args.out_dir:
            run = Path(args.out_dir)
            if any(run.glob("[!.]*")):  # hidden files do not count
                sys.exit(f"error: {run} is not empty: name a new one, or --resume it")
        device = choose_device(args.device)
        # A resumed run keeps to the data that `auto` found.
        args.dataset, images, test_images = load_data(args)
        images = images.to(device)
        run = run or new_folder()
        run.mkdir(parents=True, exist_ok=True)
        print(f"{run}: {args.dataset} {list(images.shape)}, {device}")
        try:
            G = train(args, images, run, checkpoint)
        finally:  # after Ctrl-C as well
            save_gif(run)
        if test_images is not None:
            mean, error = score(G, args.z_dim, images.cpu(), test_images)
            print(f"log-likelihood of {args.dataset}: {mean:.1f} +- {error:.1f} nats")
            save_info(args, images, run, log_likelihood=mean, standard_error=error)
        return run, G
    except OSError as error:  # a full disk, a folder that must not be written to
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        if run and (run / "checkpoint.pt").exists():
            warn(f'stopped; go on with --resume "{run}"')
        raise SystemExit(130) from None  # 130: stopped by Ctrl-C


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # Windows: a console may lack a letter
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
