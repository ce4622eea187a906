"""Rows that are small in memory: an integer takes 36 bytes in a list, and 4 in a Packed field."""

import dataclasses
import hashlib
from array import array


class Packed:
    """
    A dataclass's field, set and read as a list of integers. It keeps how many -100s the list begins
    with (labels: not supervised), and the rest. code: array's, of the integers' size.
    """

    def __init__(self, code="i"):
        self.code = code

    def __set_name__(self, row_class, name):
        self.place = f"_{name}"

    def __get__(self, row, row_class):
        if row is None:
            raise AttributeError("no default")
        skipped, *rest = array(self.code, getattr(row, self.place))
        return [-100] * skipped + rest

    def __set__(self, row, numbers):
        skipped = next((i for i, x in enumerate(numbers) if x != -100), len(numbers))
        setattr(row, self.place, array(self.code, [skipped, *numbers[skipped:]]).tobytes())


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
