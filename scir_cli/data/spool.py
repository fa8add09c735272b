"""Rows in an unnamed temporary file, deleted when the process ends."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scir_cli.data.files import as_store_error


class Spool:
    """Rows on disk under no name, which are gone with the process however it ends. A batch is mapped while somebody reads it and no longer."""

    def __init__(self, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        lengths = [0]
        with as_store_error(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
            with pa.ipc.new_file(file, schema) as writer:
                for table in tables:
                    for batch in table.to_batches():
                        writer.write_batch(batch)
                        lengths.append(batch.num_rows)
            file.flush()
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        self.schema, self.path = schema, f"/dev/fd/{descriptor}"
        self.starts = np.cumsum(lengths)
        self.gone = self.kept_before = np.empty(0, np.int64)

    def drop_rows(self, rows: NDArray[np.int64]) -> Spool:
        """All rows but these."""
        self.gone = np.sort(rows)
        self.kept_before = self.gone - np.arange(len(rows))
        return self

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1]) - len(self.gone)

    def slice(self, low: int, length: int) -> pa.Table:
        rows = np.arange(low, min(low + length, self.num_rows))
        if not len(rows):
            return self.schema.empty_table()
        rows += np.searchsorted(self.kept_before, rows, side="right")
        first, last = np.searchsorted(self.starts, [rows[0], rows[-1]], side="right") - 1
        file = pa.ipc.open_file(pa.memory_map(self.path))
        table = pa.Table.from_batches([file.get_batch(int(i)) for i in range(first, last + 1)])
        kept = np.zeros(rows[-1] - rows[0] + 1, bool)
        kept[rows - rows[0]] = True
        return table.slice(rows[0] - self.starts[first], len(kept)).filter(pa.array(kept))
