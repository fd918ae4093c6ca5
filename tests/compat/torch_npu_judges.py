"""What torch_npu's documentation says that its operators compute, in plain torch, in the dtype of what comes."""

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x, cos, sin):
    """Pairs side by side in x [..., d] go to halves: y = halves * cos + (-second, first) * sin."""
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    first, second = halves.chunk(2, -1)
    return halves * cos + torch.cat((-second, first), -1) * sin


def kv_rows(kv, gamma, cos, sin, eps):
    """(keys [B, S, rope], latents [B, S, latent])."""
    latent, key = kv[:, 0].split((gamma.shape[0], kv.shape[3] - gamma.shape[0]), -1)
    return rope(key, cos[:, 0], sin[:, 0]), rms_norm(latent, gamma, eps)


def prolog(x, dq, uq_qr, uk, dkv_kr, gamma_cq, gamma_ckv, sin, cos, *, eps_cq, eps_ckv, q_scale, k_scale):
    """query, query_rope, c_q, latents and keys of x [..., He]."""
    heads, nope, latent = uk.shape
    c_q = q_scale * rms_norm(x @ dq, gamma_cq, eps_cq)
    q_c, q_r = (c_q @ uq_qr).unflatten(-1, (heads, -1)).split((nope, sin.shape[-1]), -1)
    query = torch.einsum("...nd,ndc->...nc", q_c, uk)
    kv = x @ dkv_kr
    latents = k_scale * rms_norm(kv[..., :latent], gamma_ckv, eps_ckv)
    return query, rope(q_r, cos[..., None, :], sin[..., None, :]), c_q, latents, rope(kv[..., latent:], cos, sin)


def attention(q, k, v, scale, seen):
    """out [S, N, D], lse [S, N] of q [S, N, d], k [L, N, d], v [L, N, D] where seen [S, L]; 0 and -inf of no keys."""
    scores = torch.einsum("snd,lnd->snl", q, k) * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~seen[:, None], 0.0)
    return torch.einsum("snl,lnd->snd", weights, v), lse


def visible(queries, keys, mode, window=None):
    """[S, L]: mode 0 every key, 3 those up to the query, the last at the last; 4 of these the newest ``window``."""
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None]
    if mode == 0:
        return torch.ones(queries, keys, dtype=torch.bool)
    return (key <= place) & (key > place - (window if mode == 4 else keys + queries))


def paged(pages, row, length):
    """[length, width] of pages [blocks, size, width]."""
    return pages[row.long()].flatten(0, 1)[:length]


def indexer(q, k, weights, seen):
    """[S, L] scores, -inf where not seen."""
    scores = torch.einsum("sn,snl->sl", weights, torch.relu(torch.einsum("snd,ld->snl", q, k)))
    return scores.masked_fill(~seen, float("-inf"))


def gating(x, k, bias, k_group, group_count, select, norm_type, factor, eps, table=None):
    """(weights [T, k], ids [T, k], scores [T, E])."""
    scores = x.sigmoid() if norm_type == 1 else x.softmax(-1)
    if table is None:
        choice = scores if bias is None else scores + bias
        groups = choice.unflatten(1, (group_count, -1))
        rank = groups.topk(2, -1).values.sum(-1) if select else groups.amax(-1)
        kept = torch.zeros(rank.shape, dtype=torch.bool).scatter(1, rank.topk(k_group, -1).indices, True)
        ids = groups.masked_fill(~kept[..., None], float("-inf")).flatten(1).topk(k, -1).indices
    else:
        ids = table.long()
    y = scores.gather(1, ids)
    if norm_type == 1:
        y = y / (y.sum(-1, keepdim=True) + eps)
    return y * factor, ids, scores


def init_routing(x, expert_idx, first, end, row_idx_type):
    """(rows in order, expanded_row_idx, counts of the range): pairs of the range by expert, in their order."""
    top_k = expert_idx.shape[1]
    flat = expert_idx.flatten().tolist()
    order = [pair for expert in range(first, end) for pair, one in enumerate(flat) if one == expert]
    index = list(order)
    if row_idx_type == 0:
        index = [order.index(pair) if pair in order else -1 for pair in range(len(flat))]
    counts = [flat.count(expert) for expert in range(first, end)]
    return x[torch.tensor([pair // top_k for pair in order], dtype=torch.long)], index, counts


def finalize(rows, skip1, skip2, bias, scales, place, experts):
    """Token by token; ``place`` [T][K] rows, -1 for none."""
    out = torch.zeros(len(place), rows.shape[1], dtype=rows.dtype)
    for token, slots in enumerate(place):
        for slot, row in enumerate(slots):
            if row >= 0:
                value = rows[row] + (0 if bias is None else bias[experts[token][slot]])
                out[token] += scales[token][slot] * value
        for skip in (skip1, skip2):
            if skip is not None:
                out[token] += skip[token]
    return out
