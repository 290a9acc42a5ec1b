"""What score costs, and that its memory does not grow with the pool: `python scoring.py PROXYSET CIFAR10 OUT [REPETITIONS]`.

The real data are the first 40,000 training images of CIFAR-10 and its test images. Pools of 2,000 and of 10,000 of its other
training images, in shards of 1,000, are scored by networks of the size that pipelines/cifar10.toml trains, which have
learnt for a few steps only. In turn, REPETITIONS (3) times, after one that is not counted; prints medians of the seconds
and the largest resident memory.

Needs pyarrow.
"""

import shutil
import statistics
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

import command

proxyset, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
repetitions = int(sys.argv[4]) if len(sys.argv) > 4 else 3
TRAIN, SIZES = 40_000, (2_000, 10_000)
NETWORKS = ("--channels", "64,128,128", "--batch", 8)

run = partial(command.run, proxyset)

real = out / "real"
if not (out / "rest.parquet").exists():
    real.mkdir(parents=True, exist_ok=True)
    train, test = (pq.read_table(next(source.glob(f"**/{split}-*.parquet"))) for split in ("train", "test"))
    pq.write_table(train.slice(0, TRAIN), real / "train-00000-of-00001.parquet")
    pq.write_table(test, real / "test-00000-of-00001.parquet")
    pq.write_table(train.slice(TRAIN), out / "rest.parquet")

split, labeller = out / "split", out / "labeller"
run("split", "--source", real, "--proxy-fraction", 0.1, "--out", split)
run("train", "--split", split, "--objective", "plain", *NETWORKS, "--steps", 20, "--eval-every", 20, "--held-out", 0.01,
    "--out", labeller)
inputs = {}
for size in SIZES:
    pool, labels, networks = (out / f"{name}-{size}" for name in ("pool", "labels", "networks"))
    run("import", "--source", out / "rest.parquet", "--first", size, "--shard-rows", 1000, "--out", pool)
    run("label", "--pool", pool, "--classifier", labeller, "--out", labels)
    run("fit-discriminator", "--split", split, "--pool", pool, *NETWORKS, "--epsilons", "0,1/255,2/255,4/255,8/255",
        "--steps", 4, "--attack-steps", 1, "--eval-every", 4, "--max-stop", 50, "--out", networks)
    inputs[size] = ("--split", split, "--pool", pool, "--labels", labels, "--discriminators", networks)

seconds, memory = ({size: [] for size in SIZES} for _ in range(2))
for repetition in range(repetitions + 1):
    for size in SIZES:
        scores = out / f"scores-{size}"
        shutil.rmtree(scores, ignore_errors=True)
        score = (proxyset, "score", *inputs[size], "--out", scores, "--quiet")
        took, mib = command.peak([str(part) for part in score])
        if repetition:
            seconds[size].append(took)
            memory[size].append(mib)

print("| images | seconds | images a second | peak MiB |\n|---|---|---|---|")
for size in SIZES:
    took = statistics.median(seconds[size])
    print(f"| {size} | {took:.1f} | {size / took:.0f} | {max(memory[size]):.0f} |")
a, b = (statistics.median(seconds[size]) for size in SIZES)
print(f"\nOf each further image: {1000 * (b - a) / (SIZES[1] - SIZES[0]):.1f} ms.")
