"""The two networks: multilayer perceptrons (MLPs) with BatchNorm and LeakyReLU."""

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
        self.net = mlp(z_dim, hidden, n_pixels, batch_norm, dropout, leak)
        self.net.append(nn.Tanh())  # images are scaled to [-1, 1] as well

    def forward(self, z):
        return self.net(z).unflatten(1, self.image_shape)  # (N, C*H*W) -> (N, C, H, W)


class Discriminator(nn.Module):
    """D: images (N, C, H, W), or flat (N, C*H*W), in [-1, 1] -> logits (N, 1).

    D(x) of the paper is logit.sigmoid(); the losses take the logit. There is no
    BatchNorm, so that each image is judged on its own. Where a ReLU is 0, no gradient
    passes to G, so the negative slope `leak` is above 0. Arguments as in Generator.
    """

    def __init__(self, hidden=(512, 256), image_shape=(1, 28, 28), dropout=0, leak=0.2):
        super().__init__()
        n_pixels = prod(image_shape)
        self.net = mlp(
            n_pixels, hidden, 1, batch_norm=False, dropout=dropout, leak=leak
        )

    def forward(self, x):
        return self.net(x.flatten(1))


def mlp(n_in, hidden, n_out, batch_norm, dropout, leak):
    """Linear layers from n_in numbers to n_out, with the `hidden` widths between."""
    layers = []
    for width in hidden:
        # BatchNorm subtracts the mean, and a bias would be subtracted with it.
        layers.append(nn.Linear(n_in, width, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.LeakyReLU(leak, inplace=True))  # inplace saves memory
        if dropout:
            layers.append(nn.Dropout(dropout))
        n_in = width
    layers.append(nn.Linear(n_in, n_out))
    return nn.Sequential(*layers)


def update_average(G_ema, G, decay):
    """average = decay * average + (1 - decay) * weight, for all that G has learnt."""
    weights = G.state_dict()
    # state_dict() holds the tensors themselves, so lerp_() changes G_ema.
    for name, average in G_ema.state_dict().items():
        if average.is_floating_point():  # all but BatchNorm's count of batches
            average.lerp_(weights[name], 1 - decay)


def load_checkpoint(run):
    """What a run has saved, on the CPU: a dict of tensors and plain values only."""
    path = f"{run}/checkpoint.pt"
    # weights_only: a file from a stranger must not run a program (torch >= 2.10).
    return torch.load(path, map_location="cpu", weights_only=True)


def load_generator(run):
    """The averaged generator of a run's folder, in eval mode, on the CPU."""
    checkpoint = load_checkpoint(run)
    G = Generator(**checkpoint["G_args"])
    G.load_state_dict(checkpoint["G_ema"])
    return G.eval().requires_grad_(False)
