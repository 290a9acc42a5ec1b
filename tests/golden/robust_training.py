"""Writes `robust_training.safetensors`: `python robust_training.py`, from this folder.

Twenty steps each of PGD-AT and TRADES on a small ResNet with batch norm (the classes of resnet.py with other widths),
in double precision: SGD with Nesterov's momentum and weight decay, batches of 6 real and 10 synthetic images with
gamma = 0.4, attacks in eval mode. For each objective the file holds the parameters before (`<objective>.before.*`)
and after (`<objective>.after.*`), the losses of the steps, and of each step the images, labels and adversarial images:
the attacks' results are inputs, so that only losses, gradients and updates are compared. On the model that TRADES
leaves (`trades.after.*`) PGD is run from given starts (`pgd.<norm>.start`): its first step and the losses after ten are
kept. The header says who wrote it.
"""

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

STEPS, REAL, SYNTHETIC, SIZE, CLASSES, WIDTHS = 20, 6, 10, 8, 4, (4, 8)
GAMMA, EPSILON, BETA, LR, MOMENTUM, WEIGHT_DECAY = 0.4, 0.1, 6.0, 0.05, 0.9, 5e-4


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = nn.Sequential(Block(WIDTHS[0], WIDTHS[0], 1))
        self.layer2 = nn.Sequential(Block(WIDTHS[0], WIDTHS[1], 2))
        self.linear = nn.Linear(WIDTHS[1], CLASSES)

    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(x.mean((2, 3)))


def kl(p_logits, q_logits):
    log_p, log_q = F.log_softmax(p_logits, 1), F.log_softmax(q_logits, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def attack(model, x, loss_of, start):
    model.eval()
    x_adv = start
    for _ in range(10):
        x_adv = x_adv.detach().requires_grad_()
        gradient = torch.autograd.grad(loss_of(model(x_adv)).sum(), x_adv)[0]
        x_adv = x_adv + EPSILON / 4 * gradient.sign()
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON), 0, 1)
    model.train()
    return x_adv.detach().float().double()


tensors = {}
for objective in ("pgd_at", "trades"):
    torch.manual_seed(40)
    model = ResNet().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.float())
    tensors |= {f"{objective}.before.{k}": v.clone() for k, v in model.state_dict().items()}
    sgd = torch.optim.SGD(model.parameters(), LR, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        labels = torch.randint(CLASSES, (REAL + SYNTHETIC,))
        # Each class has its own brightness, so that there is something to learn.
        x = torch.rand(REAL + SYNTHETIC, 1, SIZE, SIZE) * 0.6 + labels[:, None, None, None] * 0.1
        x = x.float().double()
        if objective == "pgd_at":
            start = torch.clamp(x + (2 * torch.rand_like(x) - 1) * EPSILON, 0, 1)
            x_adv = attack(model, x, lambda z: F.cross_entropy(z, labels, reduction="none"), start)
            each = F.cross_entropy(model(x_adv), labels, reduction="none")
        else:
            clean = model.eval()(x).detach()
            x_adv = attack(model, x, lambda z: kl(clean, z), x + 0.001 * torch.randn_like(x))
            logits = model(x)
            each = F.cross_entropy(logits, labels, reduction="none") + BETA * kl(logits, model(x_adv))
        loss = GAMMA * each[:REAL].mean() + (1 - GAMMA) * each[REAL:].mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.detach())
        tensors |= {f"{objective}.{step}.x": x, f"{objective}.{step}.x_adv": x_adv, f"{objective}.{step}.labels": labels}
    tensors |= {f"{objective}.after.{k}": v.clone() for k, v in model.state_dict().items()}
    tensors[f"{objective}.losses"] = torch.stack(losses)

# PGD from a given start on the last model: the first step, and the losses after ten.
model.eval()
labels = torch.randint(CLASSES, (64,))
x = (torch.rand(64, 1, SIZE, SIZE) * 0.6 + labels[:, None, None, None] * 0.1).float().double()
tensors |= {"pgd.x": x, "pgd.labels": labels}
for norm, epsilon, step in (("linf", 0.1, 0.025), ("l2", 0.5, 0.125)):
    noise = 2 * torch.rand_like(x) - 1
    if norm == "l2":
        noise = noise / noise.flatten(1).norm(dim=1)[:, None, None, None]
    start = torch.clamp(x + noise * epsilon / 2, 0, 1).float().double()
    tensors[f"pgd.{norm}.start"] = x_adv = start
    for i in range(10):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(x_adv), labels, reduction="none")
        gradient = torch.autograd.grad(loss.sum(), x_adv)[0]
        if norm == "linf":
            moved = x_adv + step * gradient.sign()
            x_adv = torch.clamp(torch.min(torch.max(moved, x - epsilon), x + epsilon), 0, 1)
        else:
            moved = x_adv + step * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
            delta = moved - x
            length = delta.flatten(1).norm(dim=1)[:, None, None, None]
            x_adv = torch.clamp(x + delta * torch.clamp(epsilon / length, max=1), 0, 1)
        if i == 0:
            tensors[f"pgd.{norm}.first"] = x_adv.detach()
    tensors[f"pgd.{norm}.losses"] = F.cross_entropy(model(x_adv), labels, reduction="none").detach()

single = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
versions = {"versions": f"torch {torch.__version__}"}
save_file({k: v.contiguous() for k, v in single.items()}, "robust_training.safetensors", versions)
