"""Implicit attention maps as three nested loops, from the definitions; and the recurrences themselves, step by step."""

import torch


def literal_prefix_products(a):
    """[step] -> [step, step]."""
    steps = len(a)
    out = torch.zeros(steps, steps, dtype=a.dtype)
    for t in range(steps):
        for s in range(t + 1):
            product = torch.ones((), dtype=a.dtype)
            for r in range(s + 1, t + 1):
                product = product * a[r]
            out[t, s] = product
    return out


def literal_selective_map(a, b, c):
    """Each [step, channel, state] -> [channel, step, step]."""
    steps, channels, states = a.shape
    out = torch.zeros(channels, steps, steps, dtype=torch.result_type(a, b))
    for i in range(channels):
        for n in range(states):
            products = literal_prefix_products(a[:, i, n])
            for t in range(steps):
                for s in range(t + 1):
                    out[i, t, s] += c[t, i, n] * products[t, s] * b[s, i, n]
    return out


def selective_scan(a, b, c, u):
    """Each [.., step, channel, state], u [.., step, channel] -> [.., step, channel]."""
    h, out = torch.zeros_like((a * b * c)[..., 0, :, :]), []
    for t in range(a.shape[-3]):
        h = a[..., t, :, :] * h + b[..., t, :, :] * u[..., t, :, None]
        out.append((c[..., t, :, :] * h).sum(-1))
    return torch.stack(out, -2)


def delta_scan(q, k, v, beta):
    """q, k [step, key], v [step, value], beta [step] -> [step, value]."""
    state, out = torch.zeros(v.shape[1], k.shape[1], dtype=k.dtype), []
    for t in range(len(k)):
        state = state + beta[t] * torch.outer(v[t] - state @ k[t], k[t])
        out.append(state @ q[t])
    return torch.stack(out)


def literal_delta_map(q, k, beta):
    """[step, key], [step] -> [step, step]."""
    steps, width = k.shape
    out = torch.zeros(steps, steps, dtype=k.dtype)
    for t in range(steps):
        for s in range(t + 1):
            left = beta[s] * k[s]
            for r in range(s + 1, t + 1):
                left = left @ (torch.eye(width, dtype=k.dtype) - beta[r] * torch.outer(k[r], k[r]))
            out[t, s] = left @ q[t]
    return out
