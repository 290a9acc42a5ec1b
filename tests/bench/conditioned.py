"""One discriminator for all radii beside the grid, and what ARC costs beside a robust training:
`python conditioned.py PROXYSET SPLIT POOL LABELS OUT [SETTING=VALUE …] [train.SETTING=VALUE …]`.

Trains both kinds on the same pool, one after the other, scores the pool with each and computes ARC; then trains a classifier
on the real images. Prints how the scores' orders agree (Spearman), and the CPU seconds of each. The settings are
fit-discriminator's, such as channels=8,24,48, and train's.

Needs numpy, pyarrow and scipy.
"""

import resource
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import spearmanr

import command

proxyset, split, pool, labels, out, *settings = sys.argv[1:]
out = Path(out)
flags = {"": [], "train.": []}
for name, value in (setting.split("=") for setting in settings):
    table = "train." if name.startswith("train.") else ""
    flags[table] += ["--" + name.removeprefix(table), value]


def run(verb, name, *arguments):
    """The summary and the CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = command.run(proxyset, verb, *arguments, "--out", out / name)["summary"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return summary, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


scores, costs, rows = {}, {}, []
for name in ("grid", "conditioned"):
    conditioned = ("--conditioned", "true") if name == "conditioned" else ()
    inputs = ("--split", split, "--pool", pool)
    _, fit = run("fit-discriminator", f"{name}-nets", *inputs, *flags[""], *conditioned)
    nets = ("--discriminators", out / f"{name}-nets")
    run("score", f"{name}-scores", *inputs, *nets, "--labels", labels)
    arc, measure = run("arc", f"{name}-arc", *inputs, *nets)
    files = sorted((out / f"{name}-scores" / "scores").glob("*.parquet"))
    scores[name] = pa.concat_tables([pq.read_table(file) for file in files])
    costs[name] = fit + measure
    low, high = arc["interval"]
    accuracies = ", ".join(f"{100 * point['accuracy']:.1f}" for point in arc["curve"])
    rows.append(f"| {name} | {fit:.0f} | {measure:.0f} | {arc['signed']:.5f} | {low:.5f} to {high:.5f} | {accuracies} |")
_, training = run("train", "robust", "--split", split, *flags["train."])

print("| discriminators | CPU seconds to train | to measure ARC | signed ARC | 95 % interval | accuracy by radius, % |\n"
      "|---|---|---|---|---|---|\n" + "\n".join(rows))
for column in ("synthetic_score", "judge_score"):
    a, b = (np.array(scores[name][column].to_pylist(), float) for name in ("grid", "conditioned"))
    there = ~np.isnan(a) & ~np.isnan(b)
    print(f"\nrank correlation of {column}: {spearmanr(a[there], b[there]).statistic:.3f} of {there.sum()} images")
print(f"\na robust training: {training:.0f} CPU seconds; ARC costs of it "
      + ", ".join(f"{100 * cost / training:.0f} % ({name})" for name, cost in costs.items()))
