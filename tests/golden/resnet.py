"""Writes the golden file of the ResNet, `resnet.safetensors`: `python resnet.py`, from this folder.

The network is the ResNet of small images that RobustBench holds (basic blocks, a 3 x 3 stem), in double
precision. The file holds random parameters and running statistics (`model.*`), images (`x`, NCHW), their
`labels`, the logits by running statistics (`logits_eval`), and of one training step on the mean cross-entropy:
the logits by batch statistics (`logits_train`), the buffers behind it (`after.*`) and the gradients of the
images (`grad_x`) and of all parameters (`grad.*`). The header says who wrote it.
"""

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

IMAGE_SIZE, CLASSES, WIDTHS, BLOCKS = 9, 5, (4, 6, 10), (1, 2, 1)


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
    def __init__(self, widths=WIDTHS, blocks=BLOCKS):
        super().__init__()
        self.stages = len(widths)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        c_in = widths[0]
        for i, (width, n) in enumerate(zip(widths, blocks)):
            blocks = [Block(c_in if j == 0 else width, width, 2 if i > 0 and j == 0 else 1) for j in range(n)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = width
        self.linear = nn.Linear(c_in, CLASSES)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.linear(x.mean((2, 3)))


def randomise(model):
    """Random numbers for norms too: they start at 1 and 0, which would hide swapped or lost numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).float())
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_((0.1 * torch.randn_like(buffer)).float())
            elif name.endswith("running_var"):
                buffer.copy_((0.5 + torch.rand_like(buffer)).float())
            else:
                buffer.fill_(41)


if __name__ == "__main__":
    torch.manual_seed(18)
    model = ResNet().double()
    randomise(model)
    x = torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE).double().requires_grad_()
    labels = torch.tensor([4, 0, 2])

    tensors = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
    tensors |= {"x": x, "labels": labels, "logits_eval": model.eval()(x)}
    tensors["logits_train"] = model.train()(x)
    F.cross_entropy(tensors["logits_train"], labels).backward()
    tensors |= {f"after.{key}": value for key, value in model.named_buffers()}
    tensors |= {f"grad.{key}": value.grad for key, value in model.named_parameters()} | {"grad_x": x.grad}

    single = {k: v.detach().float() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in single.items()}, "resnet.safetensors", {"versions": f"torch {torch.__version__}"})
