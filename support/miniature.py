"""What only the model of a million weights needs, which the demonstration on a laptop trains."""
import torch
import torch.nn as nn


@torch.no_grad()
def draw_copying(model, seed):
    """Random weights that copy: an induction circuit (arXiv 2209.11895) stands in blocks 0 and 1 from the start.

    In block 0 the first query head looks one token back, the second two. Their biases do it: with a on the fastest
    rotary pairs, R(i) a . R(j) R(1) a is largest at j = i - 1. They write that token's embedding, seen in D
    directions V, into D other directions each, U_1 and U_2. In block 1 those heads ask by V and, turned, by U_1 (what
    is here, and before it) and find by U_1 and U_2 the places that come after the same two tokens, through slow
    pairs alone, which hardly turn; and they write what stands there. So what followed the last time is what comes
    next. Found by training alone this takes millions of tokens. Here 80 % of a repeated random text is right before
    the first step. Everything else is drawn small.
    """
    c, generator = model.config, torch.Generator().manual_seed(seed)
    C, D, group = c.hidden_size, c.head_dim, c.num_attention_heads // c.num_key_value_heads
    if C < 4 * D or c.num_hidden_layers < 2 or D < 16 or group != 2:
        raise ValueError("copying needs 2 blocks, 4 heads of width 16 or more, and 2 query heads for each key head, "
                         f"found {c}")
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.1 if "embed" in name else 0.005 if "o_proj" in name or "down" in name else C ** -0.5
            nn.init.normal_(p, std=std, generator=generator)
    basis = torch.linalg.qr(torch.randn(C, C, generator=generator))[0]
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    V, W, *U = (basis[:, i * D:(i + 1) * D] for i in range(4))       # each (C, D)
    before, after = (block.self_attn for block in model.model.layers[:2])
    fast = c.rope_theta ** (torch.arange(0, 6, 2) / -D)
    first = torch.cat([torch.arange(3), torch.arange(3) + D // 2])         # the rows of the three fastest pairs
    slow = (torch.arange(D) % (D // 2) >= 5).float()[:, None]
    before.k_proj.weight[:D] *= 0.3
    before.k_proj.bias[first] = 8 * torch.cat([fast.cos(), fast.sin()])
    before.v_proj.weight[:D], after.v_proj.weight[:D] = V.T, W.T
    after.k_proj.weight[:D] = slow * (3 * U[0].T + turn @ U[1].T)
    for back, rows in enumerate(torch.arange(group * D).split(D)):
        before.q_proj.weight[rows] *= 0.3
        before.q_proj.bias[rows[first]] = 8 * torch.cat([(back * fast).cos(), -(back * fast).sin()])
        before.o_proj.weight[:, rows] = 0.2 * U[back]
        after.q_proj.weight[rows] = slow * (3 * V.T + turn @ U[0].T)
        after.o_proj.weight[:, rows] = 1.6 * W
