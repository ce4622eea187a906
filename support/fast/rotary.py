"""
Rotary positions (arXiv 2104.09864), also for contexts beyond the pretrained length:

    linear    slows down all pairs of a head by one factor
    llama3    slows down the slow pairs (arXiv 2407.21783, section 3.4.2, and its code)
    yarn      slows down the slow pairs and sharpens attention (arXiv 2309.00071, section 3.2)
    dynamic   changes only rotations beyond the trained length, which model.py does not support
"""

import math

import torch


def frequencies(rope, head_dim):
    """
    (the angle by which each pair of a head turns per position, (head_dim / 2,) in fp32; the factor
    on cos and sin). rope: {"rope_type", "rope_theta", and the numbers that the type needs}.
    """
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if rope["rope_type"] in ("default", "dynamic"):
        return plain, 1.0
    slowed = plain / rope["factor"]
    if rope["rope_type"] == "linear":
        return slowed, 1.0

    if rope["rope_type"] == "yarn":
        keep, scale = yarn_ramp(rope, head_dim), yarn_scale(rope)
    else:
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
        keep, scale = ((turns - low) / (high - low)).clamp(0, 1), 1.0
    return (1 - keep) * slowed + keep * plain, scale


def yarn_ramp(rope, d):
    """The share of its frequency that each pair keeps, (d / 2,): 1 for fast, 0 for slow pairs."""
    trained = rope["original_max_position_embeddings"]

    def pair_that_turns(times):  # the index, not rounded, of the pair that turns so often
        return d * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first = pair_that_turns(rope.get("beta_fast") or 32)
    last = pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    return 1 - ((torch.arange(d // 2) - first) / max(last - first, 0.001)).clamp(0, 1)


def yarn_scale(rope):
    """YaRN's factor on cos and sin: given explicitly, or computed from the scaling factor."""
    factor = rope["factor"]

    def sharpening(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return sharpening(rope["mscale"]) / sharpening(rope["mscale_all_dim"])
    return sharpening(1)


def angles(positions, frequencies, scale, dtype):
    """cos and sin of the angles of tokens at positions, (T,): (T, 1, head_dim) each."""
    frequencies = frequencies.to(positions.device, non_blocking=True)
    turned = torch.outer(positions.float(), frequencies).repeat(1, 2)[:, None]  # (T, 1, head_dim)
    return (scale * turned.cos()).to(dtype), (scale * turned.sin()).to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + head_dim/2]) by its position's angle. x: (…, T, H, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
