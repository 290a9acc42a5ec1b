"""Writes the golden files of ADM's and EDM's networks: `python denoisers.py EDM GUIDED IMPROVED`, from this folder.

The arguments are checkouts of NVlabs/edm, openai/guided-diffusion and openai/improved-diffusion. The parameters are
made by `fill`, here and in the test, and not kept. Each file holds an input (`x`, NCHW), noise levels (`t`), perhaps
`labels`, what the network makes of them (`y`), and of the gradients of mean(y^2) that to `x` (`grad_x`), and for each
parameter, sorted by name, the norm (`grad_norms`) and the product with the parameter (`grad_dots`). The header has class,
arguments, and names and shapes of the state dict. edm_training.safetensors has ten steps of Adam with clipped gradients
on EDM's loss: images (`x.I`), noise levels (`sigma.I`), noise (`noise.I`), classes (`labels.I`), `losses`, and the
parameters afterwards (`after.*`).
"""

import json
import sys

import numpy as np
import torch
from safetensors.torch import save_file

sys.path[:0] = sys.argv[1:4]
from guided_diffusion.unet import UNetModel
from improved_diffusion.unet import UNetModel as ImprovedUNetModel
from training.networks import DhariwalUNet, EDMPrecond, SongUNet

ADM = dict(image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1)
EDM = dict(img_resolution=8, in_channels=3, out_channels=3, num_blocks=1, dropout=0.0)
SONG = EDM | dict(model_channels=8, channel_mult=[1, 2])
NCSNPP = dict(
    embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1], label_dim=4
)

CASES = {
    # As guided-diffusion's 64 x 64.
    "adm_guided": (
        UNetModel,
        ADM
        | dict(
            out_channels=6,
            channel_mult=(1, 2),
            attention_resolutions=(2,),
            num_classes=5,
            num_head_channels=16,
            use_scale_shift_norm=True,
            resblock_updown=True,
            use_new_attention_order=True,
        ),
    ),
    # As improved-diffusion's 64 x 64.
    "adm_improved": (
        ImprovedUNetModel,
        ADM
        | dict(
            out_channels=6,
            channel_mult=(1, 2, 2),
            attention_resolutions=(2, 4),
            num_heads=4,
            use_scale_shift_norm=True,
        ),
    ),
    "adm_added": (
        UNetModel,
        ADM
        | dict(
            model_channels=64,
            channel_mult=(0.5, 1),
            attention_resolutions=(1,),
            num_heads=2,
            num_heads_upsample=4,
            resblock_updown=True,
        ),
    ),
    "adm_pooled": (
        UNetModel,
        ADM
        | dict(
            in_channels=1,
            out_channels=1,
            num_res_blocks=2,
            channel_mult=(1, 1),
            attention_resolutions=(),
            num_classes=3,
            conv_resample=False,
        ),
    ),
    "song_ddpmpp": (SongUNet, SONG | dict(num_blocks=2, attn_resolutions=[4], augment_dim=9)),
    "song_ncsnpp": (SongUNet, SONG | NCSNPP | dict(attn_resolutions=[8])),
    "song_skip": (
        SongUNet,
        SONG
        | dict(
            channel_mult=[1, 2, 2],
            attn_resolutions=[],
            label_dim=3,
            encoder_type="skip",
            decoder_type="skip",
            resample_filter=[1, 3, 3, 1],
        ),
    ),
    "dhariwal": (
        DhariwalUNet,
        EDM | dict(model_channels=32, channel_mult=[1, 4], attn_resolutions=[4], label_dim=3, augment_dim=9),
    ),
}
STEPS, BATCH, LEARNING_RATE, CLIP, SIGMA_DATA = 10, 8, 1e-3, 1.0, 0.5


def fill(model):
    """Pseudo-random parameters (SplitMix64): nothing is 0, as the originals begin."""
    drawn = 0
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("resample_filter"):
            continue
        z = np.arange(drawn + 1, drawn + tensor.numel() + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        drawn += tensor.numel()
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        u = (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)
        if name.endswith("freqs"):
            u *= np.float32(4)
        elif tensor.dim() == 1:
            u = u * np.float32(0.5) + np.float32(name.endswith("weight"))
        else:
            u *= np.float32((12 / (tensor.numel() // len(tensor))) ** 0.5)
        tensor.copy_(torch.from_numpy(u).reshape(tensor.shape))


def header(class_name, config, model):
    return {
        "class": class_name,
        "config": json.dumps(config),
        "shapes": json.dumps({key: list(value.shape) for key, value in model.state_dict().items()}),
        "versions": f"torch {torch.__version__}",
    }


def labels_of(config, n):
    classes = config.get("num_classes") or config.get("label_dim")
    return torch.randint(0, classes, (n,)) if classes else None


def one_hot(labels, config):
    return None if labels is None else torch.nn.functional.one_hot(labels, config["label_dim"]).float()


for name, (network, config) in CASES.items():
    torch.manual_seed(sum(name.encode()))
    adm = name.startswith("adm")
    arguments = {key: value for key, value in config.items() if not (network is ImprovedUNetModel and key == "image_size")}
    model = network(**arguments).eval()
    with torch.no_grad():
        fill(model)
    x = torch.randn(2, config["in_channels"], 8, 8, requires_grad=True)
    t = torch.tensor([3.0, 977.0]) if adm else torch.tensor([0.002, 50.0]).log() / 4
    labels = labels_of(config, 2)
    y = model(x, t, labels) if adm else model(x, t, one_hot(labels, config))
    y.square().mean().backward()
    parameters = [value for _, value in sorted(model.named_parameters())]
    gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
    tensors = {
        "x": x.detach(),
        "t": t,
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_norms": torch.stack([gradient.norm() for gradient in gradients]),
        "grad_dots": torch.stack([(g * p).sum() for g, p in zip(gradients, parameters)]).detach(),
    }
    if labels is not None:
        tensors["labels"] = labels
    print(name, sum(p.numel() for p in parameters), f"{y.abs().max():.3f}")
    class_name = network.__name__
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{name}.safetensors", header(class_name, config, model))

torch.manual_seed(2)
config = SONG | NCSNPP | dict(in_channels=1, out_channels=1, model_channels=4, attn_resolutions=[4])
shared = {key: value for key, value in config.items() if key not in ("in_channels", "out_channels")}
precond = EDMPrecond(img_channels=1, model_type="SongUNet", sigma_data=SIGMA_DATA, **shared).train()
with torch.no_grad():
    fill(precond.model)
tensors = {}
optimizer = torch.optim.Adam(precond.parameters(), lr=LEARNING_RATE)
losses = []
for i in range(STEPS):
    x, noise = torch.rand(BATCH, 1, 8, 8) * 2 - 1, torch.randn(BATCH, 1, 8, 8)
    # P_mean and P_std of EDM's loss.
    sigma, labels = (torch.randn(BATCH, 1, 1, 1) * 1.2 - 1.2).exp(), labels_of(config, BATCH)
    tensors |= {f"x.{i}": x, f"noise.{i}": noise, f"sigma.{i}": sigma.flatten(), f"labels.{i}": labels}
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    loss = (weight * (precond(x + sigma * noise, sigma, one_hot(labels, config)) - x) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(precond.parameters(), CLIP)
    optimizer.step()
    losses.append(loss.item())
print([f"{loss:.4f}" for loss in losses])
tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
tensors |= {f"after.{key}": value.clone() for key, value in precond.model.state_dict().items()}
save_file(
    {k: v.contiguous() for k, v in tensors.items()}, "edm_training.safetensors", header("SongUNet", config, precond.model)
)
