"""A tagger without training: a real token classifier that knows names by their word pieces and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raydr.data.entities import LABELS

NAMES = {
    **dict.fromkeys(("john", "mary", "george", "anna", "peter"), "B-PER"),
    **dict.fromkeys(("smith", "jones", "brown", "clark"), "I-PER"),
    **dict.fromkeys(("new", "london", "paris", "liverpool", "boston"), "B-LOC"),
    "york": "I-LOC",
    **dict.fromkeys(("parliament", "congress"), "B-ORG"),
    **dict.fromkeys(("bible", "olympics"), "B-MISC"),
}
"""Every one is one piece in MiniLM's vocabulary."""


def gazetteer_tagger(folder: Path, names: dict[str, str] = NAMES, *, max_positions: int = 64) -> Path:
    """The tagger as a checkpoint folder: embeddings of the pieces in `names` point at their labels, others nowhere."""
    from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

    from raydr.encoders.checkpoint import locate

    tokenizer: Any = AutoTokenizer.from_pretrained(locate("minilm"))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        num_hidden_layers=0,
        num_attention_heads=1,
        intermediate_size=12,
        max_position_embeddings=max_positions,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    model = BertForTokenClassification(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.bert.embeddings.LayerNorm.weight.fill_(1.0)
        for piece, label in names.items():
            number = tokenizer.convert_tokens_to_ids(piece)
            assert number != tokenizer.unk_token_id, piece
            model.bert.embeddings.word_embeddings.weight[number, LABELS.index(label)] = 1.0
        model.classifier.weight[:, : len(LABELS)] = torch.eye(len(LABELS)) * 4
        model.classifier.bias[0] = 2.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
