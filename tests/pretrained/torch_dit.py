"""A DiT in PyTorch whose parameters have the released names: what converted weights are compared with."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.pretrained.position_table import position_table


class Attention(nn.Module):
    """Self-attention with a fused projection; `fused`: by PyTorch's own kernel, as newer versions of timm have it."""

    fused = False

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            attended = torch.softmax(q @ k.mT / (width / self.num_heads) ** 0.5, dim=-1) @ v
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two layers with the tanh form of GELU between them."""

    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """adaLN-Zero."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.attn, self.mlp = Attention(width, num_heads), Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(norm(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(norm(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    """To the pixels of a patch."""

    def __init__(self, width, features):
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(norm(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


class TorchDiT(nn.Module):
    """x [B, C, H, H], t [B], labels [B] -> [B, 2C, H, H]."""

    def __init__(self, depth, width, num_heads, patch_size, num_classes, height=32, channels=4):
        super().__init__()
        self.patch_size = patch_size
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch_size, patch_size)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2 * 2 * channels)
        table = position_table(height // patch_size, width)
        self.register_buffer("pos_embed", torch.from_numpy(table.astype(np.float32))[None])

    def forward(self, x, t, labels):
        height, p = x.shape[-1], self.patch_size
        x = self.x_embedder.proj(x).flatten(2).mT + self.pos_embed
        angles = t[:, None].float() * torch.exp(-np.log(10_000) * torch.arange(128) / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        c = c + self.y_embedder.embedding_table(labels)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).view(len(x), height // p, height // p, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, height)


def random_dit(seed=0, scale=0.02, **shape):
    """Returns one with every parameter random: no zero-initialised layer hides what is behind it."""
    torch.manual_seed(seed)
    model = TorchDiT(**shape)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=scale)
    return model.eval().requires_grad_(False)
