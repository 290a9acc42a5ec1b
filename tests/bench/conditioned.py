"""One discriminator for all radii beside the grid: `python conditioned.py PROXYSET SPLIT POOL LABELS OUT [SETTING=VALUE …]`.

Trains both on the same pool, one after the other, scores the pool with each and computes ARC. Prints how the scores' orders
agree (Spearman), and the CPU seconds of each. The settings are fit-discriminator's, such as channels=8,24,48.

Needs numpy, pyarrow and scipy.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import spearmanr

proxyset, split, pool, labels, out, *settings = sys.argv[1:]
flags = [part for setting in settings for part in ("--" + setting.split("=")[0], setting.split("=")[1])]


def run(verb, name, *arguments):
    """The summary and the CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [proxyset, verb, *map(str, arguments), "--out", str(Path(out) / name), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout)["summary"], seconds


scores, print_rows = {}, []
for name in ("grid", "conditioned"):
    conditioned = ("--conditioned", "true") if name == "conditioned" else ()
    inputs = ("--split", split, "--pool", pool)
    _, fit = run("fit-discriminator", f"{name}-nets", *inputs, *flags, *conditioned)
    nets = ("--discriminators", Path(out) / f"{name}-nets")
    run("score", f"{name}-scores", *inputs, *nets, "--labels", labels)
    arc, measure = run("arc", f"{name}-arc", *inputs, *nets)
    files = sorted((Path(out) / f"{name}-scores" / "scores").glob("*.parquet"))
    scores[name] = pa.concat_tables([pq.read_table(file) for file in files])
    low, high = arc["interval"]
    accuracies = ", ".join(f"{100 * point['accuracy']:.1f}" for point in arc["curve"])
    print_rows.append(f"| {name} | {fit:.0f} | {measure:.0f} | {arc['signed']:.5f} | {low:.5f} to {high:.5f} | {accuracies} |")

print("| discriminators | CPU seconds to train | to measure ARC | signed ARC | 95 % interval | accuracy by radius, % |\n"
      "|---|---|---|---|---|---|\n" + "\n".join(print_rows))
for column in ("synthetic_score", "judge_score"):
    a, b = (np.array(scores[name][column].to_pylist(), float) for name in ("grid", "conditioned"))
    there = ~np.isnan(a) & ~np.isnan(b)
    print(f"\nrank correlation of {column}: {spearmanr(a[there], b[there]).statistic:.3f} of {there.sum()} images")
