"""The classifiers in PyTorch, under the names of proxyset's state dicts. Images are in [0, 1]."""

import torch
import torch.nn.functional as F
from torch import nn


class ConvNormSilu(nn.Module):
    def __init__(self, c_in, c_out, stride, groups):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm = nn.GroupNorm(groups, c_out)

    def forward(self, x):
        return F.silu(self.norm(self.conv(x)))


class SmallCNN(nn.Module):
    def __init__(self, in_channels, channels, num_classes, groups):
        super().__init__()
        self.stem = ConvNormSilu(in_channels, channels[0], 1, groups)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                [
                    ConvNormSilu(channels[max(i - 1, 0)], c, 1 if i == 0 else 2, groups),
                    ConvNormSilu(c, c, 1, groups),
                ]
            )
            for i, c in enumerate(channels)
        )
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, x):
        x = self.stem(2 * x - 1)
        for first, second in self.stages:
            x = second(first(x))
        return self.fc(x.mean((2, 3)))
