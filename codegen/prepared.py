"""Packed weights in the CPU engine's order, kept for as long as their tensors live.

A weight is brought into that order at its first product, and again once a buffer was edited,
replaced or loaded over: every call compares addresses and version counters. What torch does not
count goes unnoticed: edits through `.data` or NumPy, and of inference tensors (`forget` them).
"""

from __future__ import annotations

import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_void_p
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sparsefx.codegen import native
from sparsefx.codegen.active_ranks import PLAIN, Ranks
from sparsefx.codegen.native import TYPES
from sparsefx.ir.codecs import Int
from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import add_branch, round_activations

T = TypeVar("T")
Current = Callable[[Sequence[Tensor]], bool]
"""Tells whether tensors are still those of which something was made."""
CALL = struct.Struct("PPqqqiiiiP").pack
"""`native.Call` as bytes, x to bias: cheaper than setting a structure's fields."""
VERSION = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]


class Entry(Generic[T]):
    """What was made of some tensors."""

    __slots__ = ("current", "refs", "value")

    def __init__(
        self,
        tensors: Sequence[Tensor],
        make: Callable[[Current], T],
        dropped: Callable[[object], None],
    ) -> None:
        self.refs = [weakref.ref(tensor, dropped) for tensor in tensors]
        self.current = unchanged(tensors)
        self.value = make(self.current)


def unchanged(tensors: Sequence[Tensor]) -> Current:
    """Tells whether tensors are these, with the same memory and version.

    It runs at every call, so what most formats have, 2 or 3 buffers, is written out: 0.3 µs less.
    """
    counted = not any(tensor.is_inference() for tensor in tensors)
    count: Callable[[Tensor], int] = VERSION if counted else id
    state = [(id(tensor), tensor.data_ptr(), count(tensor)) for tensor in tensors]
    keys, places, counts = ([*column] for column in zip(*state, strict=True))
    (a, a_at, a_count), (b, b_at, b_count), (c, c_at, c_count), *_ = [*state, *[(0, 0, 0)] * 3]

    def two(given: Sequence[Tensor]) -> bool:
        if len(given) != 2:
            return False
        s, t = given
        return (
            id(s) == a and id(t) == b
            and s.data_ptr() == a_at and t.data_ptr() == b_at
            and count(s) == a_count and count(t) == b_count
        )  # fmt: skip

    def three(given: Sequence[Tensor]) -> bool:
        if len(given) != 3:
            return False
        s, t, u = given
        return (
            id(s) == a and id(t) == b and id(u) == c
            and s.data_ptr() == a_at and t.data_ptr() == b_at and u.data_ptr() == c_at
            and count(s) == a_count and count(t) == b_count and count(u) == c_count
        )  # fmt: skip

    def several(given: Sequence[Tensor]) -> bool:
        return (
            [*map(id, given)] == keys
            and [tensor.data_ptr() for tensor in given] == places
            and [*map(count, given)] == counts
        )

    return {2: two, 3: three}.get(len(tensors), several)


class Store(Generic[T]):
    """Values by the tensors they were made of. A value goes when one of its tensors does."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry[T]] = {}
        self._lock = threading.Lock()

    def find(self, tensors: Sequence[Tensor]) -> T | None:
        """The value made of `tensors` as they are now."""
        entry = self.entries.get(id(tensors[0]))
        return None if entry is None or not entry.current(tensors) else entry.value

    def get(
        self,
        tensors: Sequence[Tensor],
        make: Callable[[Current], T],
        fits: Callable[[T], bool],
    ) -> T:
        """The value of `tensors` if it fits, else a new one in its place."""
        with self._lock, torch.no_grad():
            found = self.find(tensors)
            if found is not None and fits(found):
                return found
            key, entries = id(tensors[0]), self.entries

            def dropped(_: object) -> None:
                entries.pop(key, None)

            entries[key] = entry = Entry(tensors, make, dropped)
            return entry.value


class Product:
    """One weight that the engine holds ready."""

    def __init__(self, engine: native.Engine, packed: Packed, current: Current, rows: int) -> None:
        self.format, self.n, self.k = packed.format, packed.n, packed.k
        self.weight = engine.pack(packed)
        self.branches = Branches(engine)
        self._by = partial(linear_by, self.weight, packed.format, current, self.branches)
        self.any_rows = self._by(sys.maxsize)
        """`sparsefx::linear`, None where the weight or what is asked for is another."""
        self.rows, self.rival = -1, ""
        """The number of rows from which on another kernel serves, and its name if it is known."""
        self.serve(rows, "")

    def serve(self, rows: int, rival: str) -> None:
        """Let `linear` be `any_rows` for less than `rows` rows of x, and None from there on."""
        self.rival = rival
        if rows != self.rows:
            self.rows, self.linear = rows, self._by(rows)

    def packs(self, packed: Packed) -> bool:
        """It was made of the same tensors, and reads them in the same way."""
        return (self.format, self.n, self.k) == (packed.format, packed.n, packed.k)


def linear_by(
    weight: native.Weight, fmt: Format, current: Current, branches: Branches, limit: int
) -> Callable[..., Tensor | None]:
    """`Product.linear`: a closure, which at every call takes 0.7 µs less than a method."""
    text, own_n, own_k, group = str(fmt), weight.n, weight.k, fmt.a8_group
    a8 = fmt.a8 and isinstance(fmt.codec, Int)
    rounds = fmt.a8 and not a8
    run, handle, error = weight.engine.run, c_void_p(weight.handle), weight.engine.error
    call, kinds, threads, branch_call = CALL, TYPES.get, torch.get_num_threads, branches.call

    def linear(
        x: Tensor, buffers: Sequence[Tensor], bias: Tensor | None, branch: Sequence[Tensor],
        format: str, n: int,
    ) -> Tensor | None:  # fmt: skip
        shape, kind = x.shape, kinds(x.dtype)
        if kind is None or shape[-1] != own_k or n != own_n or format != text:
            return None
        m = shape[0] if len(shape) == 2 else x.numel() // own_k
        if m >= limit or not current(buffers):
            return None
        y = x.new_empty(m, n) if len(shape) == 2 else x.new_empty(*shape[:-1], n)
        rows = round_activations(x, group) if rounds else x
        if not rows.is_contiguous():
            rows = rows.contiguous()
        bias_at, rest, held = 0, PLAIN, None
        if bias is not None:
            bias = vector(bias, n, x.dtype)
            bias_at = bias.data_ptr()
        if branch and not rounds:
            rest, held = branch_call(branch)
        head = call(rows.data_ptr(), y.data_ptr(), m, own_k, n, kind, a8, 0, threads(), bias_at)
        if run(handle, head + rest, error):
            raise WeightError(f"the CPU engine refuses: {error.value.decode()}")
        return add_branch(y, x, branch) if branch and held is None else y

    return linear


class Branches:
    """The branches that one weight meets, packed for the engine.

    Graphs that transpose or concatenate matrices make new tensors at every call, and packing those
    takes ten times a product. So after `AT_SIGHT` branches another is packed when it comes again.
    """

    AT_SIGHT = 2

    def __init__(self, engine: native.Engine) -> None:
        self.engine, self.packed, self._lock = engine, 0, threading.Lock()

    def call(self, branch: Sequence[Tensor], last: bool = True) -> tuple[bytes, object]:
        """The end of a call that adds the branch and what must outlive it, None to add it after.

        Of several ways to compute one product the `last` counts how often a branch came.
        What is trained is edited between calls: packing it would cost more than it gains.
        """
        down, up, scale = branch
        if down.requires_grad or up.requires_grad:
            return PLAIN, None
        entry = PACKED.get(id(down))
        if entry is None or not entry.current((down, up)):
            ranks = self._ranks((down, up), last)
            if ranks is None:
                return PLAIN, None
        else:
            ranks = entry.value
            held, version, place, found = ranks.last  # here, not in `active`: 0.3 µs at every call
            if scale is held and VERSION(scale) == version and scale.data_ptr() == place:
                return found.rest, found
        found = ranks.active(branch)
        return found.rest, found

    def _ranks(self, pair: tuple[Tensor, Tensor], last: bool) -> Ranks | None:
        """For matrices of which nothing is held; None where they may never come again."""
        with self._lock:  # threads that meet one branch at once count it as one
            if found := BRANCHES.find(pair):
                return found
            if self.packed >= self.AT_SIGHT and SIGHTED.find(pair) is None:
                if last:
                    SIGHTED.get(pair, lambda current: True, bool)
                return None
            self.packed += 1
            return BRANCHES.get(pair, lambda current: Ranks(self.engine), lambda found: True)


def vector(values: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """`values` as `length` numbers of `dtype` side by side."""
    if values.dtype is dtype and values.numel() == length and values.is_contiguous():
        return values
    return values.to(dtype).expand(length).contiguous()


PRODUCTS: Store[Product] = Store()
JOINED: Store[Callable[..., list[Tensor] | None]] = Store()
"""Several weights of one call (`codegen.fused`), by the buffers of all; quickly made anew."""
BRANCHES: Store[Ranks] = Store()
PACKED = BRANCHES.entries
SIGHTED: Store[bool] = Store()
"""Matrices of branches that were met once and not packed."""


def forget(tensors: Iterable[Tensor]) -> None:
    """Make anew what was made of these: for edits that torch does not count."""
    for tensor in tensors:
        PRODUCTS.entries.pop(id(tensor), None)
        BRANCHES.entries.pop(id(tensor), None)
        SIGHTED.entries.pop(id(tensor), None)
    JOINED.entries.clear()
