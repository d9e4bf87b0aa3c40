"""The engines of the CPU benchmark. A new peer is one function and one line here."""

from __future__ import annotations

from functools import partial

from benchmarks.peers import torch_peers as torch_
from benchmarks.peers.base import Layer, Peer
from benchmarks.peers.executorch_peer import xnnpack_8da4w
from benchmarks.peers.ort_peers import dynamic_quantize_matmul, matmul_nbits
from benchmarks.peers.ours import OURS

REFERENCE = "ORT 4 bit block 128"
READ = "(read only)"
PEERS = [
    Peer("torch fp32", torch_.fp32),
    Peer("torch bf16", torch_.bf16),
    Peer("torch dynamic int8", torch_.dynamic_int8),
    Peer("torch int4pack bf16", torch_.int4pack),
    Peer("ORT 4 bit block 32", partial(matmul_nbits, 4, 32, 4), per_threads=True),
    Peer(REFERENCE, partial(matmul_nbits, 4, 128, 4), per_threads=True),
    Peer("ORT 2 bit block 128", partial(matmul_nbits, 2, 128, 4), per_threads=True),
    Peer("ORT 8 bit block 128", partial(matmul_nbits, 8, 128, 4), per_threads=True),
    Peer("ORT 4 bit block 128 level 1", partial(matmul_nbits, 4, 128, 1), per_threads=True),
    Peer("ORT DynamicQuantizeMatMul", dynamic_quantize_matmul, per_threads=True),
    Peer("ExecuTorch XNNPACK 8da4w", xnnpack_8da4w, per_threads=True),
    Peer("FBGEMM 1x4 sparse int8", torch_.fbgemm_sparse),
    Peer(READ, torch_.read_only),
]
ENGINES = {peer.name: peer for peer in (*OURS, *PEERS)}

__all__ = ["ENGINES", "OURS", "PEERS", "READ", "REFERENCE", "Layer", "Peer"]
