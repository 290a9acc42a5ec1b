"""Writes the golden files of the U-Net, one a configuration: `python unet.py`, from this folder.

Each holds random parameters (`model.*`), an input (`x`, NCHW), the steps (`t`), perhaps `labels`, and what
`diffusers`' UNet2DModel makes of them (`y`). One also holds the gradients of mean((y - x)^2): the L2 norm of
each parameter's (`grad_norms`, sorted by name) and a few whole (`grad.*`). The header says who wrote it.
"""

import json

import diffusers
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

SMALL = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    block_out_channels=(4, 6),
    layers_per_block=1,
    norm_num_groups=2,
    attention_head_dim=None,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)

CASES = {
    # As google/ddpm-cifar10-32: one head, sines first, a shift of 1, padding on two sides only.
    "unconditional": SMALL
    | dict(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6),
    "conditional": SMALL | dict(num_class_embeds=5, attention_head_dim=4, layers_per_block=2, block_out_channels=(4, 4)),
    "scale_shift": SMALL
    | dict(resnet_time_scale_shift="scale_shift", attention_head_dim=2, mid_block_scale_factor=1.5, sample_size=[8, 4]),
    "grey": SMALL
    | dict(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        add_attention=False,
        center_input_sample=True,
    ),
    "three_levels": SMALL
    | dict(
        block_out_channels=(4, 4, 6),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attn_norm_num_groups=3,
        downsample_padding=0,
    ),
    # Wide enough for Winograd's filtering.
    "one_level": SMALL
    | dict(
        block_out_channels=(16,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=8,
        freq_shift=1,
    ),
    "attention_everywhere": SMALL
    | dict(
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=2,
        time_embedding_dim=20,
    ),
    "no_attention": SMALL
    | dict(
        num_class_embeds=6,
        resnet_time_scale_shift="scale_shift",
        block_out_channels=(8, 12),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        flip_sin_to_cos=False,
    ),
    "six_levels": SMALL
    | dict(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 4, 4, 4, 4, 4),
        down_block_types=("DownBlock2D",) * 5 + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 5,
        downsample_padding=0,
    ),
}
WITH_GRADIENTS = "conditional"

for name, config in CASES.items():
    torch.manual_seed(sum(name.encode()))
    model = UNet2DModel(**config).eval()
    with torch.no_grad():
        # Norms start at 1 and 0, which would hide swapped or lost parameters.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    height, width = config["sample_size"] if isinstance(config["sample_size"], list) else [config["sample_size"]] * 2
    x = torch.randn(2, config["in_channels"], height, width)
    t = torch.tensor([3.0, 977.0])
    labels = torch.tensor([4, 1]) if "num_class_embeds" in config else None
    y = model(x, t, class_labels=labels).sample

    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {"x": x, "t": t, "y": y.detach()}
    if labels is not None:
        tensors["labels"] = labels
    if name == WITH_GRADIENTS:
        (y - x).square().mean().backward()
        gradients = {key: value.grad for key, value in sorted(model.named_parameters())}
        tensors["grad_norms"] = torch.stack([g.norm() for g in gradients.values()])
        for key in ("conv_in.weight", "class_embedding.weight", "mid_block.attentions.0.to_k.weight", "conv_norm_out.weight"):
            tensors[f"grad.{key}"] = gradients[key]
    header = {
        "config": json.dumps(dict(model.config)),
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, f"unet_{name}.safetensors", header)
