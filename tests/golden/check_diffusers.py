"""Opens a model folder that proxyset saved: `python check_diffusers.py DIR`.

Prints what `diffusers` makes of it. If the folder also holds `check.safetensors` (`x`: NHWC, `t`, perhaps
`labels`, and our `y`), the outputs are compared, and a difference above 1e-4 of the scale fails.
"""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

folder = Path(sys.argv[1])
unet, loading = UNet2DModel.from_pretrained(folder / "unet", output_loading_info=True)
faults = {key: value for key, value in loading.items() if value}
print(f"unet: {unet.num_parameters():,} parameters; loading: {faults or 'nothing missing, nothing unexpected'}")
assert not faults
pipeline = DiffusionPipeline.from_pretrained(folder)
print(f"pipeline: {type(pipeline).__name__}, {type(pipeline.scheduler).__name__}")

check = folder / "check.safetensors"
if check.exists():
    tensors = load_file(check)
    labels = tensors["labels"].long() if "labels" in tensors else None
    with torch.no_grad():
        y = unet(tensors["x"].permute(0, 3, 1, 2), tensors["t"], class_labels=labels).sample.permute(0, 2, 3, 1)
    error = (y - tensors["y"]).abs().max() / y.abs().max()
    print(f"outputs differ by {error:.1e} of their scale")
    assert error < 1e-4
