"""The two networks: plain multilayer perceptrons, with the layers of today."""

from itertools import pairwise
from math import prod
from pathlib import Path

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
        self.z_dim, self.image_shape = z_dim, tuple(image_shape)
        widths = [z_dim, *hidden]
        self.net = nn.Sequential(
            *hidden_layers(widths, batch_norm, dropout, leak),
            nn.Linear(widths[-1], prod(image_shape)),
            nn.Tanh(),  # images are scaled to [-1, 1] as well
        )

    def forward(self, z):
        return self.net(z).unflatten(1, self.image_shape)


class Discriminator(nn.Module):
    """D: images (N, C, H, W), or flat (N, C*H*W), in [-1, 1] -> logits (N, 1).

    D(x) of the paper is logit.sigmoid(); the losses take the logit. There is no
    BatchNorm, so that each image is judged on its own. Arguments as in Generator.
    """

    def __init__(self, hidden=(512, 256), image_shape=(1, 28, 28), dropout=0, leak=0.2):
        super().__init__()
        widths = [prod(image_shape), *hidden]
        self.net = nn.Sequential(
            *hidden_layers(widths, False, dropout, leak), nn.Linear(widths[-1], 1)
        )

    def forward(self, x):
        return self.net(x.flatten(1))


def hidden_layers(widths, batch_norm, dropout, leak):
    layers = []
    for n_in, n_out in pairwise(widths):
        # BatchNorm subtracts the mean, and a bias before it with the mean.
        layers.append(nn.Linear(n_in, n_out, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(n_out))
        layers.append(nn.LeakyReLU(leak, inplace=True))
        if dropout:
            layers.append(nn.Dropout(dropout))
    return layers


def load_generator(path, map_location="cpu"):
    """The averaged generator of a run folder or of its checkpoint.pt, in eval mode."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    state = torch.load(path, map_location=map_location, weights_only=True)
    s, shape = state["settings"], state["images"][1:]
    layers = s["batch_norm"], s["dropout"], s["g_leak"]
    G = Generator(s["z_dim"], s["g_hidden"], shape, *layers).to(map_location)
    G.load_state_dict(state["G_average"])
    return G.eval().requires_grad_(False)
