"""A U-Net in PyTorch whose parameters have CompVis' names: what converted weights are compared with."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def norm(channels, groups, eps=1e-5):
    return nn.GroupNorm(groups, channels, eps=eps)


class Downsample(nn.Module):
    """A convolution of stride 2, a pixel of zeros on every side."""

    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


class ResBlock(nn.Module):
    """Reads an embedding; may resize what it takes."""

    def __init__(self, inputs, outputs, embedding, groups, scale_shift, resize=None):
        super().__init__()
        self.in_layers = nn.Sequential(norm(inputs, groups), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, (1 + scale_shift) * outputs))
        layers = norm(outputs, groups), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(*layers)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.scale_shift, self.resize = scale_shift, resize

    def forward(self, x, embedding):
        first_norm, swish, first = self.in_layers
        h = swish(first_norm(x))
        if self.resize == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resize == "up":
            x, h = F.interpolate(x, scale_factor=2), F.interpolate(h, scale_factor=2)
        h, outputs = first(h), self.emb_layers(embedding)[:, :, None, None]
        second_norm, rest = self.out_layers[0], self.out_layers[1:]
        if self.scale_shift:
            scale, shift = outputs.chunk(2, dim=1)
            h = second_norm(h) * (1 + scale) + shift
        else:
            h = second_norm(h + outputs)
        return self.skip_connection(x) + rest(h)


def attend(q, k, v):
    """q, k, v: [B, heads, T or S, d]."""
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v


class AttentionBlock(nn.Module):
    """Self-attention whose projection has q, k and v of one head after another."""

    def __init__(self, channels, num_heads, groups):
        super().__init__()
        self.norm, self.num_heads = norm(channels, groups), num_heads
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x).flatten(2)).view(batch, self.num_heads, 3, channels // self.num_heads, -1)
        q, k, v = qkv.mT.unbind(2)  # [B, heads, T, d]
        return x + self.proj_out(attend(q, k, v).mT.reshape(batch, channels, -1)).view(x.shape)


class CrossAttention(nn.Module):
    """To tokens, or to x itself."""

    def __init__(self, channels, context, num_heads):
        super().__init__()
        self.num_heads, self.to_q = num_heads, nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, channels, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x, tokens):
        q, k, v = (
            y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(tokens), self.to_v(tokens))
        )
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class GatedLinear(nn.Module):
    """Values times GELU of gates."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.proj = nn.Linear(inputs, 2 * outputs)

    def forward(self, x):
        values, gates = self.proj(x).chunk(2, dim=-1)
        return values * F.gelu(gates)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, MLP."""

    def __init__(self, channels, context, num_heads):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, num_heads)
        self.attn2 = CrossAttention(channels, context, num_heads)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(
            GatedLinear(channels, 4 * channels), nn.Dropout(0.0), nn.Linear(4 * channels, channels)
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks between two 1x1 convolutions."""

    def __init__(self, channels, context, num_heads, depth, groups):
        super().__init__()
        self.norm = norm(channels, groups, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context, num_heads) for _ in range(depth))

    def forward(self, x, context):
        h = self.proj_in(self.norm(x)).flatten(2).mT
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.mT.reshape(x.shape))


class TorchUNet(nn.Module):
    """x [B, C, H, W], t [B], labels [B] or context [B, S, E] -> [B, outputs, H, W].

    `classes` rows of labels: of vectors, or, where there is a context, of tokens that `class_tokens` holds.
    """

    def __init__(
        self, channels, outputs, base, multipliers, blocks, attention_levels, num_heads,
        context=None, depth=1, scale_shift=False, updown=False, classes=None, groups=32,
    ):  # fmt: skip
        super().__init__()
        embedding, widths = 4 * base, [base * multiplier for multiplier in multipliers]
        self.base = base
        self.time_embed = nn.Sequential(nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if classes and context is None:
            self.label_emb = nn.Embedding(classes, embedding)

        def res(inputs, outputs, resize=None):
            return ResBlock(inputs, outputs, embedding, groups, scale_shift, resize)

        def attention(width):
            heads = num_heads(width)
            if context is None:
                return AttentionBlock(width, heads, groups)
            return SpatialTransformer(width, context, heads, depth, groups)

        places, skips, width = [[nn.Conv2d(channels, base, 3, padding=1)]], [base], base
        for level, outputs_here in enumerate(widths):
            for _ in range(blocks):
                places.append([res(width, outputs_here)] + [attention(outputs_here)] * (level in attention_levels))
                width = outputs_here
                skips.append(width)
            if level < len(widths) - 1:
                places.append([res(width, width, "down") if updown else Downsample(width)])
                skips.append(width)
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, places))
        self.middle_block = nn.ModuleList([res(width, width), attention(width), res(width, width)])
        places = []
        for level, outputs_here in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                layers = [res(width + skips.pop(), outputs_here)]
                width = outputs_here
                layers += [attention(width)] * (level in attention_levels)
                if level and i == blocks:
                    layers.append(res(width, width, "up") if updown else Upsample(width))
                places.append(layers)
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, places))
        self.out = nn.Sequential(norm(base, groups), nn.SiLU(), nn.Conv2d(base, outputs, 3, padding=1))

    def forward(self, x, t, labels=None, context=None):
        half = self.base // 2
        angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if hasattr(self, "label_emb"):
            embedding = embedding + self.label_emb(labels)

        def run(layers, x):
            for layer in layers:
                extra = {ResBlock: [embedding], SpatialTransformer: [context]}.get(type(layer), [])
                x = layer(x, *extra)
            return x

        skips = []
        for layers in self.input_blocks:
            x = run(layers, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for layers in self.output_blocks:
            x = run(layers, torch.cat([x, skips.pop()], dim=1))
        return self.out(x)


def randomized(model, seed=0):
    """Returns a model with every parameter random, so that activations neither vanish nor grow with depth."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else (2 / parameter[0].numel()) ** 0.5)
        if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
            parameter.data += 1
    return model.eval().requires_grad_(False)
