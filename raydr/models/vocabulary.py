"""A text as weights over the words of a language model's vocabulary: VDR's encoder, and its sparse and binary views.

A position's hidden state is normalised anew and multiplied with the input word embeddings, from `shift` on; every
dimension keeps its highest value over all positions, and elu1p makes it positive. Dimension j is token id j + shift.
Notable: `[text, token, vocab]` is never whole: the maximum is taken over a few texts of like length at a time, and the
backward pass goes to the positions that won, which the forward pass has noted: a sparse matrix with one entry for each
text and word. Logits are computed in the precision of the weights, all else in float32. Source: Zhou et al. 2024
(arXiv 2212.07699).

    tower = VocabularyTower(AutoModel.from_pretrained(path), shift=999)
    weights = tower(input_ids, attention_mask)
    sparse = weights * (top_mask(weights, 768) | bag_of_tokens(input_ids, shift=999, num_dims=tower.num_dims))
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

MAX_LOGITS = 2**24
"""Logits that are in memory at once, of all texts of a batch together (32 MB in bfloat16)."""
LIKE = 0.8
"""Texts are worked on together that are at least so long as this share of the longest of them."""


def elu1p(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """ELU + 1, which is x + 1 above 0 and e^x below: positive everywhere, with a gradient everywhere (`elu(x) + 1` is 0
    from -17 on, in float32).
    """
    return torch.where(logits > 0, logits + 1, logits.clamp(max=0).exp())


class VocabularyTower(nn.Module):
    """A transformer whose embeddings are weights of the vocabulary's words, all of them positive.

    Args:
        transformer: a transformers model whose output has `last_hidden_state`, and which has word embeddings.
        shift: word ids below it have no dimension (padding, special and unused tokens).
        normalize: whether embeddings have length 1 (VDR: no for texts, yes across modalities).
        pools_padding: whether padding takes part in the maximum, as in the released checkpoints: a text's weights then
            depend on the batch it is in.
        max_logits: how many logits are in memory at once.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        shift: int,
        normalize: bool = False,
        pools_padding: bool = False,
        max_logits: int = MAX_LOGITS,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.shift, self.normalize, self.pools_padding = shift, normalize, pools_padding
        self.max_logits = max_logits
        self.norm = nn.LayerNorm(self._words.shape[1])

    @property
    def _words(self) -> Tensor:
        """The word embeddings, which are trained as output weights as well."""
        transformer: Any = self.transformer
        return transformer.get_input_embeddings().weight

    @property
    def num_dims(self) -> int:
        transformer: Any = self.transformer
        return transformer.config.vocab_size - self.shift

    def forward(
        self, input_ids: Int[Tensor, "text token"], attention_mask: Int[Tensor, "text token"] | None = None
    ) -> Float[Tensor, "text vocab"]:
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        words = self._words[self.shift :]
        hidden = self.norm(hidden.to(self.norm.weight.dtype)).to(words.dtype)
        mask = None if self.pools_padding else attention_mask
        best = highest_over_positions(hidden, words, mask, max_logits=self.max_logits)
        weights = elu1p(best.float())  # monotone, so it makes no difference that it comes after the maximum
        return functional.normalize(weights, dim=1) if self.normalize else weights


def highest_over_positions(
    hidden: Float[Tensor, "text token dim"],
    words: Float[Tensor, "vocab dim"],
    mask: Int[Tensor, "text token"] | None,
    *,
    max_logits: int = MAX_LOGITS,
) -> Float[Tensor, "text vocab"]:
    """Each word's highest logit over the positions whose mask is 1 (None: all); `max_logits` are in memory at once."""
    best: Any = _HighestOverPositions.apply(hidden, words, mask, max_logits)
    return best


class _HighestOverPositions(torch.autograd.Function):
    """`(hidden @ words.T).amax(dim=1)` over the positions whose mask is 1, piece by piece."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "text token dim"],
        words: Float[Tensor, "vocab dim"],
        mask: Int[Tensor, "text token"] | None,
        max_logits: int,
    ) -> Float[Tensor, "text vocab"]:
        num_texts, num_tokens, _ = hidden.shape
        lengths = [num_tokens] * num_texts
        if mask is not None:  # up to the last position that counts
            lengths = (mask.ne(0) * torch.arange(1, num_tokens + 1, device=mask.device)).amax(dim=1).tolist()
        best = hidden.new_full((num_texts, len(words)), float("-inf"))
        place = torch.zeros_like(best, dtype=torch.int32)
        for rows, start, end in _pieces(lengths, max(1, max_logits // len(words))):
            texts = torch.tensor(rows, device=hidden.device)
            logits = hidden[texts, start:end] @ words.T
            if mask is not None:
                logits.masked_fill_(mask[texts, start:end, None] == 0, float("-inf"))
            top, position = logits.max(dim=1)
            before = best[texts]
            is_better = top > before
            best[texts] = torch.where(is_better, top, before)
            place[texts] = torch.where(is_better, (position + start).int(), place[texts])
        ctx.save_for_backward(hidden, words, place)
        return best

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        hidden, words, place = ctx.saved_tensors
        num_texts, num_tokens, _ = hidden.shape
        # Of a text's logits of one word, only the highest has a gradient: a sparse matrix, a row for each token.
        token = place + num_tokens * torch.arange(num_texts, device=place.device)[:, None]
        word = torch.arange(len(words), device=place.device).expand_as(token)
        of_logits = torch.sparse_coo_tensor(
            torch.stack([token.flatten(), word.flatten()]),
            gradient.flatten().float(),
            (num_texts * num_tokens, len(words)),
            check_invariants=False,
        )
        of_hidden = (of_logits @ words.float()).view_as(hidden).to(hidden.dtype)
        of_words = None
        if ctx.needs_input_grad[1]:  # not where only adapters are trained
            of_words = (of_logits.t() @ hidden.flatten(0, 1).float()).to(words.dtype)
        return of_hidden, of_words, None, None


def _pieces(lengths: list[int], at_once: int) -> Iterator[tuple[list[int], int, int]]:
    """Texts of like length, and a span of their positions, `at_once` positions of all of them together."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    while order:
        longest = lengths[order[-1]]
        like = sum(lengths[row] >= LIKE * longest for row in order)
        num = min(like, max(1, at_once // max(1, longest)))
        rows = order[-num:]
        del order[-num:]
        width = max(1, at_once // num)
        for start in range(0, longest, width):
            yield rows, start, min(start + width, longest)


def top_mask(weights: Float[Tensor, "text vocab"], k: int) -> Bool[Tensor, "text vocab"]:
    """Where the `k` largest weights of each text are (all of them, where there are no more)."""
    mask = torch.zeros_like(weights, dtype=torch.bool)
    return mask.scatter_(1, weights.topk(min(k, weights.shape[1]), dim=1).indices, value=True)


def bag_of_tokens(
    ids: Int[Tensor, "text token"],
    mask: Int[Tensor, "text token"] | None = None,
    *,
    shift: int,
    num_dims: int,
    special: Collection[int] = (),
) -> Bool[Tensor, "text vocab"]:
    """Which words a text has, however often: its bag of tokens, without padding and the ids `special`."""
    counted = ids >= shift
    if mask is not None:
        counted = counted & (mask != 0)
    if special:
        counted = counted & ~torch.isin(ids, torch.tensor(sorted(special), device=ids.device))
    # What does not count goes to a column of its own, which is cut off.
    columns = torch.where(counted, ids - shift, num_dims)
    bag = torch.zeros(len(ids), num_dims + 1, dtype=torch.bool, device=ids.device)
    return bag.scatter_(1, columns, value=True)[:, :num_dims]
