"""Writes checkpoints/: one small ResNet as people keep it, in the forms of `FORMS`: `python checkpoints.py`, from here.

Written with torch 2.15.0, diffusers 0.42.1 and numpy 2.4.6. `expected.safetensors` has images (`x`, NCHW) and for each
file the logits that PyTorch gives for them with the numbers that are in it. unet/ is a UNet2DModel as diffusers used to
save them, and `unet` what it makes of the first channel of `x` at step 17.
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy
import torch
from diffusers import UNet2DModel
from resnet import ResNet, randomise
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

MEAN, STD = (0.5, 0.25, 0.75), (0.5, 0.25, 0.125)


class Normalize(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer(mean, torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer(std, torch.tensor(STD).view(1, 3, 1, 1))
        self.names = mean, std

    def forward(self, x):
        return (x - getattr(self, self.names[0])) / getattr(self, self.names[1])


class Wrapped(nn.Module):
    """A network with the standardisation of its images beside it."""

    def __init__(self, model):
        super().__init__()
        self.normalize, self.model = Normalize("mean", "std"), model

    def forward(self, x):
        return self.model(self.normalize(x))


def small():
    model = ResNet(widths=(4, 6), blocks=(1, 1)).double()
    randomise(model)
    return model.float().eval()


def trained(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])
    model.train()(torch.rand(4, 3, 8, 8)).logsumexp(1).mean().backward()
    optimizer.step()
    scheduler.step()
    model.eval()
    return {
        "epoch": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng_states": {"cpu": torch.get_rng_state()[:16].clone()},
        "best": numpy.float64(0.5),
        "args": argparse.Namespace(lr=1e-3, out=Path("runs"), seen={1, 2}),
    }


def channels_last(model):
    return model.to(memory_format=torch.channels_last)


def counters(state, change):
    return OrderedDict((k, change(v) if k.endswith("num_batches_tracked") else v) for k, v in state.items())


# Each: the network, what is saved of it, and how.
FORMS = {
    "zip": (small(), lambda m: m.state_dict(), {}),
    "legacy": (small(), lambda m: m.state_dict(), {"_use_new_zipfile_serialization": False}),
    "protocol-4": (small(), lambda m: dict(m.state_dict()), {"pickle_protocol": 4}),
    "nested": (small(), lambda m: {"epoch": 7, "net": {"state_dict": m.state_dict()}, "acc": 93.2}, {}),
    "prefixed": (Wrapped(small()), lambda m: {"model." + k: v for k, v in m.model.state_dict().items()}, {}),
    "ddp": (nn.DataParallel(small()), lambda m: {"state_dict": m.state_dict()}, {}),
    "compiled": (torch.compile(small()), lambda m: m.state_dict(), {}),
    "swa": (AveragedModel(torch.compile(small())), lambda m: m.state_dict(), {}),
    "f16": (small().half(), lambda m: m.state_dict(), {}),
    "f64": (small().double(), lambda m: m.state_dict(), {}),
    "optimizer": (small(), trained, {}),
    "normalized": (Wrapped(small()), lambda m: m.state_dict(), {}),
    "normalized-sequential": (
        nn.DataParallel(nn.Sequential(Normalize("mu", "sigma"), small())), lambda m: m.state_dict(), {}),
    "uncounted": (
        small(), lambda m: {k: v for k, v in m.state_dict().items() if not k.endswith("num_batches_tracked")}, {}),
    "float-counters": (small(), lambda m: counters(m.state_dict(), torch.Tensor.float), {}),
    "channels-last": (channels_last(small()), lambda m: {k: nn.Parameter(v) if v.is_floating_point() else v
                                                         for k, v in m.state_dict().items()}, {}),
}  # fmt: skip

torch.manual_seed(20)
x = torch.rand(3, 3, 8, 8)
expected = {"x": x}
Path("checkpoints").mkdir(exist_ok=True)
for name, (model, saved, options) in FORMS.items():
    torch.save(saved(model), f"checkpoints/{name}.pt", **options)
    plain = getattr(model, "module", model)
    plain = getattr(plain, "_orig_mod", plain)
    plain = plain.model if name == "prefixed" else plain
    with torch.no_grad():
        expected[name] = plain.double().eval()(x.double()).float()
unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
).eval()  # fmt: skip
unet.save_pretrained("checkpoints/unet", safe_serialization=False)
with torch.no_grad():
    expected["unet"] = unet.double()(x[:, :1].double(), 17).sample.float()
save_file(expected, "checkpoints/expected.safetensors", {"versions": f"torch {torch.__version__}, numpy {numpy.__version__}"})
