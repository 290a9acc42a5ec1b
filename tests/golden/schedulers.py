"""Writes the golden files of the multistep, ancestral and stochastic samplers: `python schedulers.py EDM`, from this
folder, with EDM a checkout of the public code of Karras et al. 2022 (its generate.py has the stochastic sampler).

`schedulers.safetensors` has noise (`noise`, NCHW), the noise of each step (`fresh.0`, …) and, for each case, the images
that diffusers' scheduler makes of it with the U-Net in `diffusers_model`: the name of the tensor is the case as JSON.
`timesteps.json` has, for each way of placing steps, a hash of all steps of `set_timesteps(1)` to `set_timesteps(1000)` and the
counts at which diffusers makes one step too many. Written with the versions in the files' headers.
"""

import ast
import json
import sys
import warnings

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import save_file

warnings.simplefilter("ignore")
torch.manual_seed(1)
SIZE, BATCH, FRESH = 8, 2, 51
model = UNet2DModel.from_pretrained("diffusers_model", subfolder="unet").eval()
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "sde-dpm-solver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
}
SPACINGS = ("leading", "trailing", "linspace")


def cases():
    for steps in (3, 10, 27, 48, 50):
        for spacing in SPACINGS:
            of = dict(steps=steps, timestep_spacing=spacing)
            yield dict(kind="pndm", skip_prk_steps=True, **of)
            if steps > 3:
                yield dict(kind="pndm", **of)
            yield dict(kind="unipc", **of)
            yield dict(kind="euler-ancestral", **of)
            yield dict(kind="sde-dpm-solver++", algorithm_type="sde-dpmsolver++", **of)
    for spacing in ("trailing", "linspace"):
        for kind in ("ddpm", "ddim", "dpm-solver++", "euler", "heun"):
            for steps in (27, 48):
                yield dict(kind=kind, steps=steps, timestep_spacing=spacing)
    for order in (1, 3):
        yield dict(kind="unipc", steps=10, solver_order=order)
    yield dict(kind="unipc", steps=10, use_karras_sigmas=True)
    yield dict(kind="sde-dpm-solver++", steps=10, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
    yield dict(kind="pndm", steps=10, skip_prk_steps=True, set_alpha_to_one=True, steps_offset=1)
    for kind in ("pndm", "unipc", "euler-ancestral"):
        yield dict(kind=kind, steps=10, prediction_type="v_prediction")
    for kind in ("ddpm", "ddim", "dpm-solver++", "unipc", "euler", "euler-ancestral"):
        for spacing in ("trailing", "leading"):
            yield dict(kind=kind, steps=10, prediction_type="v_prediction", rescale_betas_zero_snr=True,
                       timestep_spacing=spacing)
    yield dict(kind="ddpm", steps=10, beta_schedule="sigmoid")
    for variance in ("learned", "learned_range"):
        for spacing in ("leading", "trailing"):
            yield dict(kind="ddpm", steps=10, variance_type=variance, timestep_spacing=spacing)


def predicted(x, t, case):
    """The output of the network; where a variance is learned, one made of the image stands in for it."""
    output = model(x, t).sample
    variance = case.get("variance_type")
    if variance:
        share = torch.sin(3 * x)
        output = torch.cat([output, share if variance == "learned_range" else 1e-3 * (1.5 + share)], 1)
    return output


def sample(case, noise, fresh):
    options = {key: value for key, value in case.items() if key not in ("kind", "steps")}
    scheduler = SCHEDULERS[case["kind"]](**options)
    scheduler.set_timesteps(case["steps"])
    x = noise * scheduler.init_noise_sigma
    calls = iter(range(1000))
    for module in ("ddpm", "euler_ancestral_discrete", "dpmsolver_multistep"):
        module = getattr(diffusers.schedulers, f"scheduling_{module}")
        module.randn_tensor = lambda *_, **__: fresh[next(calls)]
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(predicted(scheduler.scale_model_input(x, t), t, case), t, x).prev_sample
    return x


def edm_sampler(path):
    """The function of this name in EDM's generate.py, whose imports it does not need."""
    tree = ast.parse(open(f"{path}/generate.py").read())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "edm_sampler"]
    names = dict(np=np, torch=torch)
    exec(compile(ast.Module(found, []), "generate.py", "exec"), names)
    return names["edm_sampler"]


class Edm:
    """The U-Net under EDM's preconditioning, in float32 as there."""

    sigma_min, sigma_max = 0, float("inf")
    round_sigma = staticmethod(torch.as_tensor)

    def __call__(self, x, sigma, _):
        x, sigma, data = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1), 0.5
        total = (sigma**2 + data**2).sqrt()
        output = model(x / total, (sigma.log() / 4).flatten()).sample
        return data**2 / total**2 * x + sigma * data / total * output


def edm_cases():
    for steps in (3, 10, 18):
        yield dict(kind="edm", steps=steps, S_churn=0)
        yield dict(kind="edm", steps=steps, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003)
    yield dict(kind="edm", steps=10, S_churn=2, S_noise=1.2)


def fnv(hash, values):
    for byte in np.asarray(values, np.float32).tobytes():
        hash = (hash ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return hash


def timesteps():
    for kind in ("ddim", "dpm-solver++", "euler"):
        for spacing in SPACINGS:
            scheduler, hash, surplus = SCHEDULERS[kind](timestep_spacing=spacing), 0xCBF29CE484222325, []
            for n in range(1, 1001):
                try:
                    scheduler.set_timesteps(n)
                except IndexError:
                    continue
                steps = scheduler.timesteps.numpy()
                if len(steps) > n:
                    surplus.append(n)
                elif (np.diff(steps) < 0).all():
                    hash = fnv(hash, steps)
            yield f"{kind} {spacing}", dict(fnv=f"{hash:016x}", one_too_many=surplus)


tensors = {f"fresh.{i}": torch.randn(BATCH, 1, SIZE, SIZE) for i in range(FRESH)}
fresh = [tensors[f"fresh.{i}"] for i in range(FRESH)]
tensors["noise"] = torch.randn(BATCH, 1, SIZE, SIZE)
for case in cases():
    tensors[json.dumps(case)] = sample(case, tensors["noise"], fresh)
sampler = edm_sampler(sys.argv[1])
for case in edm_cases():
    options = {key: value for key, value in case.items() if key not in ("kind", "steps")}
    calls = iter(range(1000))
    images = sampler(Edm(), tensors["noise"], randn_like=lambda _: fresh[next(calls)], num_steps=case["steps"], **options)
    tensors[json.dumps(case)] = images.to(torch.float32)
for name, images in tensors.items():
    assert images.isfinite().all(), name
    print(name, f"{images.abs().max():.2f}")
versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, numpy {np.__version__}"
save_file({key: value.contiguous() for key, value in tensors.items()}, "schedulers.safetensors", {"versions": versions})
json.dump(dict(versions=versions, **dict(timesteps())), open("timesteps.json", "w"), indent=1)
