"""Makes clip/ and dinov2/: small networks of transformers with random weights, as they are saved, and their features.

    python extractors.py        # transformers 5.23.0, torch 2.11.0, safetensors 0.8.0

images: (n, h, w, c) in [0, 1]; features: what the network pools for them, resized bilinearly to its side and normalised.
With an argument, a folder, a ResNet-18 of random weights is written there too (45 MB, so not kept).
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

HERE = Path(__file__).parent
CLIP = [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
IMAGENET = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]


def write(folder, model, side, constants, channels):
    model.eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            low = 0.5 if "running_var" in name or "norm" in name and name.endswith("weight") else None
            with torch.no_grad():
                tensor.uniform_(low, 1.5) if low else tensor.normal_(0, 0.5 / max(1, tensor[0].numel()) ** 0.5)
    model.save_pretrained(folder)
    images = torch.rand(3, 16, 16, channels)
    x = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    x = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in constants)
    with torch.no_grad():
        features = model((x - mean) / std).pooler_output.flatten(1)
    save_file({"images": images, "features": features.contiguous()}, Path(folder) / "io.safetensors")


torch.manual_seed(0)
clip = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)
write(HERE / "clip", CLIPVisionModel(clip), 32, CLIP, 3)
dino = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)
write(HERE / "dinov2", Dinov2Model(dino), 518, IMAGENET, 1)
if len(sys.argv) > 1:
    resnet = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    write(Path(sys.argv[1]), ResNetModel(resnet), 224, IMAGENET, 3)
