"""Writes the golden files of the wide ResNets: `python wide_resnet.py`, from this folder.

The networks are RobustBench's own classes (the `robustbench` package is read, not imported: it wants more than the
network), in double precision: `wide_resnet_trades.safetensors` holds its WideResNet, with ReLU;
`wide_resnet_deepmind.safetensors` its DMWideResNet, with SiLU and standardised images. Each file holds random
parameters and running statistics (`model.*`), images (`x`, NCHW), their `labels`, the logits by running statistics
(`logits_eval`), and of one training step on the mean cross-entropy: the logits by batch statistics
(`logits_train`), the buffers behind it (`after.*`) and the gradients of the images (`grad_x`) and of all parameters
(`grad.*`). The header says who wrote it.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

DEPTH, WIDTH, CLASSES = 10, 1, 5


def architecture(module):
    package = Path(importlib.util.find_spec("robustbench").origin).parent
    spec = importlib.util.spec_from_file_location(module, package / f"model_zoo/architectures/{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def write(name, model, size, made_by=None):
    model = model.double()
    with torch.no_grad():
        # Norms start at 1 and 0, which would hide swapped or lost numbers.
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).float())
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_((0.1 * torch.randn_like(buffer)).float())
            elif key.endswith("running_var"):
                buffer.copy_((0.5 + torch.rand_like(buffer)).float())
            elif key.endswith("num_batches_tracked"):
                buffer.fill_(41)
    state = model.state_dict()
    x = torch.rand(3, 3, size, size).double().requires_grad_()
    labels = torch.tensor([4, 0, 2])
    tensors = {f"model.{key}": value.clone() for key, value in state.items()}
    tensors |= {"x": x, "labels": labels, "logits_eval": model.eval()(x)}
    tensors["logits_train"] = model.train()(x)
    F.cross_entropy(tensors["logits_train"], labels).backward()
    tensors |= {f"after.{key}": value for key, value in model.named_buffers() if key in state}
    tensors |= {f"grad.{key}": value.grad for key, value in model.named_parameters()} | {"grad_x": x.grad}
    single = {k: v.detach().float() if v.is_floating_point() else v for k, v in tensors.items()}
    made_by = made_by or f"robustbench {importlib.metadata.version('robustbench')}"
    versions = f"torch {torch.__version__}, {made_by}"
    save_file({k: v.contiguous() for k, v in single.items()}, f"{name}.safetensors", {"versions": versions})


if __name__ == "__main__":
    # The classes pool over 8 x 8 pixels, so the images behind the last group have to be as large.
    torch.manual_seed(28)
    trades = architecture("wide_resnet").WideResNet(depth=DEPTH, num_classes=CLASSES, widen_factor=WIDTH)
    write("wide_resnet_trades", trades, 32)
    deepmind = architecture("dm_wide_resnet").DMWideResNet(
        num_classes=CLASSES, depth=DEPTH, width=WIDTH, activation_fn=nn.SiLU, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)
    )
    write("wide_resnet_deepmind", deepmind, 32)
