"""Writes the golden files of the samplers: `python loops.py`, from this folder.

`diffusers_model/` is a small U-Net, trained here for seconds, as `save_pretrained` writes it. `loops.safetensors` holds
noise (`noise`, NCHW), the noise of each step (`fresh.0`, …) and, for each case, the images that diffusers' scheduler
makes of it: the name of the tensor is the case as JSON. Written with the versions in the file's header.
"""

import json

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import save_file

torch.manual_seed(0)
SIZE, BATCH = 8, 4
model = UNet2DModel(
    sample_size=SIZE,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "edm": EDMEulerScheduler,
}


def shapes(n):
    """Bright discs on a dark ground."""
    centre, radius = 2 + 4 * torch.rand(n, 2, 1, 1), 1 + 2 * torch.rand(n, 1, 1)
    grid = torch.arange(SIZE) + 0.5
    distance = ((grid[:, None] - centre[:, 0]) ** 2 + (grid[None] - centre[:, 1]) ** 2).sqrt()
    return torch.tanh(2 * (radius - distance))[:, None]


def train():
    scheduler = DDPMScheduler()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(1000):
        x, t = shapes(64), torch.randint(0, 1000, (64,))
        noise = torch.randn_like(x)
        loss = (model(scheduler.add_noise(x, noise, t), t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"last loss {loss.item():.3f}")


def cases():
    for steps in (10, 25):
        for spacing in ("leading", "trailing", "linspace"):
            for kind in ("ddpm", "ddim", "dpm-solver++", "euler", "heun"):
                yield dict(kind=kind, steps=steps, timestep_spacing=spacing)
        for kind in ("dpm-solver++", "euler", "heun"):
            yield dict(kind=kind, steps=steps, timestep_spacing="linspace", use_karras_sigmas=True)
        for kind, prediction in (("ddim", "sample"), ("euler", "v_prediction"), ("dpm-solver++", "v_prediction")):
            yield dict(kind=kind, steps=steps, timestep_spacing="leading", prediction_type=prediction)
        yield dict(kind="edm", steps=steps)
    yield dict(kind="ddim", steps=10, timestep_spacing="leading", eta=0.7)
    yield dict(kind="ddim", steps=30, timestep_spacing="trailing", set_alpha_to_one=False, steps_offset=1)
    yield dict(kind="ddpm", steps=10, timestep_spacing="leading", variance_type="fixed_large", beta_schedule="squaredcos_cap_v2")
    yield dict(kind="dpm-solver++", steps=10, timestep_spacing="leading", beta_schedule="scaled_linear")


def sample(case, noise, fresh):
    options = {key: value for key, value in case.items() if key not in ("kind", "steps", "eta")}
    scheduler = SCHEDULERS[case["kind"]](**options)
    scheduler.set_timesteps(case["steps"])
    x = noise * scheduler.init_noise_sigma
    # DDPM's step draws its noise itself.
    calls = iter(range(1000))
    diffusers.schedulers.scheduling_ddpm.randn_tensor = lambda *_, **__: fresh[next(calls)]
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            options = {}
            if case.get("eta"):
                options = dict(eta=case["eta"], variance_noise=fresh[i])
            output = model(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x, **options).prev_sample
    return x


train()
DDPMPipeline(model.eval(), DDPMScheduler()).save_pretrained("diffusers_model")
tensors = {f"fresh.{i}": torch.randn(BATCH, 1, SIZE, SIZE) for i in range(25)}
fresh = [tensors[f"fresh.{i}"] for i in range(25)]
tensors["noise"] = torch.randn(BATCH, 1, SIZE, SIZE)
for case in cases():
    tensors[json.dumps(case)] = sample(case, tensors["noise"], fresh)
    print(json.dumps(case), f"{tensors[json.dumps(case)].abs().max():.2f}")
header = {"versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}"}
save_file({key: value.contiguous() for key, value in tensors.items()}, "loops.safetensors", header)
