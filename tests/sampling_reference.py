"""Samplers written from their definitions in float64, slowly: what cmr.sampling is compared with."""

import numpy as np


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def entropy(p):
    return float(-sum(q * np.log(q) for q in p if q > 0))


def in_order(ids, x):
    order = sorted(range(len(ids)), key=lambda i: (-x[i], ids[i]))
    return ids[order], x[order]


def top_k(ids, x, k):
    ids, x = in_order(ids, x)
    return ids[:k], x[:k]


def top_p(ids, x, mass):
    ids, x = in_order(ids, x)
    total, kept = 0.0, 0
    for p in softmax(x):
        total += p
        kept += 1
        if total >= mass:
            break
    return ids[:kept], x[:kept]


def min_p(ids, x, share):
    keep = x >= x.max() + np.log(share)
    return ids[keep], x[keep]


def typical(ids, x, mass):
    ids, x = in_order(ids, x)
    p = softmax(x)
    level = entropy(p)
    with np.errstate(divide="ignore"):
        distance = np.abs(-np.log(p) - level)
    total, keep = 0.0, []
    for i in sorted(range(len(ids)), key=lambda i: (distance[i], i)):
        keep.append(i)
        total += p[i]
        if total > mass:
            break
    keep = sorted(keep)
    return ids[keep], x[keep]


def xtc(ids, x, threshold):
    """What the sampler does when its coin says so."""
    ids, x = in_order(ids, x)
    reach = int((softmax(x) >= threshold).sum())
    return ids[max(reach - 1, 0) :], x[max(reach - 1, 0) :]


def temperature(ids, x, heat, spread=0.0, exponent=1.0):
    if spread > 0:
        if len(ids) < 2:
            return ids, x
        level = entropy(softmax(x)) / np.log(len(ids))
        low = max(heat - spread, 0.0)
        heat = low + (heat + spread - low) * level**exponent
    return ids, x / max(heat, 1e-6)


def top_n_sigma(ids, x, count):
    finite = x[x > -np.inf]
    return ids, np.where(x < finite.max() - count * finite.std(), -np.inf, x)


def penalties(ids, x, history, last_n, repeat, presence, frequency):
    recent = list(history)[-last_n:] if last_n > 0 else list(history) if last_n < 0 else []
    x = x.copy()
    for i, token in enumerate(ids):
        count = recent.count(token)
        if count:
            x[i] = x[i] / repeat if x[i] > 0 else x[i] * repeat
            x[i] -= count * frequency + presence
    return ids, x


def dry(ids, x, history, multiplier, base, allowed, last_n, breakers):
    """breakers: sequences of tokens; a passage may not reach back over the last complete one."""
    tail = list(history)[-last_n:] if last_n > 0 else list(history)
    limit = len(tail)
    for start in range(len(tail) - 1, -1, -1):
        fits = [b for b in breakers if tuple(tail[start : start + len(b)]) == tuple(b)]
        if fits:
            limit = len(tail) - start - max(len(b) for b in fits)
            break
    x = x.copy()
    if len(tail) <= allowed or limit < allowed:
        return ids, x
    for i, token in enumerate(ids):
        longest = -1
        for place in range(1, len(tail)):
            if tail[place] == token:
                size = 0
                while size < place and tail[place - 1 - size] == tail[-1 - size]:
                    size += 1
                longest = max(longest, min(size, limit))
        if longest >= allowed and (token,) not in {tuple(b) for b in breakers}:
            x[i] -= multiplier * base ** (longest - allowed)
    return ids, x


def mirostat_1(ids, x, mu, n_vocab):
    ids, x = in_order(ids, x)
    p = softmax(x)[:100]
    steps = np.log([(i + 2) / (i + 1) for i in range(len(p) - 1)])
    falls = np.log(p[:-1] / p[1:])
    s = (steps * falls).sum() / (steps**2).sum()
    k = ((s - 1) * 2**mu / (1 - n_vocab ** -(s - 1))) ** (1 / s)
    k = max(int(min(k, len(ids))), 1)
    return ids[:k], x[:k]


def mirostat_2(ids, x, mu):
    ids, x = in_order(ids, x)
    keep = max(int((-np.log2(softmax(x)) <= mu).sum()), 1)
    return ids[:keep], x[:keep]


def chain(logits, s, history=(), coin=False, breakers=()):
    """Apply the samplers of settings s in their order; coin is what xtc draws. Returns {token: p}."""
    ids, x = np.arange(len(logits)), np.asarray(logits, np.float64).copy()
    for token, bias in s.logit_bias.items():
        x[token] += bias
    for name in s.samplers:
        if name == "penalties" and s.repeat_last_n:
            amounts = s.repeat_penalty, s.presence_penalty, s.frequency_penalty
            ids, x = penalties(ids, x, history, s.repeat_last_n, *amounts)
        elif name == "dry" and s.dry_multiplier and s.dry_penalty_last_n:
            amounts = s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n
            ids, x = dry(ids, x, history, *amounts, breakers)
        elif name == "top_n_sigma" and s.top_n_sigma > 0:
            ids, x = top_n_sigma(ids, x, s.top_n_sigma)
        elif name == "top_k" and s.top_k > 0:
            ids, x = top_k(ids, x, s.top_k)
        elif name == "typ_p" and s.typical_p < 1:
            ids, x = typical(ids, x, s.typical_p)
        elif name == "top_p" and s.top_p < 1:
            ids, x = top_p(ids, x, s.top_p)
        elif name == "min_p" and s.min_p > 0:
            ids, x = min_p(ids, x, s.min_p)
        elif name == "xtc" and coin:
            ids, x = xtc(ids, x, s.xtc_threshold)
        elif name == "temperature":
            ids, x = temperature(ids, x, s.temp, s.dynatemp_range, s.dynatemp_exponent)
    return dict(zip(ids.tolist(), softmax(x).tolist()))
