"""Rows of a batch laid end to end, so that no layer computes padding, or a token twice."""

import os

import torch


class Rows:
    """
    Token sequences laid end to end, (N,). The P tokens with which all rows begin come first, once:
    causal attention computes the same for a shared beginning in every row, so its keys and values
    serve all rows. rows: B lists of token ids of any lengths.
    """

    MIN_SHARED = 8  # tokens; for fewer, a second attention call costs more than it saves

    def __init__(self, rows, device):
        shared = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)
        self.shared = shared if len(rows) > 1 and shared >= self.MIN_SHARED else 0  # P
        own = [row[self.shared :] for row in rows]
        lengths = torch.tensor([len(row) for row in own])
        self.longest = max(map(len, own))  # S

        columns = torch.arange(self.longest)
        real = columns < lengths[:, None]  # (B, S), False where a row would be padded
        self.starts = lengths.cumsum(0) - lengths + self.shared  # of each row's own tokens, (B,)
        self.ragged = not real.all()
        if self.ragged:
            places = (self.starts - self.shared)[:, None] + columns * real
            self.padded = places.flatten().to(device)  # (B·S,) own token of each place
            self.packed = real.flatten().nonzero()[:, 0].to(device)  # place of each own token

        ids = [*rows[0][: self.shared], *(token for row in own for token in row)]
        own_positions = (self.shared + columns).expand_as(real)[real]
        positions = torch.cat((torch.arange(self.shared), own_positions))
        self.ids, self.positions = torch.tensor(ids).to(device), positions.to(device)  # (N,)

    def find(self, row, position):
        """Where tokens are: rows and positions, both (n,), -> places in ids, (n,)."""
        own = self.starts[row] + position - self.shared
        return torch.where(position < self.shared, position, own)

    def unpack(self, x):
        """The rows' own part of x, (N, heads, head_dim), as (B, heads, S, head_dim), padded."""
        own = x[self.shared :]
        if self.ragged:
            own = own.index_select(0, self.padded)
        return own.unflatten(0, (-1, self.longest)).transpose(1, 2)

    def pack(self, y):
        """The inverse of unpack, (N - P, heads, head_dim)."""
        own = y.transpose(1, 2).flatten(0, 1)
        return own.index_select(0, self.packed) if self.ragged else own
