"""The losses of the game, on logits: D(x) = sigmoid(logit). Each is a batch mean.

log D = logsigmoid(logit) and log(1 - D) = logsigmoid(-logit), which stay finite where
the logarithm of a rounded sigmoid would be -inf.
"""

import torch
from torch.nn import functional as F


def discriminator_loss(real_logits, fake_logits, real_label=1.0, label_noise=0.0):
    """-V(D, G) = -E[log D(x)] - E[log(1 - D(G(z)))] (Goodfellow et al. 2014, eq. 1).

    Logits of any shape -> scalar; log 4 = 1.386 where D cannot tell real from fake.
    `real_label` below 1 is one-sided label smoothing (Salimans et al. 2016, 3.4).
    `label_noise` n draws every label from [label - n, label + n]; a label outside
    [0, 1] rewards overconfidence without bound, so one batch's loss can be negative.
    """
    # Binary cross-entropy: -label * log D - (1 - label) * log(1 - D)
    bce = F.binary_cross_entropy_with_logits
    real = bce(real_logits, labels(real_logits, real_label, label_noise))
    fake = bce(fake_logits, labels(fake_logits, 0.0, label_noise))
    return real + fake


def labels(logits, label, noise):
    """Labels shaped like the logits, uniform in [label - noise, label + noise]."""
    if not noise:
        return torch.full_like(logits, label)
    return torch.empty_like(logits).uniform_(label - noise, label + noise)


def generator_loss(fake_logits):
    """Non-saturating: -E[log D(G(z))] (Goodfellow et al. 2014, end of section 3).

    Logits of any shape -> scalar; log 2 = 0.693 at D = 1/2. Its slope in the logit is
    largest where D is sure that a sample is fake, where G has the most to learn.
    """
    return -F.logsigmoid(fake_logits).mean()  # -log D(G(z))


def minimax_generator_loss(fake_logits):
    """The original: E[log(1 - D(G(z)))] (Goodfellow et al. 2014, Algorithm 1).

    Logits of any shape -> scalar; -log 2 = -0.693 at D = 1/2. Its slope in the logit
    vanishes where D is sure that a sample is fake: G stands still at its worst.
    """
    return F.logsigmoid(-fake_logits).mean()  # log(1 - D(G(z)))


def r1_penalty(D, x):
    """1/2 E[|grad_x D(x)|^2] on real x, D as a logit (Mescheder et al. 2018, eq. 9).

    Images (N, C, H, W) in [-1, 1] -> scalar. A steep D throws G from one side to the
    other. The penalty keeps D smooth around the data, so that the game settles. D must
    not mix the images of a batch.
    """
    x = x.detach().requires_grad_()
    # autograd wants one number: the sum of all logits. Each logit depends on its own
    # image only, so the gradient of the sum at an image is that of its own logit.
    # create_graph: backward() must be able to differentiate this gradient once more.
    (grad,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return grad.square().flatten(1).sum(1).mean() / 2
