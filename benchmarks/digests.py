"""What the digests cost: of a dataset when it is read, and of a model when it is loaded.

    python benchmarks/digests.py --rows 1000000 --model-mb 512

The rows are those of data_stages.py: pairs with two verdicts. `scir filter` reads them, compares
the digest of every part, and writes what it keeps with its digests; the seconds inside the digests
are counted within it. Seconds are CPU time of one process, of files that are in memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import data_stages


def child(given: dict[str, Any]) -> None:
    """Runs `filter` and counts the CPU seconds in digests, or digests a file."""
    from scir_cli import config, registry, stages
    from scir_cli.data import hashing

    if "file" in given:
        found = {}
        for name in ("digest_part", "digest_file"):
            started = time.process_time()
            getattr(hashing, name)(Path(given["file"]))
            found[name] = time.process_time() - started
        print(json.dumps(found))
        return

    inside = [0.0]
    digest_part = hashing.digest_part

    def counted(path: Path) -> str:
        started = time.process_time()
        digest = digest_part(path)
        inside[0] += time.process_time() - started
        return digest

    hashing.digest_part = counted  # type: ignore[assignment]
    run = stages.load("filter")
    values = {"input": given["input"], "output_dir": given["out"]}
    settings = config.build(registry.STAGES["filter"].settings, values, where="benchmark")
    started = time.process_time()
    run(settings)
    first = time.process_time() - started
    in_first, inside[0] = inside[0], 0.0
    started = time.process_time()
    run(settings)
    found = {"first": first, "digests": in_first, "again": time.process_time() - started}
    print(json.dumps({**found, "again_digests": inside[0]}))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model-mb", type=int, default=512)
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = data_stages.make_judged(root / "judged", options.rows)
        megabytes = sum(part.stat().st_size for part in source.glob("*.arrow")) / 2**20
        given = {"input": str(source), "out": str(root / "filtered")}
        found = common.child("digests.py", given)
        weights = root / "weights"
        weights.write_bytes(bytes(2**20) * options.model_mb)
        model = common.child("digests.py", {"file": str(weights)})
    rows = [
        row(
            f"filter, {options.rows:,} rows, {megabytes:,.0f} MB", found["first"], found["digests"]
        ),
        row("the same command again", found["again"], found["again_digests"]),
    ]
    print(common.table(rows))
    for work, seconds in (
        ("XXH3 (parts, checkpoints)", model["digest_part"]),
        ("BLAKE2b (weights)", model["digest_file"]),
    ):
        print(f"{work}: {options.model_mb / seconds / 1024:.2f} GB/s")


def row(work: str, seconds: float, digests: float) -> dict[str, Any]:
    """A line of the table."""
    return {
        "work": work,
        "CPU s": seconds,
        "of it digests, s": digests,
        "share": f"{digests / seconds:.1%}",
    }


if __name__ == "__main__":
    main()
