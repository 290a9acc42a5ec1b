"""The same noise, the same images: `python check_samples.py PROXYSET MODEL…` runs proxyset and diffusers on model folders.

Fails if an image differs by more than 1e-3. An unconditional model goes through diffusers' own pipeline, a conditional
one through UNet2DModel and a loop. Written with diffusers 0.42.1 and torch 2.11.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

COUNT, TOLERANCE = 20, 1e-3
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
}


def ours(proxyset, model, kind, steps, noise, scratch):
    save_file({"noise": noise}, scratch / "noise.safetensors")
    out = scratch / f"{kind}-{steps}"
    command = [proxyset, "generate", "--model", model, "--count", str(len(noise)), "--out", out]
    command += ["--sampler", kind, "--steps", str(steps), "--micro-batch", "16", "--shard-rows", "16"]
    command += ["--initial-noise", scratch / "noise.safetensors", "--save-float", out / "images.safetensors"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return load_file(out / "images.safetensors")["images"]


def theirs(model, kind, steps, noise, generator):
    unet = UNet2DModel.from_pretrained(model / "unet").eval()
    trained = DDPMScheduler.from_pretrained(model / "scheduler")
    scheduler = SCHEDULERS[kind].from_config(trained.config)
    classes = unet.config.num_class_embeds
    if not classes and kind == "ddim":
        pipeline = DDPMPipeline(unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(batch_size=len(noise), generator=generator, num_inference_steps=steps, output_type="np").images
        return "pipeline", torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    labels = torch.arange(len(noise)) % classes if classes else None
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
            x = scheduler.step(output, t, x).prev_sample
    return "loop", x


proxyset, worst = sys.argv[1], 0
for model in map(Path, sys.argv[2:]):
    unet = UNet2DModel.load_config(model / "unet")
    shape = (COUNT, unet["in_channels"], unet["sample_size"], unet["sample_size"])
    for kind in SCHEDULERS:
        for steps in (10, 25):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(steps))
            with tempfile.TemporaryDirectory() as scratch:
                found = ours(proxyset, model, kind, steps, noise, Path(scratch))
            # The pipeline draws the same noise, and clips what it returns.
            by, expected = theirs(model, kind, steps, noise, torch.Generator().manual_seed(steps))
            if by == "pipeline":
                found = found.clamp(-1, 1)
            error = (found - expected).abs().max().item()
            worst = max(worst, error)
            print(f"{model.name}, {kind}, {steps} steps, by {by}: largest difference {error:.1e}")
assert worst <= TOLERANCE, worst
