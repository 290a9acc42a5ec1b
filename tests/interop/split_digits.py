"""Divides the digits of the program into 1,297 training and 500 test images: `python split_digits.py OUT`."""

import sys
from pathlib import Path

import pyarrow
from pyarrow import parquet

source = Path(__file__).parents[2] / "src/data/digits"
digits = pyarrow.concat_tables(parquet.read_table(path) for path in sorted(source.glob("*.parquet")))
digits = digits.replace_schema_metadata(parquet.read_schema(next(source.glob("train-*.parquet"))).metadata)
out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
parquet.write_table(digits.slice(0, 500), out / "test-00000-of-00001.parquet")
parquet.write_table(digits.slice(500), out / "train-00000-of-00001.parquet")
