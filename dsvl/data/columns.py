"""Arrays that grow on disk."""

from pathlib import Path

import numpy as np


class Column:
    """An .npy file that grows along its first axis, so that nothing is held in memory."""

    def __init__(self, path: Path, *, dtype: str, shape: tuple[int, ...] = ()) -> None:
        self.file = open(path, "wb")  # noqa: SIM115 - closed by `finish`, or by who gives it up
        self._dtype, self._shape, self.length = np.dtype(dtype), shape, 0
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Add rows, of shape (n, *shape)."""
        self.file.write(np.ascontiguousarray(rows, self._dtype).data)
        self.length += len(rows)

    def finish(self) -> None:
        """Write the final length into the header."""
        # numpy pads headers so that any length fits in the same room.
        self.file.seek(0)
        self._write_header()
        self.file.close()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.length, *self._shape),
        }
        np.lib.format.write_array_header_1_0(self.file, header)
