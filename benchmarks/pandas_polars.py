"""The work of `filter --rule agree` in pandas and in polars: the other side of data_stages.py, in
an environment without this package.

Read the parts of a judged dataset, drop pairs without two verdicts, ties, disagreements and pairs
whose two texts were seen before under the same prompt; add label, margin, prompt and the chosen and
rejected messages; write an Arrow stream. Left out, though `filter` does it: counts by reason,
digests, parts. Verdicts are taken by their place in `rewards`, not by name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import common


def polars(paths: list[Path], out: Path) -> tuple[int, list[str]]:
    import polars as pl

    first, second = (pl.col(side).struct.field("text") for side in ("first", "second"))
    judge, implicit = (
        pl.col("rewards").list.get(i, null_on_oob=True).struct.field("log_odds") for i in (0, 1)
    )
    key = pl.struct(
        "prompt_id",
        pl.when(first < second).then(first).otherwise(second).alias("a"),
        pl.max_horizontal(first, second).alias("b"),
    )
    agree = (judge.sign() == implicit.sign()) & (judge != 0)
    better = judge > 0

    def message(text: Any) -> Any:
        return pl.concat_list(pl.struct(pl.lit("assistant").alias("role"), text.alias("content")))

    pairs = pl.concat([pl.read_ipc_stream(path) for path in paths], rechunk=False)
    kept = pairs.filter(key.is_first_distinct() & agree).with_columns(
        label=pl.when(better).then(pl.lit("first")).otherwise(pl.lit("second")),
        margin=pl.min_horizontal(judge.abs(), implicit.abs()),
        prompt=pl.col("messages"),
        chosen=message(pl.when(better).then(first).otherwise(second)),
        rejected=message(pl.when(better).then(second).otherwise(first)),
    )
    kept.write_ipc_stream(out, compression="uncompressed")
    return len(kept), kept["pair_id"].to_list()


def pandas(paths: list[Path], out: Path) -> tuple[int, list[str]]:
    import pandas as pd
    import pyarrow as pa

    table = pa.concat_tables(
        pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in paths
    )
    pairs = table.to_pandas(types_mapper=pd.ArrowDtype)
    first, second = (pairs[side].struct.field("text") for side in ("first", "second"))
    judge, implicit = (
        pairs["rewards"]
        .list[i]
        .struct.field("log_odds")
        .to_numpy(dtype=float, na_value=float("nan"))
        for i in (0, 1)
    )
    swap = (first > second).to_numpy(dtype=bool)
    key = pd.DataFrame(
        {
            "prompt": pairs["prompt_id"],
            "a": first.where(~swap, second),
            "b": second.where(~swap, first),
        }
    )
    agree = ((judge > 0) & (implicit > 0)) | ((judge < 0) & (implicit < 0))
    keep = agree & ~key.duplicated().to_numpy()
    better = judge[keep] > 0
    kept = pairs[keep].copy()
    first, second = first[keep], second[keep]
    kept["label"] = pd.Series(better, index=kept.index).map({True: "first", False: "second"})
    kept["margin"] = (
        pd.DataFrame({"judge": judge[keep], "implicit": implicit[keep]}, index=kept.index)
        .abs()
        .min(axis=1)
    )
    kept["prompt"] = kept["messages"]
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    for name, texts in (
        ("chosen", first.where(better, second)),
        ("rejected", second.where(better, first)),
    ):
        turns = [[{"role": "assistant", "content": text}] for text in texts]
        kept[name] = pd.Series(pd.array(turns, dtype=pd.ArrowDtype(message)), index=kept.index)
    made = pa.Table.from_pandas(kept, preserve_index=False)
    with pa.OSFile(str(out), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made)
    return len(kept), kept["pair_id"].to_list()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", required=True)
    given = json.loads(parser.parse_args().child)
    os.environ.setdefault("POLARS_MAX_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    peer = {"pandas": pandas, "polars": polars}[given["peer"]]
    version = __import__(given["peer"]).__version__  # imported before the clock starts
    __import__("pyarrow")
    paths = sorted(Path(given["input"]).glob("data-*.arrow"))
    (rows, ids), found = common.measured(lambda: peer(paths, Path(given["out"])))
    kept = hashlib.blake2b("\n".join(ids).encode(), digest_size=16).hexdigest()
    print(json.dumps({**found, "rows_out": rows, "kept": kept, "version": version}))


if __name__ == "__main__":
    main()
