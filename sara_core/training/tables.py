"""Tables of a run, one row a step, that can be read while it goes on."""

import contextlib
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ..files.atomic import replace_atomically


class StepTable:
    """A CSV file whose first column is a step; a full disk costs rows, not the run.

    Args:
        path: The file; made with the first row.
        columns: Their names.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, tuple(columns)
        self._file: TextIO | None = None

    def add(self, row: Sequence) -> None:
        """Append a row, at once."""
        with contextlib.suppress(OSError):
            if self._file is None:
                is_new = not self.path.is_file()
                self._file = open(self.path, "a", newline="", encoding="utf-8", buffering=1)  # noqa: SIM115
                if is_new:
                    csv.writer(self._file).writerow(self.columns)
            csv.writer(self._file).writerow(row)

    def cut(self, up_to_step: int) -> tuple[list[list[str]], OSError | None]:
        """Drop the rows after a step, of steps that will be retried.

        Returns:
            The rows left, and why the others are still in the file if they are.
        """
        if not self.path.is_file():
            return [], None
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            rows = [row for row in csv.reader(file) if self._is_whole(row)]
        rows = [row for row in rows if int(row[0]) <= up_to_step]

        def write(temporary: Path) -> None:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([self.columns, *rows])

        try:
            replace_atomically(self.path, write)
        except OSError as error:  # a table program has it open, or the disk is full
            return rows, error
        return rows, None

    def _is_whole(self, row: list[str]) -> bool:
        try:
            return len(row) == len(self.columns) and int(row[0]) >= 0 and float(row[1]) is not None
        except ValueError:
            return False

    def forget(self) -> None:
        """Begin a new file with the next row, as the old one is gone."""
        self._file = None

    def close(self) -> None:
        """Let go of the file; what ended a run is what is to be seen, not that its disk is full."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
