"""A language model of a billion parameters is compressed in one go inside 12 GB: about an hour.

python tests/test_one_billion.py 3      # the first 3 layers: peak memory and seconds
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import pytest

LIMIT = 12 << 30
"""Bytes that the whole process may hold; more than that it is not given (RLIMIT_DATA)."""
LAYERS = 22


def peak() -> int:
    """Most bytes that were resident; `sparsify` lets it count anew."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compress(layers: int, after: tuple[str, ...] = ()) -> dict[str, float]:
    """Build TinyLlama's shape with random bf16 weights, compress it; parameters, bytes, seconds.

    Without descent, which takes most of the time.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    import torch

    import sparsefx
    from sparsefx.models.torchvision import usable_torchvision

    usable_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    shape: dict[str, Any] = {
        "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "num_hidden_layers": layers,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    torch.set_default_dtype(torch.float32)
    parameters, built = sum(p.numel() for p in model.parameters()), peak()
    batches = [{"input_ids": torch.randint(0, 32000, (1, 256)), "use_cache": False}
               for _ in range(4)]  # fmt: skip
    start = time.perf_counter()
    spec = {"format": "bitmap@50%+int4g128", "after": after}
    sparsefx.sparsify(model, spec, calibration=batches)
    seconds = time.perf_counter() - start
    packed = sum(type(m).__name__ == "SparseLinear" for m in model.modules())
    return {"parameters": parameters, "packed": packed, "peak": max(built, peak()),
            "seconds": seconds}  # fmt: skip


@pytest.mark.slow
def test_a_billion_parameters_inside_12_gb() -> None:
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, __file__, str(LAYERS)], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout)
    print(found)
    assert found["parameters"] > 1e9
    assert found["packed"] == 7 * LAYERS + 1
    assert found["peak"] < LIMIT


if __name__ == "__main__":
    print(json.dumps(compress(int(sys.argv[1]), tuple(sys.argv[2:]))))
