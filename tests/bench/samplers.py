"""Every sampler on one model: `python samplers.py PROXYSET MODEL CLASSIFIER DATA OUT [COUNT]`.

Makes a pool with each sampler and number of steps, measures it against the first 2 * COUNT test images of DATA in the
features of CLASSIFIER, and prints a table: Fréchet distance, precision, recall, class accuracy, images per second.
The distance falls with the number of images, so the two real halves to compare with are of COUNT images each.
Nothing but Python's own library. Finished pools in OUT are taken as they are.
"""

import json
import sys
from functools import partial
from pathlib import Path

import command

proxyset, model, classifier, data, out = sys.argv[1:6]
count = int(sys.argv[6]) if len(sys.argv) > 6 else 1000
RUNS = [("ddpm", 100)] + [
    (kind, steps) for kind in ("ddim", "dpm-solver++", "ipndm", "heun", "euler") for steps in (10, 20, 50)
]
run = partial(command.run, proxyset)


def done(folder):
    return json.loads((folder / "done.json").read_text())


print(f"{count} images a row; Fréchet distance to {2 * count} test images, in the features of a classifier\n")
print("| sampler | steps | calls of the network | Fréchet distance | precision | recall | class accuracy | images / s |")
print("|---|---|---|---|---|---|---|---|")
for kind, steps in RUNS:
    pool, quality = (Path(out) / f"{what}-{kind}-{steps}" for what in ("pool", "quality"))
    run("generate", "--model", model, "--count", count, "--sampler", kind, "--steps", steps, "--micro-batch", 50,
        "--shard-rows", 1000, "--out", pool)
    run("quality", "--pool", pool, "--classifier", classifier, "--data", data,
        "--first", 2 * count, "--out", quality)
    found = done(quality)["summary"]
    calls = 2 * steps - 1 if kind == "heun" else steps
    print(
        f"| {kind} | {steps} | {calls} | {found['frechet_distance']:.3f} | {found['precision']:.3f} | {found['recall']:.3f} "
        f"| {found['class_accuracy']:.3f} | {count / done(pool)['seconds']:.1f} |",
        flush=True,
    )
print(
    f"\nTwo halves of the {found['real_images']} test images, {found['images_of_the_halves']}: "
    f"{found['frechet_distance_of_real_halves']:.3f}."
)
