from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from product_counter import count_products
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from sparsefx.models import MODELS, Bundle, antiberty, minilm, smollm2, text
from sparsefx.models.assets import Asset, MissingAsset, WrongAsset
from sparsefx.models.generate import untie
from sparsefx.models.zoo import ZOO

DENSE = {"smollm2": (8.0, 40.0), "minilm": (0.40, 0.60), "antiberty": (0.97, 1.0)}
"""Where each dense headline must lie on any Python: the help topics differ by version."""


@pytest.fixture(scope="module", params=["minilm", "antiberty"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return loaded(request.param)


def loaded(name: str) -> Bundle:
    try:
        return MODELS[name]()
    except MissingAsset as missing:
        pytest.skip(str(missing))


def test_bundle_is_complete(bundle: Bundle) -> None:
    check_bundle(bundle)


def test_dense_metric(bundle: Bundle) -> None:
    check_metric(bundle)


@pytest.mark.slow
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    bundle = loaded("smollm2")
    check_bundle(bundle)
    check_metric(bundle)
    generated = bundle.model.generate(  # type: ignore[operator]
        **bundle.example_inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    assert generated.past_key_values is not None
    assert len(list(tmp_path.iterdir())) == 1
    again = smollm2.tokenizer()
    sample = "Café 北京\n  x_1 = 3.14  # tabs\tand 🙂"
    assert again.decode(again(sample)["input_ids"]) == sample


def check_bundle(bundle: Bundle) -> None:
    assert not bundle.model.training
    assert all(p.dtype == torch.float32 for p in bundle.model.parameters())
    assert bundle.dynamic_shapes.keys() == bundle.example_inputs.keys()
    batches = bundle.calibration(2)
    assert len(batches) == 2
    assert batches[0].keys() == bundle.example_inputs.keys()
    with pytest.raises(ValueError, match=r"100000 .* asked"):
        bundle.calibration(100_000)
    with torch.no_grad():
        first, second = (bundle.model(**bundle.example_inputs) for _ in range(2))
    assert "past_key_values" not in first
    assert torch.equal(first[0], second[0])


def check_metric(bundle: Bundle) -> None:
    value = bundle.metric(bundle.model)[bundle.headline]
    low, high = DENSE[bundle.name]
    assert low < value < high


def test_padding_does_not_change_antiberty() -> None:
    bundle = loaded("antiberty")
    row = bundle.calibration(1)[0]["input_ids"][:1]
    row = row[:, : int((row != 0).sum())]
    padded = nn.functional.pad(row, (0, 9))
    with torch.no_grad():
        short = bundle.model(input_ids=row).logits
        long = bundle.model(input_ids=padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(long[:, : row.shape[1]], short, atol=1e-4, rtol=1e-4)


def test_antiberty_evaluates_no_gene_it_calibrates_on() -> None:
    folder = antiberty.WEIGHTS
    try:
        tokens = (folder.folder() / "trained_models" / "vocab.txt").read_text().split()
        evaluated, others, animals = antiberty._germlines(antiberty.Vocabulary(tokens))
    except MissingAsset as missing:
        pytest.skip(str(missing))
    assert len(evaluated) == 128
    assert len(others) > 100
    assert len(animals) > 1000
    assert not set(evaluated) & {*others, *animals}, "what is judged on is never calibrated on"


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    class Uniform(nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 77)})

    ids = torch.randint(0, 77, (100,))
    assert smollm2.perplexity(Uniform(), ids, seq_len=16) == pytest.approx(77)


def test_spread_gives_disjoint_windows_or_says_why_not() -> None:
    windows = smollm2.spread(torch.arange(103), 7, 10)
    assert windows.shape == (7, 10)
    assert len(set(windows.flatten().tolist())) == 70
    with pytest.raises(ValueError, match="11 windows of 10 asked, the text holds 1 to 10"):
        smollm2.spread(torch.arange(103), 11, 10)


def test_halves_of_the_topics_share_no_paragraph() -> None:
    calibration, held_out = text.python_topics()
    assert min(len(calibration), len(held_out)) > 80_000
    assert not set(calibration.split("\n\n")) & set(held_out.split("\n\n"))
    assert 200 < len(minilm.cloze_pairs(held_out)) < 1000


def test_docstrings_share_no_paragraph_with_the_topics() -> None:
    found = text.docstrings().split("\n\n")
    assert len(found) == len(set(found)) > 3000
    assert set(found).isdisjoint("\n\n".join(text.python_topics()).split("\n\n"))


def test_minilm_calibrates_on_docstrings_where_topics_do_not_reach() -> None:
    bundle = loaded("minilm")
    few, many = ({tuple(row.tolist()) for b in bundle.calibration(n) for row in b["input_ids"]}
                 for n in (14, 36))  # fmt: skip
    assert len(few) > 0.95 * 14 * 64
    assert len(many) > 0.95 * 36 * 64


def test_antiberty_masks_a_sequence_elsewhere_when_its_turn_comes_again() -> None:
    bundle = loaded("antiberty")
    batches = [batch["input_ids"] for batch in bundle.calibration(180)]
    first, again = batches[0], batches[90]
    mask = 4  # of its vocabulary
    seen = (first != mask) & (again != mask)
    assert torch.equal(first[seen], again[seen])
    assert 0.1 < float((first == mask).float().mean()) < 0.2


def test_a_source_of_another_python_has_no_docstrings(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""Old."""\nprint "2"\n')
    (tmp_path / "b.py").write_text('"""Module."""\ndef f():\n    "Function."\nclass C: x = "no"\n')
    assert text._docstrings_of(tmp_path / "a.py") == []
    assert text._docstrings_of(tmp_path / "b.py") == ["Module.", "Function."]


def test_prose_drops_code_and_titles() -> None:
    sentence = "This is a sentence of more than twelve words, wrapped over\n   two of its lines."
    assert text.prose(f"Title\n*****\n\n{sentence}\n\n   >>> f(x)\n   3") == [
        " ".join(sentence.split())
    ]


def r_strings(lines: list[str]) -> bytes:
    body = struct.pack(">2s4i", b"X\n", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">2i", 16, len(lines))
    for line in lines:
        body += struct.pack(">2i", 0x40009, len(line.encode())) + line.encode()
    return struct.pack(">I", len(body)) + zlib.compress(body)


def test_novels_are_read_from_r_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ["EMMA", "", "It was", "a café.", "", "", "The end"]
    (tmp_path / "Rdata.rdb").write_bytes(r_strings(first) + r_strings(["Persuasion", "Sir"]))
    monkeypatch.setenv("SPARSEFX_AUSTEN", str(tmp_path))
    text._novels.cache_clear()
    try:
        assert text.novel("Emma") == "EMMA\n\nIt was a café.\n\nThe end"
        assert text.novel_as_printed("persuasion") == "Persuasion\nSir"
        with pytest.raises(KeyError, match="emma, persuasion"):
            text.novel("Ulysses")
    finally:
        text._novels.cache_clear()


def test_missing_novels_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEFX_AUSTEN", str(tmp_path))
    text._novels.cache_clear()
    with pytest.raises(MissingAsset, match="apt-get install r-cran-janeaustenr"):
        text.novel("Emma")


def test_asset_not_installed_names_the_command() -> None:
    with pytest.raises(MissingAsset, match=r"pip install --no-deps nothing-here==1\.0"):
        Asset("nothing-here==1.0", "nothing_here", "file", "").locate()


def test_asset_with_another_hash_is_not_opened() -> None:
    asset = Asset("torch==1.0", "torch", "__init__.py", "0" * 64)
    with pytest.raises(WrongAsset, match=f"not {'0' * 64}: pip install --no-deps torch==1.0"):
        asset.locate()


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_zoo_runs_is_deterministic_and_holds_no_unknown_operator(name: str) -> None:
    example, again = ZOO[name](), ZOO[name]()
    assert not any(module.training for module in example.model.modules())
    assert_same(dict(example.model.named_parameters()), dict(again.model.named_parameters()))
    assert_same(example.kwargs, again.kwargs)
    seen = count_products(example.model, example.args, example.kwargs)
    assert seen.counts
    assert not seen.unknown


def assert_same(left: Mapping[str, object], right: Mapping[str, object]) -> None:
    assert left.keys() == right.keys()
    for one, other in zip(tree_leaves(dict(left)), tree_leaves(dict(right)), strict=True):
        same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
        assert same


def test_an_untied_model_changes_its_data_type_as_a_whole() -> None:
    """What the embedding is read as follows `.bfloat16()` and `.float()`."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=32,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = untie(LlamaForCausalLM(config).eval())
    for dtype in (torch.bfloat16, torch.float32):
        assert model.to(dtype)(torch.arange(4)[None]).logits.dtype is dtype
