"""Curation of a large pool beside DuckDB and polars: `python curate.py PROXYSET OUT [ROWS] [REPETITIONS]`.

Makes a score table of ROWS rows (10 million) in the form that `score` writes, with random values, distinct scores, some
equal pixels and some copies. Then, in turn, `proxyset curate`, DuckDB and polars keep the lowest-scored images of
each class, 50,000 of it, that pass the same gates and a filter, and write them with the same columns. Prints seconds (median) and
peak memory of the processes, and fails unless all three kept the same rows.

Two queries: "top-k" has gates and ranking; "top-k, duplicates" also refuses repeated pixels, which proxyset does in both.
proxyset also writes why each of the others was rejected, and what the judges say. Two threads each.

Needs what requirements-curate.txt lists.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from command import peak

CLASSES, SHARD = 10, 16_384
GATES = (
    "label_agrees AND train_copy_distance > 0.02::FLOAT AND synthetic_score <= 1"
    " AND (test_copy_distance IS NULL OR test_copy_distance > 0.02::FLOAT)"
    " AND label_confidence >= 0.6::FLOAT"
)


def make(folder, rows):
    """The score table, and the folder's records."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    # Distinct 32-bit floats in [0, 1): ties are broken by BLAKE3 of the uid, which SQL does not have.
    scores = (rng.permutation(1 << 24)[:rows] / np.float64(1 << 24)).astype(np.float32)
    tables = folder / "scores"
    tables.mkdir(parents=True)
    hashes = rng.integers(0, 1 << 63, size=rows, dtype=np.uint64)
    hashes[rng.integers(0, rows, size=rows // 100)] = hashes[rng.integers(0, rows, size=rows // 100)]
    for shard, start in enumerate(range(0, rows, SHARD)):
        n = min(SHARD, rows - start)
        f32 = lambda low, high: pa.array(rng.uniform(low, high, n).astype(np.float32))
        index = np.arange(start, start + n)
        judged = rng.random(n) < 2 / 3
        columns = {
            "uid": pa.array([f"0123456789ab-{i:09}" for i in index]),
            "label": pa.array(index % CLASSES, pa.int64()),
            "synthetic_score": pa.array(scores[index]),
            "judge_score": pa.array(rng.random(n).astype(np.float32), mask=~judged),
            "label_confidence": f32(0.2, 1),
            "label_agrees": pa.array(rng.random(n) < 0.95),
            "fold": pa.array(rng.integers(0, 3, n), pa.int32()),
            "pixel_hash": pa.array(hashes[index]),
            "perceptual_hash": pa.array(rng.integers(0, 1 << 63, size=n, dtype=np.uint64)),
            "nearest_train": pa.array(rng.integers(0, 50_000, n), pa.int32()),
            "train_distance": f32(0.01, 0.3),
            "train_copy_distance": f32(0.01, 0.3),
            "memorization_ratio": f32(0.5, 1),
            "nearest_test": pa.array(rng.integers(0, 10_000, n), pa.int32()),
            "test_distance": f32(0.01, 0.3),
            "test_copy_distance": f32(0.01, 0.3),
            "p_synthetic_0": f32(0, 1),
            "p_synthetic_8_255": f32(0, 1),
        }
        path = tables / f"shard-{shard:05}.parquet"
        pq.write_table(pa.table(columns), path, compression="snappy", row_group_size=SHARD)
        record = {
            "schema": "proxyset.shard/1", "shard": shard, "rows": n, "bytes": path.stat().st_size, "blake3": "",
            "fingerprint": "0" * 64, "device_class": "none", "version": "0",
        }
        (tables / f"shard-{shard:05}.json").write_text(json.dumps(record))
    (folder / "config.toml").write_text(
        f'schema = "proxyset.config/1"\nstage = "score"\nfingerprint = "{rows:064}"\ninputs = []\n[settings]\n'
    )
    summary = {"classes": [f"class{i}" for i in range(CLASSES)], "shards": shard + 1}
    done = {
        "schema": "proxyset.done/1", "stage": "score", "fingerprint": f"{rows:064}", "device_class": "none",
        "version": "0", "seconds": 0, "summary": summary, "files": [], "seal": "",
    }
    (folder / "done.json").write_text(json.dumps(done))


def duckdb_query(folder, out, keep, duplicates):
    import duckdb

    duckdb.sql("SET threads = 2")
    source = f"read_parquet('{folder}/scores/*.parquet', filename = true, file_row_number = true)"
    passing = f"SELECT * FROM {source} WHERE {GATES}"
    if duplicates:
        passing += " QUALIFY row_number() OVER (PARTITION BY pixel_hash ORDER BY filename, file_row_number) = 1"
    duckdb.sql(
        f"COPY (SELECT uid, label, synthetic_score, label_confidence, filename, file_row_number FROM ({passing})"
        f" QUALIFY row_number() OVER (PARTITION BY label ORDER BY synthetic_score) <= {keep}"
        f" ORDER BY filename, file_row_number) TO '{out}' (FORMAT parquet, COMPRESSION snappy)"
    )


def polars_query(folder, out, keep, duplicates):
    import polars as pl

    floats = lambda x: pl.lit(x, pl.Float32)
    rows = pl.scan_parquet(f"{folder}/scores/*.parquet", row_index_name="row").filter(
        pl.col("label_agrees")
        & (pl.col("train_copy_distance") > floats(0.02))
        & (pl.col("synthetic_score") <= floats(1))
        & (pl.col("test_copy_distance").is_null() | (pl.col("test_copy_distance") > floats(0.02)))
        & (pl.col("label_confidence") >= floats(0.6))
    )
    if duplicates:
        rows = rows.unique(subset="pixel_hash", keep="first", maintain_order=True)
    kept = rows.filter(pl.col("synthetic_score").rank("ordinal").over("label") <= keep).select(
        "uid", "label", "synthetic_score", "label_confidence", "row"
    )
    kept.sort("row").collect(engine="streaming").write_parquet(out, compression="snappy")


def main():
    import pyarrow.parquet as pq

    proxyset, out = sys.argv[1], Path(sys.argv[2])
    rows = int(sys.argv[3]) if len(sys.argv) > 3 else 10_000_000
    repetitions = int(sys.argv[4]) if len(sys.argv) > 4 else 3
    keep = rows // 200
    scores = out / f"scores-{rows}"
    if not (scores / "done.json").exists():
        make(scores, rows)
    ours = out / "curate"
    sides = {
        ("proxyset", ""): [
            proxyset, "curate", "--scores", str(scores), "--keep-per-class", str(keep), "--filter",
            "label_confidence >= 0.6", "--out", str(ours), "--quiet",
        ]
    }
    for peer in ("duckdb", "polars"):
        for query in ("top-k", "top-k, duplicates"):
            target = out / f"{peer}-{len(query)}.parquet"
            sides[peer, query] = [sys.executable, __file__, "--peer", peer, str(scores), str(target), str(keep), query]
    seconds, memory = ({side: [] for side in sides} for _ in range(2))
    for _ in range(repetitions):
        for side, command in sides.items():
            subprocess.run(["rm", "-rf", ours], check=True)
            took, mib = peak(command, {"POLARS_MAX_THREADS": "2", "RAYON_NUM_THREADS": "2"})
            seconds[side].append(took)
            memory[side].append(mib)
            if side[0] == "proxyset":
                kept = pq.read_table(ours / "selection.parquet", columns=["uid"])["uid"].to_pylist()
            elif "duplicates" in side[1]:
                found = pq.read_table(command[-3], columns=["uid"])["uid"].to_pylist()
                if kept != found:
                    sys.exit(f"{side[0]} kept {len(found)} rows that are not the {len(kept)} of proxyset")
    print(f"{rows} rows, {len(kept)} kept; the same rows in the same order by all three.\n")
    print("| | query | seconds | peak MiB |\n|---|---|---|---|")
    for side in sides:
        name, query = side
        print(
            f"| {name} | {query or 'top-k, duplicates, reasons, judges'} | {statistics.median(seconds[side]):.2f} "
            f"| {max(memory[side]):.0f} |"
        )


if sys.argv[1] == "--peer":
    peer, folder, target, keep, query = sys.argv[2:]
    {"duckdb": duckdb_query, "polars": polars_query}[peer](folder, target, int(keep), "duplicates" in query)
else:
    main()
