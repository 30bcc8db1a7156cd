"""Faster products for the few rows of a decoding step on a CPU, whose time goes into reading the weights.

In GB/s of fp32 weights, on two cores at the shapes of the 0.5B model, where the memory gives about 30:

    rows                     1     4     8    64
    F.linear                29    13    10     5
    a copy in fp16       37-42    31    25     7
    oneDNN's blocked copy   23    22    20     8

In bf16 on a CPU with AMX, weight @ x^T does about twice the work of F.linear.
"""
import sys
from functools import partial

import torch

from model import Linear

LARGE_BYTES = 2**26                 # of weights, beyond what a processor's cache holds
FEW_ROWS = range(1, 65)             # beyond, F.linear is as fast
FEW_ROWS_BLOCKED = range(4, 65)     # below, F.linear is faster than the blocked copy
ANY_ROWS = range(sys.maxsize)
FP16_EXPONENT = 15                  # of the largest power of two in fp16


def pays(model):
    """Returns whether a model decodes faster when packed: on a CPU, in bf16, or in fp32 where it is large."""
    weight = model.lm_head.weight
    is_large = sum(p.nbytes for p in model.parameters()) > LARGE_BYTES
    return weight.device.type == "cpu" and (
        weight.dtype is torch.bfloat16 or weight.dtype is torch.float32 and is_large)


def pack(model):
    """Gives each Linear of a model its fast product, or gives it anew after the weights have changed.

    A weight in fp32 is copied: to fp16 where that is exact but for a power of two, as it mostly is for a published
    bf16 checkpoint, and otherwise to oneDNN's blocked layout; sums stay in fp32. A weight in bf16 needs no copy.
    """
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.forward = partial(packed_forward, layer, *packed_product(layer))


def packed_forward(layer, rows, product, x, *args, **kwargs):
    """Returns product(x) where it is for so many rows, and else, as with gradients, another dtype or targets, what the
    layer's class computes."""
    plain = args or kwargs or torch.is_grad_enabled() or x.dtype is not layer.weight.dtype
    if plain or x.numel() // x.shape[-1] not in rows:
        return type(layer).forward(layer, x, *args, **kwargs)
    return product(x)


def packed_product(layer):
    """Returns the numbers of rows for which a layer's fast product pays, and the function of x that computes it."""
    if layer.weight.dtype is torch.bfloat16:
        return ANY_ROWS, partial(bf16_product, layer)
    weight = layer.weight.detach()
    bias = layer.bias.detach() if layer.bias is not None else None
    largest = weight.abs().max()
    scale = 2.0 ** (FP16_EXPONENT - torch.frexp(largest).exponent.item())       # the largest is below 2 ** exponent
    has_fp16 = torch.backends.quantized.engine in ("x86", "fbgemm") and largest.isfinite()      # not on aarch64
    if has_fp16 and all(torch.equal((rows * scale).half().float(), rows * scale) for rows in weight.split(4096)):
        scaled_bias = bias * scale if bias is not None else None
        copy = torch.ops.quantized.linear_prepack_fp16(weight * scale, scaled_bias)
        return FEW_ROWS, partial(fp16_product, copy, scale)
    copy = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    return FEW_ROWS_BLOCKED, partial(blocked_product, copy, bias)


def fp16_product(copy, scale, x):
    return torch.ops.quantized.linear_dynamic_fp16(x, copy).div_(scale)


def blocked_product(copy, bias, x):
    return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")


def bf16_product(layer, x):
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) == 1:
        y = torch.mv(layer.weight, flat[0])[None]
    else:
        y = (layer.weight @ flat.T).T
    if layer.bias is not None:
        y = y + layer.bias
    return y.reshape(*x.shape[:-1], -1)
