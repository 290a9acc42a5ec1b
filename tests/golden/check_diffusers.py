"""Opens a model folder of proxyset in `diffusers`: `python check_diffusers.py models/digits-ddpm`.

Fails if a tensor is missing, unexpected or misshapen; draws a few images with the folder's own scheduler.
Written with diffusers 0.42.1 and torch 2.11.
"""

import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel

folder = Path(sys.argv[1])
unet, loading = UNet2DModel.from_pretrained(folder / "unet", output_loading_info=True)
faults = {key: value for key, value in loading.items() if value}
print(f"unet: {unet.num_parameters():,} parameters; loading: {faults or 'nothing missing, nothing unexpected'}")
assert not faults
pipeline = DiffusionPipeline.from_pretrained(folder)
print(f"pipeline: {type(pipeline).__name__}, {type(pipeline.scheduler).__name__}")

scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
scheduler.set_timesteps(50)
classes = unet.config.num_class_embeds
labels = torch.arange(4) % classes if classes else None
images = torch.randn(4, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
with torch.no_grad():
    for t in scheduler.timesteps:
        images = scheduler.step(unet(images, t, class_labels=labels).sample, t, images).prev_sample
print(f"4 images, pixels from {images.min():.2f} to {images.max():.2f}, mean {images.mean():.2f}")
assert images.isfinite().all() and images.abs().max() <= 1.5
