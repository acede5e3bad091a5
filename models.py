"""The two networks: plain multilayer perceptrons, with the layers of today."""

from math import prod

import torch
from torch import nn


class Generator(nn.Module):
    """G: noise z (N, z_dim), standard normal -> images (N, C, H, W) in [-1, 1].

    Every width in `hidden` is one Linear, BatchNorm (or none), LeakyReLU, Dropout.
    `leak` is LeakyReLU's negative slope (0 is ReLU). `image_shape` is (C, H, W).
    """

    def __init__(
        self,
        z_dim=64,
        hidden=(256, 512),
        image_shape=(1, 28, 28),
        batch_norm=True,
        dropout=0.0,
        leak=0.0,
    ):
        super().__init__()
        self.z_dim = z_dim
        self.image_shape = image_shape
        n_pixels = prod(image_shape)
        self.net = perceptron(z_dim, hidden, n_pixels, batch_norm, dropout, leak)
        self.net.append(nn.Tanh())  # images are scaled to [-1, 1] as well

    def forward(self, z):
        return self.net(z).unflatten(1, self.image_shape)


class Discriminator(nn.Module):
    """D: images (N, C, H, W), or flat (N, C*H*W), in [-1, 1] -> logits (N, 1).

    D(x) of the paper is logit.sigmoid(); the losses take the logit. There is no
    BatchNorm, so that each image is judged on its own. Arguments as in Generator.
    """

    def __init__(self, hidden=(512, 256), image_shape=(1, 28, 28), dropout=0, leak=0.2):
        super().__init__()
        self.net = perceptron(prod(image_shape), hidden, 1, False, dropout, leak)

    def forward(self, x):
        return self.net(x.flatten(1))


def perceptron(n_in, hidden, n_out, batch_norm, dropout, leak):
    layers = []
    for width in hidden:
        # BatchNorm subtracts the mean, so a bias before it would vanish.
        layers.append(nn.Linear(n_in, width, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.LeakyReLU(leak, inplace=True))
        if dropout:
            layers.append(nn.Dropout(dropout))
        n_in = width
    layers.append(nn.Linear(n_in, n_out))
    return nn.Sequential(*layers)


def update_average(G_average, G, decay):
    """average = decay * average + (1 - decay) * weight, for all that G has learnt."""
    weights = G.state_dict()
    for name, average in G_average.state_dict().items():
        if average.is_floating_point():  # all but BatchNorm's count of batches
            average.lerp_(weights[name], 1 - decay)


def load_checkpoint(run):
    """What a run has saved, on the CPU. weights_only: a file can hold no program."""
    path = f"{run}/checkpoint.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


def load_generator(run):
    """The averaged generator of a run's folder, in eval mode, on the CPU."""
    checkpoint = load_checkpoint(run)
    info = checkpoint["info"]
    G = Generator(
        info["z_dim"],
        info["g_hidden"],
        info["images"][1:],
        info["batch_norm"],
        info["dropout"],
        info["g_leak"],
    )
    G.load_state_dict(checkpoint["G_average"])
    return G.eval().requires_grad_(False)
