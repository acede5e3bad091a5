"""Train a generative adversarial network by Algorithm 1 of Goodfellow et al. 2014.

A generator G makes images out of noise z. A discriminator D answers with D(x), the
probability that an image x is real. D learns to tell real images from G's, and G
learns to make images that D takes for real, in turn.

python train_gan.py                           # MNIST, 40 epochs, the best device
python train_gan.py --resume runs/001         # go on where a run was cut off
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import datasets, transforms, utils

import losses
from models import Discriminator, Generator, load_checkpoint, update_average

# R1 is expensive. It is computed in every 4th step of D and made 4 times as
# heavy, so that its strength stays the same on average.
R1_EVERY = 4
SAVE_EVERY = 100  # steps of D, where an epoch is shorter than that
DRAWN = [30_000, 5_000]  # images for the training, and for the test
DATASETS = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
}


def train_epoch(args, images, epoch, G, D, G_average, opt_G, opt_D):
    """Algorithm 1 over all images, uint8 (N, C, H, W), once.

    Returns the mean over the epoch of each column of losses.csv.
    """
    # Random numbers follow from seed and epoch: a resumed run draws the same.
    # Without the factor, seed 0 would draw in epoch 2 what seed 1 draws in
    # epoch 1. torch takes seeds of 63 bits.
    torch.manual_seed((args.seed * 1_000_003 + epoch) % 2**63)
    # The whole set lies on the device as one tensor. A batch is a slice of it
    # in random order: tens of times faster than a DataLoader, which takes the
    # images one by one. tensor_split spreads the rest over all batches, so
    # that no short one is left over: 100 images at --batch-size 30 become 34,
    # 33 and 33.
    # BatchNorm needs 2 images at least.
    shuffled = images[torch.randperm(len(images), device=images.device)]
    n_batches = max(1, len(images) // max(2, args.batch_size))
    batches = shuffled.tensor_split(n_batches)
    D_steps = (epoch - 1) * n_batches  # of the epochs before this one
    G_steps = (epoch - 1) * math.ceil(n_batches / args.k)
    log = defaultdict(list)

    for step, batch in enumerate(batches, 1):
        # (1) Update D: maximise log D(x) + log(1 - D(G(z)))
        x = batch / 127.5 - 1  # 0 .. 255 -> [-1, 1], the range of G's tanh
        z = torch.randn(len(x), args.z_dim, device=x.device)
        fake = G(z)
        # detach() ends D's step at the images: else backward() would go on
        # into G, and free the graph that G's step needs. D has no BatchNorm,
        # so real and fake images can go through it together.
        real_logits, fake_logits = D(torch.cat([x, fake.detach()])).chunk(2)
        loss_D = losses.discriminator_loss(
            real_logits, fake_logits, args.real_label, args.label_noise
        )
        # The log holds tensors, since .item() would wait for the GPU in every
        # step. D(x) = sigmoid(logit), and it is above 1/2 where logit > 0.
        log["loss_D"].append(loss_D.detach())
        log["D_x"].append(real_logits.detach().sigmoid().mean())
        log["D_G_z1"].append(fake_logits.detach().sigmoid().mean())  # before D's update
        correct = torch.cat([real_logits > 0, fake_logits < 0])
        log["acc_D"].append(correct.float().mean())
        D_steps += 1
        # The log comes before R1 is added. Near log 4, D guesses: G is good, or D
        # is weak. Near 0, G loses.
        if args.r1 and D_steps % R1_EVERY == 0:
            loss_D = loss_D + args.r1 * R1_EVERY * losses.r1_penalty(D, x)
        opt_D.zero_grad()  # else backward() adds to the gradients of the last step
        loss_D.backward()
        opt_D.step()
        if step % args.k and step < n_batches:
            continue  # k steps of D, then one of G; the epoch ends with one of G

        # (2) Update G: maximise log D(G(z)), or minimise log(1 - D(G(z))).
        # Algorithm 1 draws new noise here. We keep the fakes of D's step: G has
        # not changed since, so a pass through G is saved. Only D has changed.
        fake_logits = D(fake)  # by the updated D; no detach(): G learns through D
        if args.loss == "minimax":
            loss_G = losses.minimax_generator_loss(fake_logits)
        else:
            loss_G = losses.generator_loss(fake_logits)
        log["loss_G"].append(loss_G.detach())
        log["D_G_z2"].append(fake_logits.detach().sigmoid().mean())  # after D's update
        opt_G.zero_grad()
        # The gradient goes through D to G. `inputs` saves the time for D's own
        # gradients, which opt_D.zero_grad() would clear in the next step.
        loss_G.backward(inputs=list(G.parameters()))
        opt_G.step()
        G_steps += 1

        # (3) Average G: G chases D and D chases G, so G's weights go round and
        # round. Their average is near the centre. With this decay it covers about
        # 1 / (1 - decay) steps, here (10 + G_steps) / 9: the bad first weights are
        # soon forgotten. `ema` limits the decay.
        decay = min(args.ema, (1 + G_steps) / (10 + G_steps))
        update_average(G_average, G, decay)

    return {name: torch.stack(log[name]).mean().item() for name in log}


def train(args, images, test_images, run, checkpoint=None):
    """Train on uint8 images (N, C, H, W), and write all files into the folder `run`.

    Goes on from a checkpoint, if there is one. `test_images` can be None. Returns the
    average of G, in eval mode, on the CPU.
    """
    device = args.device
    # Matrix products may round their inputs to fewer bits (on GPUs to TF32):
    # faster there and on most CPUs, and good enough for a GAN.
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(args.seed % 2**63)
    # The noise of all pictures, drawn on the CPU: the same on every device.
    fixed_z = torch.randn(64, args.z_dim).to(device)
    shape = images.shape[1:]
    G = Generator(
        args.z_dim, args.g_hidden, shape, args.batch_norm, args.dropout, args.g_leak
    ).to(device)
    D = Discriminator(args.d_hidden, shape, args.dropout, args.d_leak).to(device)
    G_average = copy.deepcopy(G).eval().requires_grad_(False)
    # Two optimisers: each network has its own loss, and moves its own weights.
    # fused: one fast call for all weights.
    betas = (args.beta1, 0.999)
    opt_G = torch.optim.Adam(G.parameters(), args.lr, betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), args.lr, betas, fused=True)
    parts = {"G": G, "D": D, "G_average": G_average, "opt_G": opt_G, "opt_D": opt_D}
    history = []
    if checkpoint:
        history = checkpoint["history"]
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
        except Exception as error:
            raise SystemExit(f"error: {run} does not fit: {error!r:.300}") from error
        for optimizer in opt_G, opt_D:  # flags may have changed these settings
            optimizer.param_groups[0].update(lr=args.lr, betas=betas)

    # torch.__version__ is more than a str, and weights_only=True would refuse it.
    info = vars(args) | {"torch": f"{torch.__version__}", "images": list(images.shape)}
    print(f"{run}: {args.dataset} {info['images']}, {device}")
    print("   epoch  loss_D     D_x  D_G_z1   acc_D  loss_G  D_G_z2 seconds")
    real = images.to(device)
    n_batches = max(1, len(images) // args.batch_size)
    save_every = math.ceil(SAVE_EVERY / n_batches)  # in epochs
    try:
        for epoch in range(len(history) + 1, args.epochs + 1):
            start = time.perf_counter()
            means = train_epoch(args, real, epoch, G, D, G_average, opt_G, opt_D)
            means["seconds"] = time.perf_counter() - start
            samples = G_average(fixed_z) / 2 + 0.5  # [-1, 1] -> [0, 1]
            if samples.isnan().any():
                sys.exit(f"error: epoch {epoch} diverged: try a lower --lr")
            history.append({"epoch": epoch, **means})
            if epoch % save_every and epoch < args.epochs:
                continue

            print(
                f"{epoch:8}", *(f"{mean:7.3f}" for mean in means.values()), flush=True
            )
            try:
                utils.save_image(real[:64] / 255, f"{run}/real.png")
                utils.save_image(samples, f"{run}/epoch_{epoch:05}.png")
                (run / "run.json").write_text(json.dumps(info, indent=2))
                with open(f"{run}/losses.csv", "w", newline="") as file:
                    writer = csv.DictWriter(file, history[0])
                    writer.writeheader()
                    writer.writerows(history)
            except PermissionError as error:  # Excel locks the table that it shows
                warn(error)
            # The checkpoint comes last: if the process is killed before,
            # --resume does all of this again. It is made in memory, since
            # torch.save hides a full disk behind another error, written beside
            # the old one, and then put in its place.
            state = {name: part.state_dict() for name, part in parts.items()}
            data = io.BytesIO()
            torch.save(state | {"info": info, "history": history}, data)
            temporary = run / "checkpoint.tmp"
            temporary.write_bytes(data.getvalue())
            temporary.replace(f"{run}/checkpoint.pt")
    finally:  # after Ctrl-C as well
        write_gif(run)

    G_average.cpu()
    if test_images is not None:
        # G has no density: parzen estimates one from 10,000 samples. The noise is
        # the same for all runs, so that their scores can be compared.
        torch.manual_seed(0)
        samples = G_average(torch.randn(10_000, args.z_dim)) / 2 + 0.5
        mean, error = parzen(samples, images, test_images)
        print(f"log-likelihood of {args.dataset}: {mean:.1f} +- {error:.1f} nats")
        info["log_likelihood"] = mean
        info["standard_error"] = error
        (run / "run.json").write_text(json.dumps(info, indent=2))
    return G_average


def write_gif(run):
    """Write training.gif of all the pictures."""
    paths = sorted(glob.glob(f"{glob.escape(str(run))}/epoch_*.png"))
    paths.sort(key=len)  # epoch_100000 comes after epoch_99999
    try:
        frames = [Image.open(path).convert("RGB") for path in paths]
        if frames:
            frames[0].save(
                f"{run}/training.gif",
                save_all=True,
                append_images=frames[1:],
                duration=150,  # milliseconds
                loop=0,
            )
    except OSError as error:  # a locked file, or half a picture
        warn(error)


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
    """For each image x: log of the mean, over all samples, of N(x; sample, sigma^2)."""
    distances = torch.cdist(images.flatten(1) / 255, samples.flatten(1))
    log_sums = distances.square_().div_(-2 * sigma**2).logsumexp(1)
    norm = samples[0].numel() / 2 * math.log(math.tau * sigma**2)
    return log_sums - math.log(len(samples)) - norm


def load_data(args):
    """Return the data set's name, its training images and its test images.

    Images are uint8 (N, C, H, W). A folder has no test images: None.
    """
    name = args.dataset
    if name == "auto":
        name = "mnist"
    if name in DATASETS:
        socket.setdefaulttimeout(10)  # seconds: a dead network must not hang
        try:
            train = DATASETS[name](args.data_dir, train=True, download=True)
            test = DATASETS[name](args.data_dir, train=False, download=True)
            return name, train.data.unsqueeze(1), test.data.unsqueeze(1)
        except Exception as error:
            message = f"no {name} in --data-dir {args.data_dir}: {error!r:.400}"
            if args.dataset != "auto":
                raise SystemExit(f"error: {message}") from error
            warn(f"{message}; training on --dataset drawn")
            name = "drawn"
    if name == "drawn":
        train, test = draw_digits()
        return name, train, test
    return name, load_folder(name, args.image_size), None


def load_folder(folder, size):
    """Every image below the folder, uint8 (N, C, size, size); C = 1 if all are grey."""
    images = []
    unreadable = []
    # "**" goes into folders and into links to folders, but not into hidden ones.
    for path in sorted(glob.glob(f"{glob.escape(folder)}/**", recursive=True)):
        try:
            if os.path.isdir(path):
                os.listdir(path)  # fails without permission; glob says nothing
                continue
            images.append(read_image(path, size))
        except Exception as error:  # noqa: BLE001 damaged files raise any
            unreadable.append(f"{path}: {error!r}")
    if unreadable:
        warn(f"{len(unreadable)} unreadable, the first is {unreadable[0]}")
    if len(images) < 2:
        sys.exit(f"error: --dataset {folder}: {len(images)} images, 2 are needed")
    # Grey images get three channels where others have colours.
    images = torch.stack(torch.broadcast_tensors(*images))
    low, high = images.aminmax()
    if low == high:
        warn(f"all images in {folder} are one flat colour: the losses say nothing")
    if images.is_floating_point():  # 16 bits or more: one scale for the whole folder
        images = ((images - low) * 255 / (high - low)).round().byte()
    return images


def read_image(path, size):
    """One image, cropped to (C, size, size): uint8, or float32 from 16 bits on.

    Raises what Pillow raises for a damaged file, which can be any exception.
    """
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":  # I;16, I;16B, I and F: integers and floats
        image = image.convert("F")
    else:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")  # below transparent parts
        image = Image.alpha_composite(white, image).convert("RGB")
    x = transforms.PILToTensor()(ImageOps.fit(image, (size, size)))
    if not x.isfinite().all():
        raise ValueError("a pixel is infinite or missing")
    if (x == x[:1]).all():
        return x[:1].clone()  # grey: one channel is enough
    return x


def draw_digits():
    """Ten digits in Pillow's own font, warped at random: the same at every call."""
    torch.manual_seed(0)
    warp = transforms.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 15, Image.BILINEAR)
    font = ImageFont.load_default(22)
    digits = []
    for n in range(sum(DRAWN)):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((8, 1), str(n % 10), 255, font, stroke_width=n % 3)
        digits.append(transforms.PILToTensor()(warp(image)))
    return torch.stack(digits).split(DRAWN)


# Three types of flags. argparse shows their names: "invalid whole_from_1 value: '0'".
def whole_from_1(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def number_from_0(text):
    number = float(text)
    if not 0 <= number < math.inf:
        raise ValueError
    return number


def share(text):
    number = float(text)
    if not 0 <= number < 1:
        raise ValueError
    return number


def parse_args(argv):
    """Return the settings and, with --resume, the run's checkpoint."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # an error is one line

    def add(flag, default, help, kind=str, nargs=None):
        help += " (default: %(default)s)"
        parser.add_argument(flag, type=kind, default=default, help=help, nargs=nargs)

    add("--dataset", "auto", "mnist, fashion-mnist, kmnist, drawn, or a folder's path")
    add("--data-dir", "data", "where data sets are, or will be put")
    add("--image-size", 28, "pixels a side of a folder's images", whole_from_1)
    add("--out-dir", None, "a new folder, without --resume; None: runs/001, ...")
    add("--resume", None, "go on with the run in this folder")
    # The networks
    add("--z-dim", 64, "length of G's noise: in how many ways it varies", whole_from_1)
    add("--g-hidden", [256, 512], "widths of G's hidden layers", whole_from_1, "+")
    add("--d-hidden", [512, 256], "of D's: if too wide, D wins", whole_from_1, "+")
    parser.add_argument(
        "--batch-norm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in G: keeps samples from growing alike",
    )
    add("--dropout", 0.0, "share of units dropped, in both networks: weakens D", share)
    add("--g-leak", 0.0, "slope of G's LeakyReLU below 0; 0 is ReLU", number_from_0)
    add("--d-leak", 0.2, "of D's: above 0, G's gradient passes", number_from_0)
    # The game
    parser.add_argument(
        "--loss",
        choices=["non-saturating", "minimax"],
        default="non-saturating",
        help="what G minimises",
    )
    add("--k", 1, "D steps for each G step (Algorithm 1)", whole_from_1)
    add("--real-label", 1.0, "0.9: D need not be too sure", number_from_0)
    add("--label-noise", 0.0, "n: labels from label - n to label + n", share)
    add("--r1", 1.0, "gamma, weight of the R1 penalty: a smooth D", number_from_0)
    # The optimisation
    add("--epochs", 40, "passes over the data in all", whole_from_1)
    add("--batch-size", 128, "images for each step, 2 at least", whole_from_1)
    add("--lr", 1e-3, "Adam's step size: too large, and it circles", number_from_0)
    add("--beta1", 0.0, "Adam's momentum: in a game, it overshoots", share)
    add("--ema", 0.9999, "highest decay of the shown average of G, 0: off", share)
    add("--seed", 0, "of weights, noise and image order", int)
    add("--device", "auto", "cuda, mps or cpu")

    args = parser.parse_args(argv)
    if not args.resume:
        return args, None
    try:
        checkpoint = load_checkpoint(args.resume)
        # Parse once more, with the run's settings for what is not given now.
        parser.set_defaults(**checkpoint["info"])
    except Exception as error:
        raise SystemExit(f"error: --resume {args.resume}: {error!r:.60}") from error
    return parser.parse_args(argv), checkpoint


def choose_device(name):
    """The device of that name, or the best that is here."""
    if torch.cuda.is_available():
        best = "cuda"
    elif torch.backends.mps.is_available():
        best = "mps"
    else:
        best = "cpu"
    if name in (best, "cpu"):
        return name
    if name != "auto":
        warn(f"no {name} here: training on {best}")
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


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def main(argv=None):
    """Run the program; return the run's folder and the average of G, on the CPU."""
    args, checkpoint = parse_args(argv)
    args.device = choose_device(args.device)
    run = None
    try:
        args.dataset, images, test_images = load_data(args)
        run = Path(args.resume or args.out_dir or new_folder())
        os.makedirs(run, exist_ok=True)
        if not args.resume and os.listdir(run):
            sys.exit(
                f"error: --out-dir {run} is not empty: name a new one, or --resume it"
            )
        return run, train(args, images, test_images, run, checkpoint)
    except OSError as error:  # a full disk, a folder that must not be written to
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt:
        if run:
            warn(f'stopped; if saved, go on with: python train_gan.py --resume "{run}"')
        raise SystemExit(130)


if __name__ == "__main__":
    main()
