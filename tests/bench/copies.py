"""Copies of real images in a pool: which are found, and which others are taken for copies.

    python copies.py PROXYSET FASHION_MNIST OUT [PLANTED]

The real data are the first 50,000 training images of Fashion-MNIST and its test images. The pool has the 10,000 other
training images, which nothing has seen, and PLANTED (1,000) each of real training and of real test images: as they are,
mirrored, with every pixel off by one level, shifted by a pixel (in eight directions). They are scored, and what curate
refuses as copies is counted: of the 10,000 they are false alarms.

Needs what requirements-curate.txt lists, and pillow.
"""

import io
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import command

proxyset, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
planted = int(sys.argv[4]) if len(sys.argv) > 4 else 1000
TOLERANCE = 0.02

run = partial(command.run, proxyset)


def table(split):
    files = sorted(source.glob(f"**/{split}-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


def decode(rows):
    column = "image" if "image" in rows.column_names else "img"
    return np.stack([np.array(Image.open(io.BytesIO(row["bytes"]))) for row in rows[column].to_pylist()])


def shifted(images, rng):
    moved = np.empty_like(images)
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    for i, image in enumerate(images):
        dy, dx = steps[rng.integers(len(steps))]
        padded = np.pad(image, 1)
        moved[i] = padded[1 + dy : 1 + dy + image.shape[0], 1 + dx : 1 + dx + image.shape[1]]
    return moved


def off_by_one(images, rng):
    sign = rng.integers(0, 2, images.shape) * 2 - 1
    return np.clip(images.astype(int) + sign, 0, 255).astype(np.uint8)


rng = np.random.default_rng(0)
train, test = table("train"), table("test")
real = out / "real" / "data"
if not (out / "pool.npz").exists():
    real.mkdir(parents=True, exist_ok=True)
    pq.write_table(train.slice(0, 50_000), real / "train-00000-of-00001.parquet")
    pq.write_table(test, real / "test-00000-of-00001.parquet")
    images = {"train": decode(train), "test": decode(test)}
    labels = {"train": np.array(train["label"]), "test": np.array(test["label"])}
    parts = [("unseen", images["train"][50_000:], labels["train"][50_000:])]
    for split, n in (("train", 50_000), ("test", len(test))):
        chosen = rng.choice(n, planted, replace=False)
        originals, classes = images[split][chosen], labels[split][chosen]
        parts += [
            (f"{split}, as it is", originals, classes),
            (f"{split}, mirrored", originals[:, :, ::-1], classes),
            (f"{split}, off by one level", off_by_one(originals, rng), classes),
            (f"{split}, shifted by a pixel", shifted(originals, rng), classes),
        ]
    kinds = [(name, len(part)) for name, part, _ in parts]
    (out / "kinds.json").write_text(json.dumps(kinds))
    np.savez(out / "pool.npz", image=np.concatenate([p for _, p, _ in parts]), label=np.concatenate([c for *_, c in parts]))
kinds = json.loads((out / "kinds.json").read_text())

# Networks play no part here: they are trained for a few steps, because score wants some.
run("split", "--source", out / "real", "--out", out / "split")
run("import", "--source", out / "pool.npz", "--out", out / "pool")
run("train", "--split", out / "split", "--objective", "plain", "--channels", "8,8", "--groups", "4", "--steps", 50,
    "--batch", 32, "--eval-every", 50, "--held-out", 0.02, "--out", out / "labeller")
run("label", "--pool", out / "pool", "--classifier", out / "labeller", "--out", out / "labels")
run("fit-discriminator", "--split", out / "split", "--pool", out / "pool", "--channels", "8,8", "--groups", "4",
    "--steps", 4, "--batch", 8, "--attack-steps", 1, "--eval-every", 4, "--max-stop", 50, "--out", out / "discriminators")
run("score", "--split", out / "split", "--pool", out / "pool", "--labels", out / "labels",
    "--discriminators", out / "discriminators", "--out", out / "scores")
run("curate", "--scores", out / "scores", "--arm", "all", "--require-agreement", "false", "--copy-tolerance", TOLERANCE,
    "--out", out / "selection")

files = sorted((out / "scores" / "scores").glob("*.parquet"))
scores = pa.concat_tables([pq.read_table(file, columns=["uid"]) for file in files])
rejected = pq.read_table(out / "selection" / "rejected.parquet").to_pydict()
reasons = dict(zip(rejected["uid"], rejected["reason"]))
uids = scores["uid"].to_pylist()
seconds = json.loads((out / "scores" / "done.json").read_text())["seconds"]

print(f"{len(uids)} images scored against {50_000 + len(test)} in {seconds:.0f} s\n")
print("| images | number | train-copy | test-copy | found |\n|---|---|---|---|---|")
first = 0
for kind, n in kinds:
    of = [reasons.get(uid, "") for uid in uids[first : first + n]]
    as_train, as_test = of.count("train-copy"), of.count("test-copy")
    print(f"| {kind} | {n} | {as_train} | {as_test} | {100 * (as_train + as_test) / n:.2f} % |")
    first += n
