"""Language models as ONNX files with a cache: a plain loop gives the tokens that eager gives."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sparsefx
from sparsefx.ir.errors import ArtifactError, ExportError
from sparsefx.models.causal_onnx import names, refusal
from sparsefx.runtime.ort_generate import Cache, generate, left_padded, open_session, stream

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
PROMPTS = [[5, 9, 60, 33, 7, 21, 80], [11, 4, 50]]


def llama(**other: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | other))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["dense", "bitmap@50%+int4g32"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A model, its file, and the report of the export."""
    model = llama()
    if request.param != "dense":
        example = {"input_ids": torch.tensor(PROMPTS[:1])}
        sparsefx.sparsify(model, request.param, example_inputs=example, progress=False)
    path = tmp_path_factory.mktemp("causal") / "model.onnx"
    return model, path, sparsefx.export_causal_lm(model, path)


def eager(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of a plain loop that keeps no cache."""
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def test_the_file_keeps_the_convention(pair: Any) -> None:
    model, path, report = pair
    graph = onnx.load(path).graph
    dims = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    batch, new, past = "batch_size", "sequence_length", "past_sequence_length"
    assert [list(dims)[:7], list(dims)[7:]] == list(names(2))
    assert dims["input_ids"] == dims["position_ids"] == [batch, new]
    assert dims["attention_mask"] == [batch, f"{past} + {new}"]
    assert dims["past_key_values.1.value"] == [batch, 2, past, 16]
    assert dims["present.0.key"] == [batch, 2, f"{past} + {new}", 16]
    assert dims["logits"] == [batch, new, 97]
    tried = {row.sizes for row in report.differences}
    assert f"{batch}=2, {new}=3, {past}=0" in tried
    assert f"{batch}=1, {new}=1, {past}=1" in tried
    assert not report.notes
    assert {row.name for row in report.layers} <= {name for name, _ in model.named_modules()}
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_attends_and_normalises_in_few_nodes(pair: Any, tmp_path: Path) -> None:
    _, path, _ = pair
    ops = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert ops["MultiHeadAttention"] == 2
    assert ops["RotaryEmbedding"] == 4
    assert not ops["Softmax"] + ops["Reciprocal"]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert ops["SimplifiedLayerNormalization"] == 5


def test_the_models_own_code_is_as_before(pair: Any) -> None:
    from transformers.models.llama import modeling_llama

    assert inspect.isfunction(modeling_llama.apply_rotary_pos_emb)


def test_tokens_are_those_of_eager(pair: Any) -> None:
    model, path, _ = pair
    for prompt in PROMPTS:
        want = eager(model, prompt, 20)
        assert generate(path, [prompt], 20, eos=[]).tolist() == [want]


def test_prompts_of_different_length_do_not_see_each_other(pair: Any) -> None:
    model, path, _ = pair
    want = [eager(model, prompt, 12) for prompt in PROMPTS]
    assert generate(path, PROMPTS, 12, eos=[]).tolist() == want


def test_a_prompt_read_in_parts_gives_the_same_logits(pair: Any) -> None:
    model, path, _ = pair
    session = open_session(path)
    tokens, mask = left_padded(PROMPTS)
    whole = Cache(session).advance(tokens, mask)
    cache = Cache(session)
    parts = [cache.advance(tokens[:, a:b], mask[:, :b]) for a, b in ((0, 4), (4, 5), (5, 7))]
    joined, real = np.concatenate(parts, 1), mask == 1  # what padding computes is nobody's
    np.testing.assert_allclose(joined[real], whole[real], rtol=0, atol=1e-4 * np.abs(whole).max())
    want = model(torch.tensor(PROMPTS[:1]), use_cache=False).logits.numpy()
    np.testing.assert_allclose(whole[:1], want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_generation_ends_at_the_tokens_that_end_a_text(pair: Any) -> None:
    model, path, _ = pair
    session = open_session(path)
    assert session.get_modelmeta().custom_metadata_map["eos_token_id"] == "2"
    first = eager(model, PROMPTS[0], 6)
    end = first[3]
    stop = first.index(end) + 1
    assert generate(session, PROMPTS[:1], 20, eos=[end]).tolist() == [first[:stop]]
    both = generate(session, PROMPTS, 20, eos=[end])
    assert both[0].tolist() == first[:stop] + [end] * (both.shape[1] - stop)
    assert generate(session, PROMPTS, 0).shape == (2, 0)


def test_sampling_is_seeded_and_keeps_to_the_likeliest(pair: Any) -> None:
    _, path, _ = pair
    session = open_session(path)
    draws = [
        generate(session, PROMPTS, 12, eos=[], temperature=5.0, seed=seed).tolist()
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    greedy = generate(session, PROMPTS, 12, eos=[])
    assert (generate(session, PROMPTS, 12, eos=[], temperature=5.0, top_k=1) == greedy).all()


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_empty_prompts_are_refused(prompts: Any) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        left_padded(prompts)


def test_files_without_a_cache_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no file"):
        open_session(tmp_path / "missing.onnx")
    path = tmp_path / "model.onnx"
    sparsefx.export_onnx(nn.Linear(4, 4), path, torch.ones(2, 4))
    with pytest.raises(ArtifactError, match="export_causal_lm"):
        next(stream(path, PROMPTS))


def windows() -> Any:
    config = transformers.MistralConfig(**SIZES, sliding_window=4)
    return transformers.MistralForCausalLM(config)


def bert() -> Any:
    small = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return transformers.BertModel(transformers.BertConfig(**small))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(4, 4), "none of transformers' causal language models"),
        (bert, "none of transformers' causal language models"),
        (windows, "DynamicSlidingWindowLayer"),
    ],
)
def test_other_models_are_refused_before_anything_is_written(
    make: Any, reason: str, tmp_path: Path
) -> None:
    model = make()
    assert reason in str(refusal(model))
    with pytest.raises(ExportError, match=reason):
        sparsefx.export_causal_lm(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_axes_that_are_sums_must_add_up(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cat([a, a]) + b

    call = {"a": torch.ones(2), "b": torch.ones(4)}
    report = sparsefx.export_onnx(
        Sum(), tmp_path / "m.onnx", call, {"a": {0: "n"}, "b": {0: "n + n"}}
    )
    assert {row.sizes for row in report.differences} == {"n=2", "n=1", "n=3"}
    for shapes in ({"a": {0: "n"}, "b": {0: "n + m"}}, {"a": {0: "n"}, "b": {0: "n"}}):
        with pytest.raises(ExportError, match="the axis named"):
            sparsefx.export_onnx(Sum(), tmp_path / "m.onnx", call, shapes)


def test_on_the_command_line(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    from sparsefx.cli import app

    folder = tmp_path / "model"
    llama(num_hidden_layers=1).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    out = tmp_path / "m.onnx"
    run = CliRunner()
    done = run.invoke(app, ["export", str(folder), "--spec", "int4g32", "--out", str(out)])
    assert done.exit_code == 0, done.output
    options = ["--prompt", "w5 w9 w60", "--tokens", "4", "--tokenizer", str(folder)]
    done = run.invoke(app, ["generate", str(out), *options])
    assert done.exit_code == 0, done.output
    want = generate(out, [[5, 9, 60]], 4)[0]
    assert " ".join(f"w{i}" for i in want if i != 2) in done.output
    assert "tokens/s" in done.output


@pytest.mark.slow
def test_smollm2_says_in_onnxruntime_what_it_says_in_torch(tmp_path: Path) -> None:
    from sparsefx.models.smollm2 import causal_lm, tokenizer

    model: Any = causal_lm()
    prompt = tokenizer()("The capital of France is")["input_ids"]
    example = {"input_ids": torch.tensor([prompt])}
    sparsefx.sparsify(model, "int4g64", example_inputs=example, progress=False)
    report = sparsefx.export_causal_lm(model, tmp_path / "m.onnx")
    assert len(report.layers) == 210
    want = eager(model, prompt, 20)
    other = tokenizer()("Once upon a time, in a small village")["input_ids"]
    assert generate(report.path, [prompt], 20, eos=[]).tolist() == [want]
    assert generate(report.path, [other, prompt], 20, eos=[])[1].tolist() == want
