"""What only the model of a million weights needs, which the demonstration on a laptop trains."""
import torch
import torch.nn as nn


@torch.no_grad()
def draw_copying(model, seed):
    """Draws weights that copy: blocks 0 and 1 hold an induction circuit (arXiv 2209.11895) before any training.

    Head 0 of block 0 looks one token back and head 1 two tokens. Each writes the embedding of the token it finds, seen
    in D directions V, into D other directions: U[0] and U[1]. In block 1 both heads ask for the places that come after
    the same two tokens, and write what stands there in the directions W: what followed the last time is what comes
    next. Learned from random weights this takes millions of tokens; so drawn, the model gets 80 % of a repeated random
    text right before the first step. All other weights are drawn small. Raises ValueError for a shape without room.
    """
    config = model.config
    C, D = config.hidden_size, config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    if C < 4 * D or config.num_hidden_layers < 2 or D < 16 or group != 2:
        raise ValueError("copying needs 2 blocks, 4 heads of width 16 or more, and 2 query heads for each key head, "
                         f"found {config}")

    # 1. Everything else is small.
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = C ** -0.5
            if "embed" in name:
                std = 0.1
            elif "o_proj" in name or "down" in name:
                std = 0.005
            nn.init.normal_(p, std=std, generator=generator)

    # 2. Four sets of D orthogonal directions, each (C, D), and a rotation of one of them.
    basis = torch.linalg.qr(torch.randn(C, C, generator=generator))[0]
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    V, W, *U = basis[:, :4 * D].split(D, dim=1)

    # 3. Block 0 looks back. With a on the fastest rotary pairs, R(i) a . R(j) R(1) a is largest at j = i - 1: biases of
    # queries and keys alone tell how far back a head looks.
    look_back = model.model.layers[0].self_attn
    speed = config.rope_theta ** (torch.arange(0, 6, 2) / -D)                   # of the three fastest pairs
    fast_rows = torch.cat([torch.arange(3), torch.arange(3) + D // 2])
    look_back.k_proj.weight[:D] *= 0.3
    look_back.k_proj.bias[fast_rows] = 8 * torch.cat([speed.cos(), speed.sin()])
    look_back.v_proj.weight[:D] = V.T
    for head in range(group):
        rows = torch.arange(head * D, (head + 1) * D)
        angle = head * speed
        look_back.q_proj.weight[rows] *= 0.3
        look_back.q_proj.bias[rows[fast_rows]] = 8 * torch.cat([angle.cos(), -angle.sin()])
        look_back.o_proj.weight[:, rows] = 0.2 * U[head]

    # 4. Block 1 copies: what is here and before it is looked for in U[0] and, turned, U[1], through the slow rotary
    # pairs alone, which hardly tell one place from another.
    copy = model.model.layers[1].self_attn
    slow = (torch.arange(D) % (D // 2) >= 5).float()[:, None]
    copy.k_proj.weight[:D] = slow * (3 * U[0].T + turn @ U[1].T)
    copy.v_proj.weight[:D] = W.T
    for head in range(group):
        rows = torch.arange(head * D, (head + 1) * D)
        copy.q_proj.weight[rows] = slow * (3 * V.T + turn @ U[0].T)
        copy.o_proj.weight[:, rows] = 1.6 * W
