"""Train a generative adversarial network by Algorithm 1 of Goodfellow et al. 2014.

python train_gan.py                           # MNIST, 40 epochs, the best device
python train_gan.py --resume runs/001         # go on where a run was cut off
"""

import argparse
import contextlib
import copy
import csv
import io
import math
import os
import socket
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import datasets, transforms, utils

import losses
from models import Discriminator, Generator

COLUMNS = ["epoch", "loss_D", "loss_G", "D_x", "D_G_z1", "D_G_z2", "acc_D", "seconds"]
G_LOSSES = {"non-saturating": "generator_loss", "minimax": "minimax_generator_loss"}
R1_EVERY = 4  # the penalty costs half a step: take it every 4th step, 4 times as heavy
SAVE_EVERY = 100  # steps, at least: an epoch of a few pictures is over in no time
DATASETS = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}
DATASETS |= {"kmnist": datasets.KMNIST, "cifar10": datasets.CIFAR10}
DRAWN = 30_000, 5_000  # images to train on, and for the test


def train_epoch(args, images, epoch, G, D, G_average, opt_G, opt_D):
    """Algorithm 1 over all images, uint8 (N, C, H, W), once; means by CSV column."""
    # Random numbers follow from seed and epoch: a resumed run draws the same ones.
    torch.manual_seed((args.seed * 1_000_003 + epoch) % 2**63)
    # The whole set lies on the device as one tensor, and a batch is a slice of it in
    # random order: tens of times faster than a DataLoader, which goes image by image.
    # tensor_split spreads a remainder over the batches: no short one is left over.
    shuffled = images[torch.randperm(len(images), device=images.device)]
    batches = shuffled.tensor_split(max(1, len(images) // args.batch_size))
    averages, weights = (net.state_dict().values() for net in (G_average, G))  # live
    log = {name: [] for name in COLUMNS[1:-1]}
    for step, batch in enumerate(batches, 1):
        # (1) Update D: maximise log D(x) + log(1 - D(G(z)))
        x = batch / 127.5 - 1  # 0 .. 255 -> [-1, 1], the range of G's tanh
        z = torch.randn(len(x), args.z_dim, device=x.device)
        fake = G(z)
        # detach() ends D's step at the images: else backward() would go on into G and
        # free the graph that G's step needs. No BatchNorm in D, so one pass for both.
        real_logits, fake_logits = D(torch.cat([x, fake.detach()])).split(len(x))
        labels = args.real_label, args.label_noise
        loss_D = losses.discriminator_loss(real_logits, fake_logits, *labels)
        # Tensors, not numbers: .item() would wait for the device in every step.
        log["loss_D"].append(loss_D.detach())
        log["D_x"].append(real_logits.detach().sigmoid().mean())  # D(x), not a logit
        log["D_G_z1"].append(fake_logits.detach().sigmoid().mean())
        correct = torch.cat([real_logits > 0, fake_logits < 0])  # logit 0: D(x) = 1/2
        log["acc_D"].append(correct.float().mean())
        if args.r1 and ((epoch - 1) * len(batches) + step) % R1_EVERY == 0:
            loss_D = loss_D + args.r1 * R1_EVERY * losses.r1_penalty(D, x)
        loss_D.backward()
        opt_D.step()
        opt_D.zero_grad()  # or the next backward() would add to these gradients
        if step % args.k and step < len(batches):
            continue  # k steps of D for one of G, which also has the epoch's last

        # (2) Update G: maximise log D(G(z)), on the fakes of D's step. Algorithm 1
        # draws new noise here; the same noise saves a pass through G.
        fake_logits = D(fake)  # by the updated D, and with G's graph: no detach()
        loss_G = getattr(losses, G_LOSSES[args.loss])(fake_logits)  # found by its name
        # The gradient goes through D, but D's weights must not collect it.
        loss_G.backward(inputs=list(G.parameters()))
        opt_G.step()
        opt_G.zero_grad()
        log["loss_G"].append(loss_G.detach())
        log["D_G_z2"].append(fake_logits.detach().sigmoid().mean())
        # (3) Average G, which circles, over about the last ninth of its n steps so far.
        n = (epoch - 1) * math.ceil(len(batches) / args.k) + math.ceil(step / args.k)
        decay = min(args.ema, (1 + n) / (10 + n))
        for average, weight in zip(averages, weights, strict=True):
            if average.is_floating_point():  # all but BatchNorm's count of batches
                average.lerp_(weight, 1 - decay)  # by 1 - decay of the way to weight
        if step % 50 == 0 and os.isatty(1):  # in a terminal, a line that is replaced
            print(f"batch {step} of {len(batches)}", end="\r", flush=True)
    return {name: torch.stack(log[name]).mean().item() for name in log}


def train(args, device, images, state=None):
    """Train on uint8 images (N, C, H, W), or go on from the state of a checkpoint.

    Returns the run's folder and the average of G, in eval mode, on the device."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, from 0 to 255, not {images.dtype}")
    # TF32 on GPUs, bfloat16 products on CPUs that have them: faster, and good enough.
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(args.seed)
    fixed_z = torch.randn(64, args.z_dim).to(device)  # the same for every picture
    images, shape, hidden = images.to(device), images.shape[1:], args.g_hidden
    G = Generator(args.z_dim, hidden, shape, args.batch_norm, args.dropout, args.g_leak)
    D = Discriminator(args.d_hidden, shape, args.dropout, args.d_leak).to(device)
    G_average = copy.deepcopy(G.to(device)).eval().requires_grad_(False)
    # Two optimisers: each network has a loss of its own, and moves its own weights.
    opt_G = torch.optim.Adam(G.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    opt_D = torch.optim.Adam(D.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    parts = {"G": G, "D": D, "G_average": G_average, "opt_G": opt_G, "opt_D": opt_D}
    state = open_run(args, images, state, parts)  # its folder is now args.resume
    run, history, done = Path(args.resume), state["history"], len(state["history"])
    print(f"{run}: {args.dataset} {state['images']}, {device}, {done} epochs done")
    print(f"{'epoch':>11}", *(f"{name:>7}" for name in [*COLUMNS[1:], "left"]))
    save_every = math.ceil(SAVE_EVERY / max(1, len(images) // args.batch_size))
    start, finished = time.perf_counter(), None
    try:
        for epoch in range(done + 1, args.epochs + 1):
            epoch_start = time.perf_counter()
            means = train_epoch(args, images, epoch, G, D, G_average, opt_G, opt_D)
            means["seconds"] = time.perf_counter() - epoch_start
            samples = G_average(fixed_z)
            if not all(map(math.isfinite, [*means.values(), samples.sum()])):
                sys.exit(f"error: epoch {epoch} diverged: start anew with a lower --lr")
            history.append([epoch, *(round(mean, 6) for mean in means.values())])
            state.update({name: part.state_dict() for name, part in parts.items()})
            # A copy: Ctrl-C comes in mid-epoch, and the last whole one is then saved.
            finished = run, copy.deepcopy(state), samples / 2 + 0.5, images[:64] / 255
            if epoch % save_every == 0 or epoch == args.epochs:
                save(*finished)
                pace = (time.perf_counter() - start) / (epoch - done)
                means["left"] = pace * (args.epochs - epoch) / 60  # minutes
                row = (f"{value:7.3f}" for value in means.values())
                print(f"{f'{epoch}/{args.epochs}':>11}", *row)
    finally:
        if finished:  # Ctrl-C, or an epoch that was not due
            save(*finished)
            write_gif(run)
        elif not done:  # an empty folder is in the way of the next start
            run.rmdir()
    return run, G_average


def open_run(args, images, state, parts):
    """Make a new run's folder, or load the parts of an old one. Returns its state."""
    if state:
        for leftover in Path(args.resume).glob("*.tmp"):  # of a killed process
            leftover.unlink()
        try:
            if state["images"] != [*images.shape]:
                raise ValueError(f"images {[*images.shape]}, not {state['images']}")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            return state
        except Exception as error:
            raise SystemExit(f"error: data or models.py changed: {error!r}") from error
    for number in range(1, 10_000):
        args.resume = args.out_dir or f"runs/{number:03}"
        with contextlib.suppress(FileExistsError):  # no two runs share a folder
            Path(args.resume).mkdir(parents=True)
            return {"settings": vars(args), "images": [*images.shape], "history": []}
    sys.exit(f"error: {args.resume} is there: give a new --out-dir, or --resume it")


def save(run, state, samples, real):
    """Write the pictures and losses.csv, then the checkpoint that --resume reads."""
    for name, x in ("real", real), (f"epoch_{len(state['history']):05}", samples):
        utils.save_image(x, run / f"{name}.png", nrow=8)
    try:
        with (run / "losses.csv").open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *state["history"]])
    except PermissionError:  # Excel locks the file that it shows
        print(f"warning: cannot write {run}/losses.csv: is it open?", file=sys.stderr)
    data, temporary = io.BytesIO(), run / f"checkpoint.{os.getpid()}.tmp"
    torch.save(state, data)
    with temporary.open("wb") as file:
        file.write(data.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run / "checkpoint.pt")  # all or nothing, once it is on the disk


def write_gif(run):
    """Write training.gif of all the pictures; the last one is held."""
    if frames := [f for p in sorted(run.glob("epoch_*.png")) if (f := read_image(p))]:
        times = [150] * (len(frames) - 1) + [3000]  # milliseconds
        more = {"append_images": frames[1:], "duration": times, "loop": 0}
        frames[0].save(run / "training.gif", save_all=True, **more)


@torch.no_grad()
def parzen(G, train_images, test_images):
    """Parzen-window log-likelihood of the test images (Goodfellow et al. 2014, sec. 5).

    uint8 images, G on the CPU -> mean and standard error in nats, pixels in [0, 1]."""
    torch.set_float32_matmul_precision("highest")  # distances: differences, cancelling
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


def load_data(args):
    """Train and test images, uint8 (N, C, H, W); "auto" becomes what could be had."""
    name = "mnist" if args.dataset == "auto" else args.dataset
    if name not in DATASETS:
        return draw_digits() if name == "drawn" else load_folder(name, args.image_size)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds: a dead network must not hang
    try:
        sets = [DATASETS[name](args.data_dir, t, download=True) for t in (True, False)]
        sets = [torch.as_tensor(part.data) for part in sets]
        sets = [x.reshape(*x.shape[:3], -1).permute(0, 3, 1, 2) for x in sets]  # NCHW
    except Exception as error:
        message = f"no {name} in --data-dir {args.data_dir}: go online to download it, "
        message += "copy it there, or delete a damaged copy"
        if args.dataset == name:
            raise SystemExit(f"error: {message}") from error
        print(f"warning: {message}; training on --dataset drawn", file=sys.stderr)
        name, sets = "drawn", draw_digits()
    finally:
        socket.setdefaulttimeout(timeout)
    args.dataset = name
    return sets


def load_folder(folder, size):
    """Every image below the folder, (N, C, size, size), grey if all are; and None."""
    print(f"reading the images in {folder}")
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    # Not what is hidden, nor the samples of a run that was started in this folder
    paths = [p for p in paths if "/." not in f"/{p.relative_to(folder).as_posix()}"]
    runs = {path.parent for path in paths if path.name == "checkpoint.pt"}
    paths = [path for path in paths if runs.isdisjoint(path.parents)]
    images = {path: read_image(path, (size or 28, size or 28)) for path in paths}
    if bad := [path for path in paths if not images[path]]:
        print(f"warning: {len(bad)} unreadable files, first {bad[0]}", file=sys.stderr)
    images = [transforms.PILToTensor()(image) for image in images.values() if image]
    if len(images) < 2:
        sys.exit(f"error: {folder}: {len(images)} readable images, 2 are needed")
    images = torch.stack(images)
    return images[:, :1] if (images == images[:, :1]).all() else images, None


def read_image(path, size=None):
    """The image as RGB, cropped to the size if there is one; None: it is damaged."""
    with contextlib.suppress(Exception):  # which a damaged file can raise
        image = Image.open(path)
        image.draft("RGB", size)  # decodes a large JPEG at a fraction of its size
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 bits or floats: by the image's own range
            a, b = image.getextrema()
            image = image.convert("F").point(lambda v: (v - a) * 255 / (b - a or 1))
        white = Image.new("RGBA", image.size, "white")  # behind what is transparent
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return ImageOps.fit(image, size or image.size)


def draw_digits():
    """Ten digits in Pillow's own font, warped at random: the same at every call."""
    torch.manual_seed(0)
    warp = transforms.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 15, Image.BILINEAR)
    font, images = ImageFont.load_default(size=22), []
    for n in range(sum(DRAWN)):
        im = Image.new("L", (28, 28))
        ImageDraw.Draw(im).text((8, 1), f"{n % 10}", 255, font, stroke_width=n % 3)
        images.append(transforms.PILToTensor()(warp(im)))
    return torch.stack(images).split(DRAWN)


def between(kind, low, high, *ends):
    """An argparse type: a number between low and high, or one of the ends."""

    def number(text):
        with contextlib.suppress(ValueError):
            if low < (value := kind(text)) < high or value in ends:
                return value
        words = f"{text!r} is no {kind.__name__} above {low} and below {high}"
        raise argparse.ArgumentTypeError(words + " (10 20, not 10,20)" * ("," in text))

    return number


def make_parser():
    size, part = between(int, 0, 2**31), between(float, 0, 1, 0)
    rate, weight = between(float, 0, math.inf), between(float, 0, math.inf, 0)
    devices = ["auto", "cpu", "mps", "cuda", *(f"cuda:{n}" for n in range(16))]
    switch = {"action": argparse.BooleanOptionalAction}
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # an error is one line

    def add(flag, type, default, help, **more):
        help += "" if default is None else " (default: %(default)s)"
        group.add_argument(flag, type=type, default=default, help=help, **more)

    group = parser.add_argument_group("data and output")
    add("--dataset", str, "auto", f"{', '.join(DATASETS)}, drawn, or a folder's path")
    add("--data-dir", str, "data", "where data sets are, or will be put")
    add("--image-size", size, None, "pixels a side of a folder's images (default: 28)")
    add("--out-dir", str, None, "a new folder for the run (default: runs/001, ...)")
    add("--resume", str, None, "go on with the run in this folder", metavar="RUN")
    group = parser.add_argument_group("model")
    add("--z-dim", size, 64, "length of G's noise: in how many directions images vary")
    add("--g-hidden", size, [256, 512], "widths of G's hidden layers", nargs="+")
    add("--d-hidden", size, [512, 256], "of D's: if too wide, D wins", nargs="+")
    add("--batch-norm", None, True, "in G: keeps samples from growing alike", **switch)
    add("--dropout", part, 0.0, "share of units dropped, in both networks: weakens D")
    add("--g-leak", weight, 0.0, "slope of G's LeakyReLU below 0; 0 is ReLU")
    add("--d-leak", weight, 0.2, "of D's: above 0, G's gradient passes every unit")
    group = parser.add_argument_group("game")
    add("--loss", str, "non-saturating", "what G minimises", choices=G_LOSSES)
    add("--k", size, 1, "D steps for each G step (Algorithm 1)")
    add("--real-label", between(float, 0, 1, 1), 1.0, "0.9: D need not be too sure")
    add("--label-noise", part, 0.0, "n: labels are drawn from label - n to label + n")
    add("--r1", weight, 1.0, "gamma, the weight of the R1 penalty: keeps D smooth")
    group = parser.add_argument_group("optimisation")
    add("--epochs", size, 40, "passes over the data in all")
    add("--batch-size", between(int, 1, math.inf), 128, "images for each step")
    add("--lr", rate, 1e-3, "Adam's step size: too large, and the game goes in circles")
    add("--beta1", part, 0.0, "Adam's momentum: in a game, it overshoots")
    add("--ema", part, 0.9999, "highest decay of the shown average of G, 0: off")
    add("--seed", between(int, -1, 2**63), 0, "of weights, noise and image order")
    add("--device", str, "auto", "cuda, mps or cpu", choices=devices, metavar="D")
    return parser


def parse_args(argv):
    """Return the settings and, with --resume, the state of the run's checkpoint."""
    parser, state, own = make_parser(), None, {}
    args = parser.parse_args(argv)
    if args.resume:
        path = Path(args.resume.removesuffix("checkpoint.pt"), "checkpoint.pt")
        with contextlib.suppress(Exception):  # which a damaged file can raise
            state = torch.load(path, map_location="cpu", weights_only=True)
            parser.set_defaults(**state["settings"])
            own = state["settings"] if {"images", "history"} <= state.keys() else {}
        if own.keys() != vars(args).keys():
            sys.exit(f"error: {path} is missing, damaged or foreign: start anew")
        if not os.path.exists(own["data_dir"]):  # the run has been moved
            parser.set_defaults(data_dir="data")
        args = parser.parse_args(argv)
        for name in own.keys() - {"epochs", "device", "data_dir", "dataset", "resume"}:
            if vars(args)[name] != own[name]:
                parser.error(f"--{name.replace('_', '-')} is {own[name]} in this run")
        args.resume = str(path.parent)
        own.update(vars(args), epochs=max(args.epochs, own["epochs"]))
    folder = args.dataset not in ["auto", *DATASETS, "drawn"]
    if folder and not os.path.isdir(args.dataset):
        parser.error(f"--dataset {args.dataset}: no folder, nor {[*DATASETS, 'drawn']}")
    if args.image_size and not folder:
        parser.error("--image-size: leave it out, it is for a folder of images")
    return args, state


def main(argv=None):
    """Run the program; return the run's folder and the average of G, on the CPU."""
    if hasattr(sys.stdout, "reconfigure"):  # line by line, into files and pipes, too
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    args, state = parse_args(argv)
    here = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    here += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    device = args.device if args.device in here else here[0]
    if args.device not in ["auto", device, device.split(":")[0]]:
        print(f"warning: no {args.device}, training on {device}", file=sys.stderr)
    try:
        images, test_images = load_data(args)
        run, G = train(args, device, images, state)
        if test_images is not None:
            mean, error = parzen(G.cpu(), images, test_images)
            print(f"log-likelihood of {args.dataset}: {mean:.1f} +- {error:.1f} nats")
        return run, G.cpu()
    except OSError as error:  # a full disk, a folder that must not be written to
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        run = f'"{args.resume}"' if " " in f"{args.resume}" else args.resume
        saved = os.path.exists(f"{args.resume}/checkpoint.pt")
        go_on = f"; go on with: python train_gan.py --resume {run}" * saved
        print(f"\nstopped{go_on}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
