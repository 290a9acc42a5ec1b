"""Writes `smooth_adv.safetensors`: `python smooth_adv.py`, from this folder.

SmoothAdv (Salman et al. 2019) by the formulas of its authors' code, on a network of two layers, in double precision:
four steps of PGD in an l2 ball on `-log` of the mean probability over three noisy copies, which stay the same, then the
cross-entropy of the copies of what it found. The file holds the network, images, labels, noise, and each result.
"""

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

B, SIZE, CLASSES, COPIES, SIGMA, EPSILON, STEP = 5, 4, 3, 3, 0.5, 0.5, 0.25

torch.manual_seed(19)
weight = torch.randn(8, SIZE * SIZE).float().double().requires_grad_()
bias, last = torch.randn(8).float().double(), torch.randn(CLASSES, 8).float().double()
x = torch.rand(B, SIZE, SIZE, 1).float().double()
labels = torch.randint(CLASSES, (B,))
noise = (SIGMA * torch.randn(COPIES, B, SIZE, SIZE, 1)).float().double()


def network(x):
    return F.linear(torch.tanh(F.linear(x.flatten(1), weight, bias)), last)


def smoothed_losses(x):
    probabilities = torch.stack([F.softmax(network(x + one), 1) for one in noise]).mean(0)
    return F.nll_loss(torch.log(probabilities.clamp(min=1e-20)), labels, reduction="none")


x_adv = x
for _ in range(4):
    x_adv = x_adv.detach().requires_grad_()
    gradient = torch.autograd.grad(smoothed_losses(x_adv).sum(), x_adv)[0]
    moved = x_adv + STEP * gradient / gradient.flatten(1).norm(dim=1).view(B, 1, 1, 1)
    delta = (moved - x).renorm(p=2, dim=0, maxnorm=EPSILON)
    x_adv = (x + delta).clamp(0, 1)
x_adv = x_adv.detach()
losses = torch.stack([F.cross_entropy(network(x_adv + one), labels, reduction="none") for one in noise]).mean(0)
losses.mean().backward()
tensors = {"weight": weight, "bias": bias, "last": last, "x": x, "noise": noise, "x_adv": x_adv}
tensors |= {"smoothed_losses": smoothed_losses(x_adv), "losses": losses, "grad_weight": weight.grad}
single = {k: v.detach().float().contiguous() for k, v in tensors.items()} | {"labels": labels}
save_file(single, "smooth_adv.safetensors", {"versions": f"torch {torch.__version__}"})
