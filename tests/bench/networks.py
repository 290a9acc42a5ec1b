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


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """The form for 32 x 32 images: a 3 x 3 stem at stride 1 and no pooling behind it."""

    def __init__(self, blocks, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        c_in = 64
        for stage, count in enumerate(blocks):
            c_out = 64 << stage
            layers = []
            for block in range(count):
                layers.append(BasicBlock(c_in, c_out, 2 if stage > 0 and block == 0 else 1))
                c_in = c_out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(c_in, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.convShortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x):
        h = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(h))))
        return out + (x if self.convShortcut is None else self.convShortcut(h))


class WideGroup(nn.Module):
    def __init__(self, c_in, c_out, stride, blocks):
        super().__init__()
        inputs = [(c_in, stride)] + [(c_out, 1)] * (blocks - 1)
        self.layer = nn.Sequential(*(WideBlock(c, c_out, s) for c, s in inputs))

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """Zagoruyko & Komodakis 2016, with the names of TRADES."""

    def __init__(self, depth, width, num_classes):
        super().__init__()
        channels, blocks = [16, 16 * width, 32 * width, 64 * width], (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.block1 = WideGroup(channels[0], channels[1], 1, blocks)
        self.block2 = WideGroup(channels[1], channels[2], 2, blocks)
        self.block3 = WideGroup(channels[2], channels[3], 2, blocks)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))
