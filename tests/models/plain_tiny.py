"""The tiny video model once more, in float64 numpy: loops over layers, frames and heads, weights from a plain dict.

Written from the description of the network, without its code: what the two agree on is not an accident.
"""

import math

import numpy as np


def predict_clean(weights, config, x, t, text, mask, lora=None, scale=1.0):
    """Clean latents [b f h w c] from noisy ones with one time a frame [b f]."""
    return np.stack(
        [
            _row(weights, config, *(np.float64(v[i]) for v in (x, t, text)), np.asarray(mask[i]), lora, scale)
            for i in range(len(x))
        ]
    )


def _row(weights, config, x, t, text, mask, lora, scale):
    def linear(path, value, layer=None):
        node, change = weights, lora
        for name in path.split("."):
            node = node[name]
            change = None if change is None else change.get(name)
        kernel, bias = np.float64(node["kernel"]), np.float64(node.get("bias", 0.0))
        a, b = (0.0, 0.0) if change is None else (np.float64(change["a"]), np.float64(change["b"]))
        if layer is not None:
            kernel, bias = kernel[layer], bias[layer]
            a, b = (a, b) if change is None else (a[layer], b[layer])
        low = 0.0 if change is None else scale * (value @ a @ b)
        return value @ kernel + low + bias

    def attention(name, layer, queries, source, seen, turn):
        q, k, v = (linear(f"blocks.{name}.{n}", s, layer) for n, s in (("q", queries), ("k", source), ("v", source)))
        norms = [np.float64(weights["blocks"][name][n][layer]) for n in ("q_norm", "k_norm")]
        size = config.width // config.heads
        out = np.zeros_like(q)
        for h in range(config.heads):
            part = slice(h * size, (h + 1) * size)
            qh, kh = rms(q[:, part]) * norms[0], rms(k[:, part]) * norms[1]
            if turn is not None:
                qh, kh = turn(qh), turn(kh)
            scores = qh @ kh.T / math.sqrt(size)
            scores[:, ~seen] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, part] = share / share.sum(-1, keepdims=True) @ v[:, part]
        return linear(f"blocks.{name}.out", out, layer)

    frames, height, width, channels = x.shape
    per_frame = height * width
    places = [(f, i, j) for f in range(frames) for i in range(height) for j in range(width)]

    text = linear("text_out", silu(linear("text_in", text)))
    pooled = linear("pooled", text[mask].mean(0))
    waves = [1000.0 * t[:, None] * 10_000 ** (-np.arange(128) / 128)]
    waves = np.concatenate([np.cos(waves[0]), np.sin(waves[0])], axis=-1)
    time = linear("time_out", silu(linear("time_in", waves))) + pooled
    shared = linear("time_table", silu(time)).reshape(frames, 6, config.width)

    h = np.stack([linear("patch", x[p]) + linear("place", place_features(p, config.grid)) for p in places])
    for layer in range(config.depth):
        table = shared + np.float64(weights["blocks"]["table"][layer])
        shift1, scale1, gate1, shift2, scale2, gate2 = (table[:, i].repeat(per_frame, axis=0) for i in range(6))
        inner = rms(h) * (1 + scale1) + shift1
        turn = lambda values: np.stack([rotate(v, p, config.rope_dims) for v, p in zip(values, places, strict=True)])  # noqa: E731
        h = h + gate1 * attention("self_attention", layer, inner, inner, np.ones(len(places), bool), turn)
        h = h + attention("cross_attention", layer, rms(h), text, mask, None)
        inner = rms(h) * (1 + scale2) + shift2
        h = h + gate2 * linear("blocks.mlp.down", gelu(linear("blocks.mlp.up", inner, layer)), layer)
    table = linear("head_table", silu(time))
    shift, gain = (table[:, i * config.width : (i + 1) * config.width].repeat(per_frame, axis=0) for i in range(2))
    h = gelu(linear("head_in", rms(h) * (1 + gain) + shift))
    return linear("head", h).reshape(frames, height, width, channels) + x[:1]  # the scene, and what changes


def place_features(place, grid):
    """Sinusoids of time (8), row (16) and column (16), from half a wave over the axis upwards in octaves."""
    features = []
    for position, count, size in zip(place, grid, (8, 16, 16), strict=True):
        angles = [position * math.pi / count * 2.0 ** (octave - 1) for octave in range(size // 2)]
        features += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return np.array(features)


def rotate(vector, place, dims, theta=100.0):
    """Rotary embedding of one head's vector at one place: a pair of entries is a complex number."""
    numbers = vector[0::2] + 1j * vector[1::2]
    angles = [p * theta ** (-2 * i / d) for p, d in zip(place, dims, strict=True) for i in range(d // 2)]
    numbers = numbers * np.exp(1j * np.array(angles))
    return np.stack([numbers.real, numbers.imag], axis=-1).ravel()


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
