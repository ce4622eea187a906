"""Rows that are small in memory: an integer takes 36 bytes in a list, 1 to 4 in a Packed field."""

import dataclasses
import hashlib
from array import array


class Packed:
    """
    A dataclass's field, set and read as a list of integers. It keeps how many -100s the list begins
    with (labels: not supervised), and the rest, as bytes: array's code for their size comes first.
    """

    def __set_name__(self, row_class, name):
        self.place = f"_{name}"

    def __get__(self, row, row_class):
        if row is None:
            raise AttributeError("no default")
        kept = getattr(row, self.place)
        skipped, *rest = array(chr(kept[0]), kept[1:])
        return [-100] * skipped + rest

    def __set__(self, row, numbers):
        skipped = next((i for i, x in enumerate(numbers) if x != -100), len(numbers))
        kept = [skipped, *numbers[skipped:]]
        code = "i" if min(kept) < 0 or max(kept) >= 2**16 else "B" if max(kept) < 2**8 else "H"
        setattr(row, self.place, code.encode() + array(code, kept).tobytes())


def digest_of_rows(encoded):
    """The SHA-256 of {split: rows}, row by row."""
    digest = hashlib.sha256()
    for name, rows in encoded.items():
        digest.update(f"{len(rows)} {name}\n".encode())
        fields = [field.name for field in dataclasses.fields(rows[0])] if rows else []
        for row in rows:
            kept = [getattr(row, f"_{field}", None) or getattr(row, field) for field in fields]
            digest.update(repr(kept).encode())
    return digest.hexdigest()
