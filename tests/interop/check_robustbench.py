"""Logits of RobustBench's and torchvision's own networks and ours: `python check_robustbench.py PROXYSET OUT`.

ResNet-18 and 50 of both, two PreActResNet-18, WRN-28-10 and DMWideResNet-28-10 with SiLU, with random weights and running
statistics: each is saved as a classifier's folder with the names that its tensors have there, and answers 16 random images
here and there. Fails if a logit differs by more than 1e-4, or the number of parameters does. (The `robustbench` package is
read, not imported: it wants more than its networks.)
"""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pyarrow
import torch
import torchvision
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file
from torch import nn

proxyset, out = sys.argv[1], Path(sys.argv[2])
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]


def architecture(module):
    package = Path(importlib.util.find_spec("robustbench").origin).parent
    spec = importlib.util.spec_from_file_location(module, package / f"model_zoo/architectures/{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def networks():
    resnet = architecture("resnet")
    yield "resnet-18", resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2]), {"arch": "resnet", "pool": 4}
    bottleneck = {"block": "bottleneck", "blocks": [3, 4, 6, 3]}
    yield "resnet-50", resnet.ResNet(resnet.Bottleneck, [3, 4, 6, 3]), {"arch": "resnet", "pool": 4} | bottleneck
    preact = {"arch": "resnet", "pool": 4}
    wong = resnet.PreActResNet(resnet.PreActBlock, [2, 2, 2, 2])
    yield "preactresnet-18-wong", wong, preact | {"block": "preactivation-raw"}
    rice = resnet.PreActResNet(resnet.PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True)
    yield "preactresnet-18-rice", rice, preact | {"block": "preactivation", "final_norm": True}
    imagenet = {"arch": "resnet", "stem": "imagenet", "layout": "torchvision"}
    yield "torchvision-resnet-18", torchvision.models.resnet18(num_classes=10), imagenet
    yield "torchvision-resnet-50", torchvision.models.resnet50(num_classes=10), imagenet | bottleneck
    wide = {"arch": "wide_resnet", "depth": 28, "width": 10}
    yield "wrn-28-10", architecture("wide_resnet").WideResNet(28, 10, 10), wide
    deepmind = architecture("dm_wide_resnet").DMWideResNet(10, 28, 10, nn.SiLU, MEAN, STD)
    more = {"layout": "deepmind", "activation": "silu", "standardize": {"mean": MEAN, "std": STD}}
    yield "wrn-28-10-silu", deepmind, wide | more


def write_images(folder):
    """16 random images as Parquet; returns them as a tensor."""
    pixels = numpy.random.default_rng(5).integers(0, 256, (16, 32, 32, 3), dtype=numpy.uint8)
    cells = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    labels = {"_type": "ClassLabel", "names": NAMES}
    features = {"image": {"_type": "Image"}, "label": labels}
    table = pyarrow.table(
        {"image": pyarrow.array(cells, kind), "label": pyarrow.array([i % 10 for i in range(16)], pyarrow.int64())}
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255


x = write_images(out / "images")
print("| network | parameters | largest difference of a logit | largest logit |")
print("|---|---|---|---|")
failed = False
for name, network, config in networks():
    torch.manual_seed(7)
    with torch.no_grad():
        for key, buffer in network.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
            elif key.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors")
    config |= {"in_channels": 3, "image_size": 32, "num_classes": 10, "class_names": NAMES}
    (folder / "config.json").write_text(json.dumps(config))
    subprocess.run(
        [proxyset, "evaluate", "--model", str(folder), "--data", str(out / "images"), "--attack", "none", "--out",
         str(out / f"{name}-logits"), "--quiet"],
        check=True, stdout=subprocess.DEVNULL,
    )
    ours = torch.tensor(parquet.read_table(out / f"{name}-logits" / "images.parquet")["clean_logits"].to_pylist())
    with torch.no_grad():
        theirs = network.eval()(x)
    difference, parameters = (ours - theirs).abs().max().item(), sum(p.numel() for p in network.parameters())
    failed |= difference > 1e-4
    print(f"| {name} | {parameters:,} | {difference:.1e} | {theirs.abs().max().item():.2f} |", flush=True)
sys.exit(failed)
