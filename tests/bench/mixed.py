"""Does selection find real images? `python mixed.py PROXYSET SPLIT POOL REAL CLASSIFIER OUT [COUNT]`.

A pool of COUNT (1,000) images that a generator made, the first of POOL, and as many real ones, the first of REAL (.npz with
`image` and `label`), which neither generator nor discriminators saw: imported as one pool in an order drawn once, labelled,
scored by discriminators that are trained on this very pool, and curated to half of each class by ARC's score. Prints the
shares of either that are kept, with the interval of their difference (Newcombe's, of two proportions), and what the judges,
other discriminators on other images, say of the kept.

Needs numpy, pillow and pyarrow.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import command

proxyset, split, pool, real, classifier, out = sys.argv[1:7]
count = int(sys.argv[7]) if len(sys.argv) > 7 else 1000
out = Path(out)
out.mkdir(parents=True, exist_ok=True)


def run(*arguments):
    return command.run(proxyset, *arguments)["summary"]


def table(folder, *columns):
    return pa.concat_tables([pq.read_table(file, columns=list(columns)) for file in sorted(Path(folder).glob("*.parquet"))])


made = table(Path(pool) / "pool", "image", "label").slice(0, count)
images = np.stack([np.array(Image.open(io.BytesIO(row["bytes"]))) for row in made["image"].to_pylist()])
unseen = np.load(real)
images = np.concatenate([images, unseen["image"][:count]])
labels = np.concatenate([np.array(made["label"]), unseen["label"][:count]])
is_real = np.arange(2 * count) >= count
order = np.random.default_rng(0).permutation(2 * count)
np.savez(out / "mixed.npz", image=images[order], label=labels[order])
is_real = is_real[order]

mixed, labelled, discriminators = out / "mixed", out / "labels", out / "discriminators"
scores, selection = out / "scores", out / "selection"
run("import", "--source", out / "mixed.npz", "--out", mixed)
run("label", "--pool", mixed, "--classifier", classifier, "--out", labelled)
run("fit-discriminator", "--split", split, "--pool", mixed, "--epsilons", "0,0.004,0.01,0.02", "--attack-steps", 5,
    "--channels", "8,24,48", "--steps", 300, "--learning-rate", 2e-3, "--ema-decay", 0.98, "--out", discriminators)
run("score", "--split", split, "--pool", mixed, "--labels", labelled, "--discriminators", discriminators, "--out", scores)
select = run("curate", "--scores", scores, "--keep-fraction", 0.5, "--require-agreement", "false", "--out", selection)

uids = np.array(table(mixed / "pool", "uid")["uid"])
kept = np.isin(uids, np.array(pq.read_table(selection / "selection.parquet", columns=["uid"])["uid"]))


def wilson(k, n, z=1.959964):
    p = k / n
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


parts = {}
for name, which in (("real", is_real), ("synthetic", ~is_real)):
    k, n = int(kept[which].sum()), int(which.sum())
    parts[name] = (k / n, *wilson(k, n))
    print(f"{name}: {k} of {n} kept, {100 * k / n:.1f} %")
(p, low_p, high_p), (q, low_q, high_q) = parts["real"], parts["synthetic"]
low = p - q - ((p - low_p) ** 2 + (high_q - q) ** 2) ** 0.5
high = p - q + ((high_p - p) ** 2 + (q - low_q) ** 2) ** 0.5
print(f"difference: {100 * (p - q):.1f} points, 95 % interval {100 * low:.1f} to {100 * high:.1f}")
score = np.array(table(scores / "scores", "synthetic_score")["synthetic_score"])
rank = score.argsort().argsort()
area = 1 - (rank[is_real].mean() - (count - 1) / 2) / count
print(f"a real image scores lower than a synthetic one in {100 * area:.1f} % of pairs")
judged = select["judged"]
print(f"judges' score of the kept {judged['kept']:.4f}, of a random half {judged['random']:.4f}, difference "
      f"{judged['difference']:.4f}, interval {judged['interval'][0]:.4f} to {judged['interval'][1]:.4f}")
