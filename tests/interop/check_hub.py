"""Asserts that a data-set folder of proxyset opens where people open data sets.

    python check_hub.py DATASET_FOLDER

In `datasets` both as a repository (the card counts) and as bare files (their metadata counts), with PIL
images and class names; in duckdb and polars with the fields of the image struct. The manifest says what to
expect. Versions: requirements.txt.
"""

import glob
import json
import os
import sys
import tempfile

# Before `datasets` is imported: no network, and no cache from an earlier run.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="check-hub-")

import datasets
import duckdb
import polars
from PIL.Image import Image


def expect(found, expected, what):
    assert found == expected, f"{what}: found {found!r}, expected {expected!r}"


def check_rows(rows, manifest, n, counts, what):
    """Rows of `datasets`: features, every label, some images."""
    expect(len(rows), n, f"{what}: rows")
    expect(type(rows.features["image"]), datasets.Image, f"{what}: feature of image")
    expect(type(rows.features["label"]), datasets.ClassLabel, f"{what}: feature of label")
    expect(rows.features["label"].names, manifest["class_names"], f"{what}: class names")
    labels = list(rows["label"])
    expect([labels.count(i) for i in range(len(counts))], counts, f"{what}: rows of each class")
    shape = manifest["shape"]
    for i in range(0, n, max(1, n // 50)):
        image = rows[i]["image"]
        assert isinstance(image, Image), f"{what}: row {i} is a {type(image)}, expected a PIL image"
        expect(image.size, (shape["width"], shape["height"]), f"{what}: size of image {i}")
        expect(image.mode, {1: "L", 3: "RGB"}[shape["channels"]], f"{what}: mode of image {i}")


def check_files(pattern, n, counts):
    """Bare files in duckdb and polars."""
    by_class = duckdb.sql(f"select label, count(*) from '{pattern}' group by label order by label").fetchall()
    expect(by_class, [(i, count) for i, count in enumerate(counts) if count], "duckdb: rows of each class")
    smallest = duckdb.sql(f"select min(octet_length(image.bytes)) from '{pattern}'").fetchall()[0][0]
    assert smallest > 50, f"duckdb: an image of {smallest} bytes"
    keys = duckdb.sql(f"select distinct decode(key) from parquet_kv_metadata('{pattern}')").fetchall()
    assert ("huggingface",) in keys, f"duckdb: key-values {keys}"

    frame = polars.scan_parquet(pattern)
    schema = frame.collect_schema()
    image = polars.Struct({"bytes": polars.Binary, "path": polars.String})
    expect((schema["image"], schema["label"]), (image, polars.Int64), "polars: types")
    size = polars.col("image").struct.field("bytes").bin.size()
    expect(frame.select(polars.len(), size.min()).collect().row(0), (n, smallest), "polars: rows, smallest image")


def main(folder):
    with open(os.path.join(folder, "manifest.json")) as file:
        manifest = json.load(file)
    configs = datasets.get_dataset_config_names(folder)
    assert configs, "datasets: no configurations"
    for config in configs:
        for split, rows in datasets.load_dataset(folder, config).items():
            with_card = f"datasets, {config}, {split}"
            # The files of a split are those that its card names: one pattern, relative to the folder.
            builder = datasets.load_dataset_builder(folder, config)
            files = [os.path.relpath(file, folder) for file in builder.config.data_files[split]]
            entries = [entry for entry in manifest["files"] if entry["path"] in files]
            expect(len(entries), len(files), f"{with_card}: files in the manifest")
            n = sum(entry["rows"] for entry in entries)
            counts = [sum(column) for column in zip(*(entry["class_counts"] for entry in entries))]
            check_rows(rows, manifest, n, counts, with_card)

            pattern = os.path.join(folder, os.path.dirname(files[0]), f"{split}-*.parquet")
            expect(len(glob.glob(pattern)), len(files), f"{pattern}: files")
            bare = datasets.load_dataset("parquet", data_files={split: pattern}, split=split)
            check_rows(bare, manifest, n, counts, f"datasets, bare files, {split}")
            streamed = datasets.load_dataset("parquet", data_files={split: pattern}, split=split, streaming=True)
            assert isinstance(next(iter(streamed))["image"], Image), "datasets, streaming: no PIL image"
            check_files(pattern, n, counts)
            print(f"{config}, {split}: {n} rows in {len(files)} files open in datasets, duckdb and polars")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
