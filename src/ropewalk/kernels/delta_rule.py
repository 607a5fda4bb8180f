"""The gated delta rule over a few ids that follow a state, in one piece: a question about a document that has been read.

Source: "Gated Delta Networks", Yang et al., 2024, equation 8 and appendix: with k and q of length 1, decays a_t = exp(g_t) and rates b_t,

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T        o_t = S_t^T q_t / sqrt(D)

Within one piece everything hangs on the state before it, so that what the rule corrects, u, solves one triangular system, and the state
is read once, by keys and queries together. transformers' rule for many pieces solves two systems per piece and fills up the last one.
`plain` is the twin. Legend: B texts, T ids, K key heads, H value heads (each key head serves H / K beside each other), D, V sizes of a
key and a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST = 64  # ids of one piece: the system grows with their square
_EPSILON = 1e-6  # of a key's and a query's length
_GONE = -60.0  # a log of decay: 1e-26 is left, and beyond it exp and products take many times as long, for nothing


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, unit: bool
) -> tuple[Tensor, Tensor]:
    """query, key [B, T, K, D], value [B, T, H, V], g (log of the decay), beta [B, T, H], state [B, H, D, V], of zeros if None
    -> what is read [B, T, H, V] in the query's dtype, and the state after it in float32. unit: keys and queries are brought to length 1.
    """
    length, heads = value.shape[1], value.shape[2]
    rows = torch.stack([key, query], dim=1).float()  # [B, 2, T, K, D]
    if unit:
        rows = rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + _EPSILON)
    rows = rows.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, K, 2T, D]: keys, then queries
    keys = rows[:, :, :length]
    alike = rows @ keys.transpose(-1, -2)  # [B, K, 2T, T]
    total = g.float().transpose(1, 2).cumsum(-1)  # [B, H, T]: log of the decay since the piece began
    # from id j to id i [B, H, T, T]; what lies above the diagonal is not read
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp_(_GONE, 0).exp_()
    each = heads // key.shape[2]
    if each > 1:
        rows, keys, alike = (t.repeat_interleave(each, dim=1) for t in (rows, keys, alike))
    rate, since = beta.float().transpose(1, 2).unsqueeze(-1), total.clamp(min=_GONE).exp_().unsqueeze(-1)  # [B, H, T, 1]
    wanted = value.float().transpose(1, 2)
    if state is not None:
        state = state.float()
        held = rows @ state  # [B, H, 2T, V]
        wanted = wanted - since * held[:, :, :length]
    system = alike[:, :, :length] * between * rate  # its diagonal counts as 1
    new = torch.linalg.solve_triangular(system, wanted * rate, upper=False, unitriangular=True)  # u [B, H, T, V]
    out = (alike[:, :, length:] * between).tril_() @ new
    left = (total[..., -1:] - total).clamp_(min=_GONE).exp_().unsqueeze(-1)  # of every id's decay, at the end of the piece
    after = (keys * left).transpose(-1, -2) @ new
    if state is not None:
        out = out + since * held[:, :, length:]
        after = after + since[:, :, -1:] * state
    return (out * key.shape[-1] ** -0.5).transpose(1, 2).to(query.dtype).contiguous(), after


def plain(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, unit: bool
) -> tuple[Tensor, Tensor]:
    """Id after id, as it is written above."""
    each = value.shape[2] // key.shape[2]
    keys, queries = (t.float().repeat_interleave(each, dim=2) for t in (key, query))
    if unit:
        keys, queries = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + _EPSILON) for t in (keys, queries))
    if state is None:
        state = torch.zeros(*value[:, 0].shape[:2], key.shape[-1], value.shape[-1], device=value.device)
    state, outs = state.float(), []
    for t in range(value.shape[1]):
        k, decayed = keys[:, t].unsqueeze(-1), state * g[:, t].float().exp()[..., None, None]
        wrong = value[:, t].float().unsqueeze(-2) - (decayed * k).sum(-2, keepdim=True)
        state = decayed + beta[:, t].float()[..., None, None] * k * wrong
        outs.append((state * queries[:, t].unsqueeze(-1)).sum(-2) * key.shape[-1] ** -0.5)
    return torch.stack(outs, dim=1).to(query.dtype), state
