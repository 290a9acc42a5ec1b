"""Does ARC rank generators by quality? `python ranking.py PROXYSET OUT [COUNT]`.

The digits' generator that is shipped at 2, 5, 20 and 100 steps, and one that was trained for 200 steps only, at 100: of
each a pool of COUNT (3,000) images. Prints the signed ARC of each with its interval, the Fréchet distance to the test
digits in the features of a classifier, the share of images that this classifier gives their class, and the accuracy
under PGD-20 (l-infinity, 0.1) on the test digits of a classifier that was trained by PGD-AT on real and these images.

Nothing but Python's own library. What is finished in OUT is taken as it is.
"""

import shutil
import sys
from functools import partial
from pathlib import Path

import command

proxyset, out = sys.argv[1], Path(sys.argv[2])
count = int(sys.argv[3]) if len(sys.argv) > 3 else 3000
root = Path(__file__).parents[2]
run = partial(command.run, proxyset)

split, labeller, early = out / "split", out / "labeller", out / "early"
run("split", "--out", split)
run("train", "--split", split, "--objective", "plain", "--channels", "16,32", "--steps", 800, "--batch", 64,
    "--learning-rate", 0.05, "--warmup-steps", 50, "--crop-pad", 1, "--out", labeller)
run("fit-generator", "--split", split, "--steps", 200, "--block-out-channels", "24,32", "--layers-per-block", 1,
    "--attention-head-dim", 16, "--batch", 64, "--learning-rate", 1e-3, "--warmup-steps", 20, "--out", early)
shipped = root / "models" / "digits-ddpm"
pools = {}
for name, model, steps in [
    ("2 steps", shipped, 2), ("5 steps", shipped, 5), ("20 steps", shipped, 20), ("100 steps", shipped, 100),
    ("early, 100 steps", early, 100),
]:
    pools[name] = out / name.replace(", ", "-").replace(" ", "-")
    run("generate", "--model", model, "--count", count, "--steps", steps, "--out", pools[name])
sets = [argument for pool in pools.values() for argument in ("--synthetic", pool)]
radii = 'fit-discriminator.attack.epsilons=["0","0.01","0.02","0.04"]'
ranked = run("arc", "--real", "builtin:digits", *sets, "--set", radii, "--set", "arc.attack.apgd_steps=50", "--labeller", labeller,
             "--out", out / "ranking")
by_name = {generator["name"]: generator for generator in ranked["generators"]}

print("| generator | signed ARC | 95 % interval | Fréchet distance | class accuracy | robust accuracy, PGD-20 |\n"
      "|---|---|---|---|---|---|")
for name, pool in pools.items():
    quality = run("quality", "--pool", pool, "--classifier", labeller, "--out", Path(f"{pool}-quality"))["summary"]
    data = Path(f"{pool}-data")
    shards = sorted((pool / "pool").glob("*.parquet"))
    data.mkdir(exist_ok=True)
    for i, shard in enumerate(shards):
        shutil.copy(shard, data / f"train-{i:05}-of-{len(shards):05}.parquet")
    model = Path(f"{pool}-robust")
    run("train", "--split", split, "--data", data, "--epsilon", 0.1, "--steps", 1500, "--channels", "16,32", "--batch", 64,
        "--learning-rate", 0.05, "--crop-pad", 1, "--eval-every", 250, "--out", model)
    metrics = run("evaluate", "--model", model, "--data", "builtin:digits", "--epsilon", 0.1, "--attack-steps", 20,
                  "--out", Path(f"{pool}-metrics"))["summary"]
    arc = by_name[pool.name]
    low, high = arc["interval"]
    print(f"| {name} | {arc['signed_arc']:.5f} | {low:.5f} to {high:.5f} | {quality['frechet_distance']:.3f} "
          f"| {100 * arc['label_agreement']:.1f} % | {100 * metrics['robust_accuracy']:.1f} % |", flush=True)
print("\nBy ARC, best first: " + ", ".join(generator["name"] for generator in ranked["generators"]) + ".")
