"""Codes of 1 to 8 bits as one little-endian bit stream: eight codes fill `bits` bytes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def stream_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 stream of the low `bits` bits of every code, first code in the lowest bits."""
    flat = codes.reshape(-1).to(torch.uint8)
    size = stream_bytes(flat.numel(), bits)
    if bits == 8:
        return flat.clone()
    flat = F.pad(flat & ((1 << bits) - 1), (0, -flat.numel() % 8))
    per_byte = 8 // bits if 8 % bits == 0 else 0
    if per_byte:
        lanes = flat.view(-1, per_byte)
        out = lanes[:, 0].clone()
        for i in range(1, per_byte):
            out |= lanes[:, i] << (i * bits)
        return out[:size]
    lanes = flat.view(-1, 8).to(torch.int64)
    word = torch.zeros(lanes.shape[0], dtype=torch.int64, device=flat.device)
    for i in range(8):
        word |= lanes[:, i] << (i * bits)
    parts = [((word >> (8 * i)) & 255).to(torch.uint8) for i in range(bits)]
    return torch.stack(parts, dim=1).reshape(-1)[:size]


def unpack_bits(stream: Tensor, bits: int, count: int, signed: bool = False) -> Tensor:
    """Codes of shape (count,), uint8 or (two's complement) int8; the inverse of `pack_bits`."""
    dtype = torch.int8 if signed else torch.uint8
    if bits == 8:
        return stream.view(dtype)[:count]
    if 8 % bits == 0:
        table = _table(bits, signed).to(stream.device)
        return table.index_select(0, stream.int()).view(dtype)[:count]
    groups = -(-count // 8)
    raw = F.pad(stream, (0, groups * bits - stream.numel())).view(groups, bits).to(torch.int64)
    word = torch.zeros(groups, dtype=torch.int64, device=stream.device)
    for i in range(bits):
        word |= raw[:, i] << (8 * i)
    codes = torch.empty(groups, 8, dtype=dtype, device=stream.device)
    for i in range(8):
        codes[:, i] = (word << (64 - bits * (i + 1))) >> (64 - bits)
    if not signed:
        codes &= (1 << bits) - 1
    return codes.view(-1)[:count]


@lru_cache
def _table(bits: int, signed: bool) -> Tensor:
    """The codes of each of the 256 bytes, side by side in one integer per byte."""
    shifts = torch.arange(0, 8, bits)
    codes = (torch.arange(256)[:, None] >> shifts) & ((1 << bits) - 1)
    if signed:
        sign = 1 << (bits - 1)
        codes = (codes ^ sign) - sign
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[8 // bits]
    return codes.to(torch.int8).view(word).flatten()
