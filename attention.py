"""A window into LLaVA's attention: how question tokens look at image tokens, with gradient.

Fused attention (SDPA) is fast because it never writes down the [S, S] matrix of attention, and so
it has none to show. transformers can return the matrix ("eager"), but then all of it, in every
layer, at a multiple of the memory. We want a corner: how T question tokens see P image tokens.

                    before | image | question | answer
                   +-------+-------+-------------------+
    a question row |       | keep  |                   |     softmax(q k^T / sqrt(D)) over the
                   +-------+-------+-------------------+     WHOLE row, then its image part

transformers calls attention functions by name, and lets us register our own. Ours calls SDPA as
before, so that logits do not change by a single bit; beside it, in the chosen layers, it computes
these T rows: T x S numbers per head instead of S x S. The queries and keys it is given have their
rotary positions applied already.

Letters: B batch, S sequence, P image tokens, T question tokens, L captured layers, H heads, D width
of a head.
"""

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_capture = None  # the capture_attention block that is open, if any


def _attention(module, query, key, value, attention_mask, dropout=0.0, **kwargs):
    """query [B, H, S, D], key and value [B, key heads, S, D] -> [B, S, H, D], no matrix."""
    # Generation reads the question in its first call, with S queries; later calls have one each.
    if _capture is not None and query.shape[2] == _capture.length:
        _capture.record(module.layer_idx, query, key, attention_mask, kwargs.get("scaling"))
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, **kwargs
    )


# Registered under one name in both places: without the second, no padding mask would be built.
ALL_ATTENTION_FUNCTIONS.register("capture", _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("capture", sdpa_mask)


class capture_attention:
    """Keep the attention of question tokens to image tokens, with gradient, of one forward pass.

        with capture_attention(llava.model, 4, rows, batch["image_mask"]) as maps:
            out = llava.forward(batch)
            attention, row_mask = maps()           # [B, L, H, T, P] float32, [B, T] bool
            (out.loss + penalty(attention)).backward()

    layers: the last n decoder layers. rows, image_mask: [B, S] bool, where the question tokens of
    interest and the image tokens are in the padded batch.

    attention[b, :, :, t] belongs to the t-th such token of sample b and sums to the share of its
    attention that goes to the image (the rest goes to text). Where row_mask is False there is no
    such token, or no image, and the numbers are zero.

    One forward or generate per block, and backward inside it: gradient checkpointing runs the
    layers again during backward, and must find the same operations.
    """

    def __init__(self, model, layers, rows, image_mask):
        depth = model.config.text_config.num_hidden_layers
        if not 0 < layers <= depth:
            raise ValueError(f"layers = {layers}, but the language model has {depth}")
        images = image_mask.sum(1)  # image tokens per sample: P, or 0 in a sample without an image
        if ((images != 0) & (images != images.max())).any():
            raise ValueError(f"unequal numbers of image tokens in a batch: {images.tolist()}")
        self.layers, self.length, self.maps = range(depth - layers, depth), rows.shape[1], {}
        self.row_index, real = _positions(rows)  # [B, T]
        self.column_index, _ = _positions(image_mask)  # [B, P]
        self.row_mask = real & (images > 0)[:, None]  # [B, T]
        self.batch_index = torch.arange(len(rows), device=rows.device)[:, None]  # [B, 1]

    def __enter__(self):
        global _capture
        if _capture is not None:
            raise RuntimeError("capture_attention blocks do not nest")
        _capture = self
        return self

    def __exit__(self, *_):
        global _capture
        _capture = None

    def record(self, layer, query, key, attention_mask, scaling):
        """The corner of one layer's attention. query [B, H, S, D], key [B, key heads, S, D]."""
        if layer not in self.layers:
            return
        (B, H, S, D), heads, T = query.shape, key.shape[1], self.row_index.shape[1]
        # One index operation takes the T rows out: [B, S, H, D] -> [B, T, H, D] -> [B, H, T, D].
        q = query.transpose(1, 2)[self.batch_index, self.row_index].transpose(1, 2).float()
        # Grouped-query attention: H / heads neighboring query heads share a key head. Their rows
        # go into one matrix product, which spares us repeating the keys.
        q = (q * scaling).reshape(B, heads, H // heads * T, D)
        scores = (q @ key.float().transpose(2, 3)).view(B, H, T, S)
        if attention_mask is None:  # no padding: SDPA is told "causal", which we spell out
            sees = torch.arange(S, device=q.device) <= self.row_index[:, :, None]  # [B, T, S]
        else:  # [B, 1, S, S], True where a row may look
            sees = attention_mask[:, 0].expand(B, -1, -1)[self.batch_index, self.row_index]
        # Adding 0 or -inf is one pass; masked_fill on the scores would cost another in backward.
        barrier = torch.zeros(sees.shape, device=q.device).masked_fill_(~sees, float("-inf"))
        rows = (scores + barrier[:, None]).softmax(-1)  # [B, H, T, S]
        columns = self.column_index[:, None, None].expand(B, H, T, -1)
        corner = rows.gather(-1, columns) * self.row_mask[:, None, :, None]  # [B, H, T, P]
        # A checkpointed layer comes by again in backward: same work, but the first result stays.
        self.maps.setdefault(layer, corner)

    def __call__(self):
        """attention [B, L, H, T, P] float32 with its gradient, row_mask [B, T] bool."""
        if len(self.maps) < len(self.layers):
            raise RuntimeError("no forward pass has run in this capture_attention block")
        return torch.stack([self.maps[layer] for layer in self.layers], dim=1), self.row_mask


def _positions(mask):
    """mask [B, S] -> positions of its True entries [B, most in a row], and which of them are real.

    Shorter rows are filled up with the last position. That is never left padding, whose attention
    has nothing to look at: a softmax of nothing is NaN, and NaN times zero is NaN.
    """
    S = mask.shape[1]
    index = torch.arange(S, device=mask.device).expand_as(mask).masked_fill(~mask, S)
    index = index.sort(dim=1).values[:, : int(mask.sum(1).max())]
    return index.clamp(max=S - 1), index < S


def one_pass_per_block():
    if _capture is not None and _capture.maps:
        raise RuntimeError("this capture_attention block already holds a forward pass")
