"""Writes the golden file of training: `python training.py`, from this folder.

Ten steps of Adam with clipped gradients on a small U-Net, for noise and for v: parameters before (`before.*`) and after
(`EPSILON.after.*`), images (`x.I`, NCHW), steps (`t.I`), noise (`noise.I`), classes (`labels.I`) and losses
(`EPSILON.losses`) of each. The test holds with direct convolution (`PROXYSET_CONV=direct`) and without.
"""

import json

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

CONFIG = dict(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 6),
    layers_per_block=1,
    norm_num_groups=2,
    attention_head_dim=3,
    num_class_embeds=5,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
STEPS, BATCH, LEARNING_RATE, CLIP = 10, 16, 1e-3, 1.0

torch.manual_seed(1)
tensors = {f"before.{key}": value.clone() for key, value in UNet2DModel(**CONFIG).state_dict().items()}
for i in range(STEPS):
    tensors[f"x.{i}"] = torch.rand(BATCH, 1, 8, 8) * 2 - 1
    tensors[f"t.{i}"] = torch.randint(0, 1000, (BATCH,))
    tensors[f"noise.{i}"] = torch.randn(BATCH, 1, 8, 8)
    tensors[f"labels.{i}"] = torch.randint(0, 5, (BATCH,))
for prediction in ("epsilon", "v_prediction"):
    model = UNet2DModel(**CONFIG).train()
    model.load_state_dict({key[7:]: value for key, value in tensors.items() if key.startswith("before.")})
    scheduler = DDPMScheduler(prediction_type=prediction)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for i in range(STEPS):
        x, t, noise, labels = (tensors[f"{name}.{i}"] for name in ("x", "t", "noise", "labels"))
        target = noise if prediction == "epsilon" else scheduler.get_velocity(x, noise, t)
        output = model(scheduler.add_noise(x, noise, t), t, class_labels=labels).sample
        loss = (output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    print(prediction, [f"{loss:.4f}" for loss in losses])
    tensors[f"{prediction}.losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors |= {f"{prediction}.after.{key}": value.clone() for key, value in model.state_dict().items()}
header = {
    "config": json.dumps(dict(model.config)),
    "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
}
save_file({key: value.contiguous() for key, value in tensors.items()}, "training.safetensors", header)
