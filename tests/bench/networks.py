"""The networks in PyTorch, under the names of proxyset's state dicts. Classifiers get images in [0, 1]."""

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


def resampled(x, change):
    if change is None:
        return x
    return F.avg_pool2d(x, 2) if change == "down" else F.interpolate(x, scale_factor=2, mode="nearest")


def attended(q, k, v):
    """Of queries, keys and values with the channels before the positions, in any number of heads."""
    return F.scaled_dot_product_attention(*(part.transpose(-1, -2) for part in (q, k, v))).transpose(-1, -2)


class ResampledConv(nn.Conv2d):
    """After a change of resolution, if there is one; its filter, which EDM's files hold, is the mean over 2 x 2 pixels."""

    def __init__(self, c_in, c_out, kernel, change):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        self.change = change
        if change:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        return super().forward(resampled(x, self.change))


class SongBlock(nn.Module):
    def __init__(self, c_in, c_out, emb, change=None, attention=False):
        super().__init__()
        norm = lambda c: nn.GroupNorm(min(32, c // 4), c, eps=1e-6)
        self.norm0, self.conv0 = norm(c_in), ResampledConv(c_in, c_out, 3, change)
        self.affine = nn.Linear(emb, c_out)
        self.norm1, self.conv1 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = ResampledConv(c_in, c_out, 1, change) if change or c_in != c_out else None
        self.norm2 = norm(c_out) if attention else None
        if attention:
            self.qkv, self.proj = nn.Conv2d(c_out, 3 * c_out, 1), nn.Conv2d(c_out, c_out, 1)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        h = self.conv1(F.silu(self.norm1(h)))
        x = (h + (x if self.skip is None else self.skip(x))) * 0.5**0.5
        if self.norm2 is not None:
            qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, 3))
            x = (self.proj(attended(*qkv.unbind(2)).unflatten(2, x.shape[2:])) + x) * 0.5**0.5
        return x


class DdpmPlusPlus(nn.Module):
    """Song et al. 2021, with the names of EDM's SongUNet: no classes, standard encoder and decoder."""

    def __init__(self, side, channels, model_channels, channel_mult, num_blocks, attn_resolutions):
        super().__init__()
        emb, self.half = 4 * model_channels, model_channels // 2
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, emb), nn.Linear(emb, emb)
        c, skips = model_channels, [model_channels]
        self.enc = nn.ModuleDict({f"{side}x{side}_conv": nn.Conv2d(channels, c, 3, padding=1)})
        self.dec = nn.ModuleDict()
        sides = [side >> level for level in range(len(channel_mult))]
        for level, (s, multiple) in enumerate(zip(sides, channel_mult)):
            if level:
                self.enc[f"{s}x{s}_down"] = SongBlock(c, c, emb, "down")
                skips.append(c)
            for i in range(num_blocks):
                c_in, c = c, model_channels * multiple
                self.enc[f"{s}x{s}_block{i}"] = SongBlock(c_in, c, emb, attention=s in attn_resolutions)
                skips.append(c)
        for s, multiple in reversed(list(zip(sides, channel_mult))):
            if s == sides[-1]:
                self.dec[f"{s}x{s}_in0"] = SongBlock(c, c, emb, attention=True)
                self.dec[f"{s}x{s}_in1"] = SongBlock(c, c, emb)
            else:
                self.dec[f"{s}x{s}_up"] = SongBlock(c, c, emb, "up")
            for i in range(num_blocks + 1):
                c_in, c = c + skips.pop(), model_channels * multiple
                attention = i == num_blocks and s in attn_resolutions
                self.dec[f"{s}x{s}_block{i}"] = SongBlock(c_in, c, emb, attention=attention)
        self.dec[f"{side}x{side}_aux_norm"] = nn.GroupNorm(min(32, c // 4), c, eps=1e-6)
        self.dec[f"{side}x{side}_aux_conv"] = nn.Conv2d(c, channels, 3, padding=1)

    def forward(self, x, t, **_):
        frequencies = 1e-4 ** (torch.arange(self.half, device=t.device) / (self.half - 1))
        angles = t[:, None] * frequencies
        emb = F.silu(self.map_layer0(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype)))
        emb, skips = F.silu(self.map_layer1(emb)), []
        for name, part in self.enc.items():
            x = part(x) if name.endswith("_conv") else part(x, emb)
            skips.append(x)
        for name, part in self.dec.items():
            if "aux" in name:
                x = F.silu(part(x)) if name.endswith("norm") else part(x)
                continue
            x = part(torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
        return x


class AdmBlock(nn.Module):
    def __init__(self, c_in, c_out, emb, change=None):
        super().__init__()
        self.change = change
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * c_out))
        last = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, c_out), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.in_layers[2](resampled(self.in_layers[1](self.in_layers[0](x)), self.change))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, 1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(resampled(x, self.change)) + h


class AdmAttention(nn.Module):
    """In heads of 64 channels."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(32, c)
        self.qkv, self.proj_out = nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)

    def forward(self, x, _):
        qkv = self.qkv(self.norm(x).flatten(2)).unflatten(1, (-1, 3, 64))
        return x + self.proj_out(attended(*qkv.unbind(2)).flatten(1, 2)).unflatten(2, x.shape[2:])


class Through(nn.ModuleList):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
        return x


class Adm(nn.Module):
    """Dhariwal & Nichol 2021, with the names of guided-diffusion's UNetModel: no classes, no variance, scale and shift,
    residual blocks that change the resolution. `attention_resolutions` are factors by which images are smaller."""

    def __init__(self, channels, model_channels, channel_mult, num_res_blocks, attention_resolutions):
        super().__init__()
        emb, self.half = 4 * model_channels, model_channels // 2
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        c, skips, last = model_channels, [model_channels], len(channel_mult) - 1
        self.input_blocks = nn.ModuleList([Through([nn.Conv2d(channels, c, 3, padding=1)])])
        self.output_blocks = nn.ModuleList()

        def layers(c_in, c_out, level):
            attention = [AdmAttention(c_out)] if 1 << level in attention_resolutions else []
            return [AdmBlock(c_in, c_out, emb), *attention]

        for level, multiple in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                c_in, c = c, model_channels * multiple
                self.input_blocks.append(Through(layers(c_in, c, level)))
                skips.append(c)
            if level < last:
                self.input_blocks.append(Through([AdmBlock(c, c, emb, "down")]))
                skips.append(c)
        self.middle_block = Through([AdmBlock(c, c, emb), AdmAttention(c), AdmBlock(c, c, emb)])
        for level in range(last, -1, -1):
            for i in range(num_res_blocks + 1):
                c_in, c = c + skips.pop(), model_channels * channel_mult[level]
                up = [AdmBlock(c, c, emb, "up")] if level and i == num_res_blocks else []
                self.output_blocks.append(Through(layers(c_in, c, level) + up))
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x, t, **_):
        frequencies = 1e-4 ** (torch.arange(self.half, device=t.device) / self.half)
        angles = t[:, None] * frequencies
        emb, skips = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype)), []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), emb)
        return self.out(x)
