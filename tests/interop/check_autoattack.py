"""Our attacks beside the reference AutoAttack, on the same weights and images:

    python check_autoattack.py PROXYSET DATA OUT COUNT NORM EPSILON MODEL [MODEL …]

DATA is a folder of Hugging Face Parquet whose first COUNT test images are attacked; a MODEL is a folder of a small-cnn
that proxyset trained. Each attack runs by itself on all images that are answered rightly, then the ensembles do, here
and there. Prints a table of robust accuracies and fails if an attack differs by more than one percentage point, or an
ensemble by more than half a one. Our adversarial images are judged by PyTorch too.
"""

import importlib.metadata
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pyarrow.parquet
import torch
from PIL import Image
from pyautoattack import AutoAttack
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

ATTACKS = ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
VERSIONS = {"autoattack": "standard", "autoattack-plus": "plus"}
proxyset, data, out, count, norm, epsilon, *models = sys.argv[1:]
count = int(count)
radius = float(epsilon.split("/")[0]) / float((epsilon + "/1").split("/")[1])


class SmallCnn(nn.Module):
    """`arch: small_cnn`: convolutions, each with group norm and SiLU, then the mean and a linear layer."""

    def __init__(self, config):
        super().__init__()
        channels, groups = config["channels"], config["groups"]

        def layer(c_in, c_out, stride):
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            return nn.ModuleDict({"conv": conv, "norm": nn.GroupNorm(groups, c_out)})

        self.stem = layer(config["in_channels"], channels[0], 1)
        self.stages = nn.ModuleList()
        for i, c_out in enumerate(channels):
            c_in, stride = (channels[i - 1], 2) if i > 0 else (c_out, 1)
            self.stages.append(nn.ModuleList([layer(c_in, c_out, stride), layer(c_out, c_out, 1)]))
        self.fc = nn.Linear(channels[-1], config["num_classes"])

    def forward(self, x):
        x = 2 * x - 1
        for layer in [self.stem, *(layer for stage in self.stages for layer in stage)]:
            x = F.silu(layer["norm"](layer["conv"](x)))
        return self.fc(x.mean((2, 3)))


def images():
    pixels, labels = [], []
    for path in sorted(Path(data).rglob("test-*.parquet")):
        table = pyarrow.parquet.read_table(path).to_pylist()
        for row in table:
            cell = row.get("image") or row["img"]
            image = numpy.asarray(Image.open(io.BytesIO(cell["bytes"])), dtype=numpy.float32) / 255
            pixels.append(image[None] if image.ndim == 2 else image.transpose(2, 0, 1))
            labels.append(row["label"])
    return torch.tensor(numpy.stack(pixels[:count])), torch.tensor(labels[:count])


def ours(model, attack):
    """The record of our evaluation, and its seconds."""
    folder = Path(out) / f"{Path(model).name}-{norm}-{attack}"
    subprocess.run(
        [proxyset, "evaluate", "--model", model, "--data", data, "--first", str(count), "--norm", norm, "--epsilon",
         epsilon, "--attack", attack, "--save-adversarial", "true", "--out", str(folder), "--quiet"],
        check=True, stdout=subprocess.DEVNULL,
    )
    return json.loads((folder / "metrics.json").read_text()), load_file(folder / "adversarial.safetensors")["images"]


x, y = images()
print(f"{count} images, {norm} {epsilon}; pyautoattack {importlib.metadata.version('pyautoattack')}, "
      f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
print("| model | attack | ours | reference | difference, points | ours, s | reference, s |")
print("|---|---|---|---|---|---|---|")
failed = False
for folder in models:
    network = SmallCnn(json.loads((Path(folder) / "config.json").read_text()))
    network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    network = network.eval().to(memory_format=torch.channels_last)
    for attack in [*ATTACKS, *VERSIONS]:
        record, adversarial = ours(folder, attack)
        ensemble = attack in VERSIONS
        version = {"version": VERSIONS[attack]} if ensemble else {"version": "custom", "attacks": [attack]}
        reference = AutoAttack(network, norm={"linf": "Linf", "l2": "L2"}[norm], eps=radius, seed=0, device="cpu",
                               **version)
        reference.verbose = False
        if not ensemble:
            reference.apgd.n_restarts = reference.apgd_targeted.n_restarts = 1
            reference.fab.n_restarts = 5 if attack == "fab" else 1
            reference.fab.n_target_classes = reference.apgd_targeted.n_target_classes = 9
            reference.square.n_queries = 5000
        started = time.time()
        found, _ = reference.run_standard_evaluation(x, y, batch_size=250)
        seconds = time.time() - started
        with torch.no_grad():
            standing = (network(found).argmax(1) == y).sum().item() / count
            ours_there = (network(adversarial).argmax(1) == y).sum().item() / count
        difference = 100 * (record["robust_accuracy"] - standing)
        allowed = 0.5 if ensemble else 1.0
        failed |= abs(difference) > allowed + 1e-6 or abs(ours_there - record["robust_accuracy"]) > 0.002
        print(f"| {Path(folder).name} | {attack} | {record['robust_accuracy']:.3f} | {standing:.3f} | {difference:+.1f} "
              f"| {record['seconds']:.1f} | {seconds:.1f} |", flush=True)
    print(f"| {Path(folder).name} | none | {record['clean_accuracy']:.3f} "
          f"| {(network(x).argmax(1) == y).sum().item() / count:.3f} | | | |")
sys.exit(failed)
