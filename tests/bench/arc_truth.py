"""ARC against known truths: `python arc_truth.py PROXYSET OUT [HALVINGS]`.

- Gaussian images of 8 x 8 grey pixels, N(m, s^2 I) against N(0, s^2 I) around mid-grey, s = 0.05, |m| = 0.2: trained
  discriminators against the closed form s (a (Phi(a) - 1/2) + phi(a) - phi(0)), a = |m| / 2 s, in l2.
- Two images at distance 0.4 in l2: ARC = 0.1.
- HALVINGS (20) random halvings of the digits, one half taken for synthetic: how often the signed interval holds 0.

Needs numpy, pillow and pyarrow.
"""

import io
import json
import sys
from math import erf, exp, pi, sqrt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from command import run

proxyset, out = sys.argv[1], Path(sys.argv[2])
halvings = int(sys.argv[3]) if len(sys.argv) > 3 else 20
out.mkdir(parents=True, exist_ok=True)


def arc(name, real, synthetic, *settings):
    folder = out / name
    if not folder.exists():
        for kind, (images, labels) in {"real": real, "synthetic": synthetic}.items():
            np.savez(out / f"{name}-{kind}.npz", image=images, label=labels)
    flags = [flag for setting in settings for flag in ("--set", setting)]
    run(proxyset, "arc", "--real", out / f"{name}-real.npz", "--synthetic", out / f"{name}-synthetic.npz", "--out", folder,
        *flags)
    # Another version's may lie beside it.
    newest = max(folder.glob("arc-*/arc.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text())


def gaussians(rng, n, shift, deviation):
    images = 0.5 + shift + deviation * rng.standard_normal((n, 8, 8))
    return np.clip(np.rint(255 * images), 0, 255).astype(np.uint8), np.zeros(n, np.int64)


def grid(norm, *radii):
    return f"fit-discriminator.attack.norm={norm}", "fit-discriminator.attack.epsilons=[" + ",".join(f'"{r}"' for r in radii) + "]"


def show(name, record, truth):
    low, high = record["interval"]
    share = f"{100 * record['signed'] / truth:.1f} %" if truth else ""
    print(f"| {name} | {truth:.5f} | {record['signed']:.5f} | {low:.5f} to {high:.5f} | {share} |", flush=True)


print("| | truth | signed ARC | 95 % interval | of the truth |\n|---|---|---|---|---|")
rng = np.random.default_rng(0)
training = ("fit-discriminator.steps=600", "arc.max_images=2000")
d, s = 0.2, 0.05
a = d / (2 * s)
truth = s * (a * 0.5 * erf(a / sqrt(2)) + (exp(-a * a / 2) - 1) / sqrt(2 * pi))
radii = [round(d * i / 10, 4) for i in range(6)]
sides = [gaussians(rng, 6000, side * d / 16, s) for side in (-1, 1)]
show("Gaussians", arc("gaussians", *sides, *grid("l2", *radii), *training), truth)
sides = [(np.full((2000, 8, 8), level, np.uint8), np.zeros(2000, np.int64)) for level in (121, 134)]
distance = 8 * 13 / 255
radii = [round(distance * i / 16, 4) for i in range(9)]
show("point masses", arc("points", *sides, *grid("l2", *radii), "fit-discriminator.steps=200"), distance / 4)

digits = Path(__file__).parents[2] / "src" / "data" / "digits"
rows = pa.concat_tables([pq.read_table(file) for file in sorted(digits.glob("*.parquet"))])
images = np.stack([np.array(Image.open(io.BytesIO(row["bytes"]))) for row in rows["img"].to_pylist()])
labels = np.array(rows["label"])
held = 0
for halving in range(halvings):
    order = np.random.default_rng(1000 + halving).permutation(len(images))
    sides = [(images[part], labels[part]) for part in np.array_split(order, 2)]
    record = arc(f"halves-{halving}", *sides, "fit-discriminator.steps=100", f"seed={halving}",
                 *grid("linf", 0, 0.01, 0.02, 0.04))
    held += record["interval"][0] <= 0 <= record["interval"][1]
print(f"\nThe signed interval holds 0 in {held} of {halvings} random halvings of the digits.")
