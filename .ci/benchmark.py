"""Seconds per epoch: the loop that tutorials teach against train_gan.py, side by side.

python .ci/benchmark.py [--data-dir data] [--rounds 3]    # MNIST must be in data-dir
uv run --with torch --with torchvision .ci/benchmark.py   # with uv

Both train the same networks with the same batch size on the same device, the CPU.
Theirs: a DataLoader over PIL images, two passes through D, a second pass through G,
gradients into all of D in G's step, .item() after every batch. 300 steps of it are
timed and scaled to an epoch; of ours, the last of two epochs counts.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import Discriminator, Generator

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir", default="data")
parser.add_argument("--rounds", type=int, default=3)
args = parser.parse_args()
STEPS, WARM_UP = 300, 20
try:
    datasets.MNIST(args.data_dir)
except RuntimeError as error:
    sys.exit(f"error: no MNIST in --data-dir {args.data_dir}: {error}")


def conventional():
    G, D, bce = Generator(), Discriminator(), nn.BCELoss()
    opt_G = torch.optim.Adam(G.parameters(), lr=1e-3, betas=(0.0, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), lr=1e-3, betas=(0.0, 0.999))
    to_range = [transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    mnist = datasets.MNIST(args.data_dir, transform=transforms.Compose(to_range))
    loader = torch.utils.data.DataLoader(mnist, batch_size=128, shuffle=True)
    total = 0.0
    for step, (x, _) in enumerate(loader):
        if step == WARM_UP:
            start = time.perf_counter()
        if step == WARM_UP + STEPS:
            break
        ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        fake = G(torch.randn(len(x), 64))
        loss_D = bce(D(x).sigmoid(), ones) + bce(D(fake.detach()).sigmoid(), zeros)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        loss_G = bce(D(G(torch.randn(len(x), 64))).sigmoid(), ones)
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        total += loss_D.item() + loss_G.item()
    return (time.perf_counter() - start) / STEPS * len(loader)


def ours(r1):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train_gan.py", "--epochs", "2", "--device", "cpu"]
        command += ["--dataset", "mnist", "--data-dir", args.data_dir, "--r1", r1]
        command += ["--out-dir", f"{folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with Path(folder, "run", "losses.csv").open() as file:
            return float(list(csv.DictReader(file))[-1]["seconds"])


def round_of_three(number):
    """One line before each part: a part takes up to half a minute."""
    begin = f"round {number} of {args.rounds}:"
    print(begin, "the conventional loop ...", flush=True)
    theirs = conventional()
    print(begin, "train_gan.py --r1 0 ...", flush=True)
    plain = ours("0")
    print(begin, "train_gan.py ...", flush=True)
    return theirs, plain, ours("1")


rounds = [round_of_three(number) for number in range(1, args.rounds + 1)]
theirs, plain, default = (statistics.median(times) for times in zip(*rounds))
print(f"the conventional loop  {theirs:6.1f} s an epoch (medians of {args.rounds})")
print(f"train_gan.py --r1 0    {plain:6.1f} s, {theirs / plain:.1f} times as fast")
print(f"train_gan.py           {default:6.1f} s, {theirs / default:.1f} times as fast")
