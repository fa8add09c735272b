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
    """Rows on disk in a file without a name, which is deleted when the process ends.

    A batch is memory-mapped only while a reader uses it.

    schema: of the rows.
    path: of the open file descriptor.
    starts: first row of each batch, and the number of rows at the end.  (batches + 1,)
    gone: rows that are dropped, ascending.  (dropped,)
    kept_before: number of rows kept before each dropped row.  (dropped,)
    """

    def __init__(self, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        """Writes the tables, one after the other.

        Raises StoreError if the disk is full or the temporary folder cannot be written.
        """
        lengths = [0]
        with as_store_error(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
            with pa.ipc.new_file(file, schema) as writer:
                for table in tables:
                    for batch in table.to_batches():
                        writer.write_batch(batch)
                        lengths.append(batch.num_rows)
            file.flush()
            # The copy keeps the file open after the `with` has closed the original.
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)

        self.schema = schema
        self.path = f"/dev/fd/{descriptor}"
        self.starts = np.cumsum(lengths)
        self.gone = np.empty(0, np.int64)
        self.kept_before = self.gone

    def drop_rows(self, rows: NDArray[np.int64]) -> Spool:
        """This spool without the given rows, which count from 0 before any drop.

        rows: (dropped,), in any order.
        """
        self.gone = np.sort(rows)
        self.kept_before = self.gone - np.arange(len(rows))
        return self

    @property
    def num_rows(self) -> int:
        """Rows that are not dropped."""
        return int(self.starts[-1]) - len(self.gone)

    def slice(self, low: int, length: int) -> pa.Table:
        """Rows low to low + length of those that are not dropped; fewer at the end."""
        rows = np.arange(low, min(low + length, self.num_rows))
        if not len(rows):
            return self.schema.empty_table()

        # From numbers among the kept rows to numbers among all: (rows,)
        rows += np.searchsorted(self.kept_before, rows, side="right")
        start = rows[0]
        stop = rows[-1] + 1

        # Only the batches that hold these rows are read.
        first, last = np.searchsorted(self.starts, [start, stop - 1], side="right") - 1
        file = pa.ipc.open_file(pa.memory_map(self.path))
        batches = [file.get_batch(int(index)) for index in range(first, last + 1)]
        table = pa.Table.from_batches(batches)

        is_kept = np.zeros(stop - start, bool)
        is_kept[rows - start] = True
        offset = start - self.starts[first]
        return table.slice(offset, len(is_kept)).filter(pa.array(is_kept))
