import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

def time_features(
    t:Tensor,        # Times, shape (B,)
    dim:int,         # Number of features, even
    flip:bool=False, # Cosines first?
    shift:float=1,   # 1: frequencies fall from 1 to exactly 1e-4
)->Tensor:           # float32, shape (B, dim), in [-1, 1]
    """Sines and cosines of `t` at many frequencies
    ([Vaswani et al. 2017](https://arxiv.org/abs/1706.03762), section 3.5)."""
    half = dim // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    freq = torch.exp(-math.log(1e4) / (half - shift) * i)
    angle = t.float()[:, None] * freq
    both = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
    return torch.cat(both, 1)

class TimeEmbedding(nn.Module):
    "Two linear layers, (B, c) -> (B, 4c)."
    def __init__(self, c):
        super().__init__()
        self.linear_1 = nn.Linear(c, 4 * c)
        self.linear_2 = nn.Linear(4 * c, 4 * c)

    def forward(self, f): return self.linear_2(F.silu(self.linear_1(f)))

class ResnetBlock(nn.Module):
    "Two convolutions with the time added between them, around a shortcut."
    def __init__(self,
        c_in:int,         # Channels in
        c_out:int,        # Channels out
        c_time:int,       # Width of the time embedding
        groups:int=8,     # Groups of the group norms
        dropout:float=0., # Share of activations dropped
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, 1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, 1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h += self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        h += self.conv_shortcut(x)
        return h

class Attention(nn.Module):
    "Self-attention between the pixels of a feature map, added to its input."
    def __init__(self,
        c:int,             # Channels
        head_dim:int=None, # Channels of one head; None: a single head
        groups:int=8,      # Groups of the group norm
    ):
        super().__init__()
        self.heads = c // (head_dim or c)
        self.group_norm = nn.GroupNorm(groups, c, 1e-6)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):                                  # (B, c, H, W)
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # pixels in a row, (B, HW, c)
        split = lambda v: v.unflatten(2, (self.heads, -1)).transpose(1, 2)
        h = F.scaled_dot_product_attention(
            split(self.to_q(h)), split(self.to_k(h)), split(self.to_v(h)))
        h = self.to_out[0](h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])

class Downsample(nn.Module):
    "Half the height and width, by a convolution with stride 2."
    def __init__(self, c):
        super().__init__()
        self.pad = (0, 1, 0, 1) # right and below only, as DDPM does
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x): return self.conv(F.pad(x, self.pad))

class Upsample(nn.Module):
    "Twice the height and width: repeat each pixel, then convolve."
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x): return self.conv(F.interpolate(x, scale_factor=2., mode="nearest"))

class DownBlock(nn.Module):
    "A level on the way down: residual blocks, then half the size."
    def __init__(self,
        c_in:int,    # Channels in
        c_out:int,   # Channels of this level
        n:int,       # Residual blocks
        res,         # `res(c_in, c_out)` makes a residual block
        att,         # `att(c)` makes an attention, or nn.Identity
        down:bool,   # Half the size at the end?
    ):
        super().__init__()
        self.resnets = nn.ModuleList(res(c_out if i else c_in, c_out) for i in range(n))
        self.attentions = nn.ModuleList(att(c_out) for _ in range(n))
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if down else [])

    def forward(self, x, emb): # -> output, list of skips
        skips = []
        for r, a in zip(self.resnets, self.attentions):
            x = a(r(x, emb))
            skips.append(x)
        for d in self.downsamplers:
            x = d(x)
            skips.append(x)
        return x, skips

class MidBlock(nn.Module):
    "The bottom: residual block, attention, residual block."
    def __init__(self, c, res, att):
        super().__init__()
        self.resnets = nn.ModuleList([res(c, c), res(c, c)])
        self.attentions = nn.ModuleList([att(c)])

    def forward(self, x, emb):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, emb)), emb)

class UpBlock(nn.Module):
    "A level on the way up: join a skip, residual block; then twice the size."
    def __init__(self,
        c_in:int,       # Channels in
        c_skips:tuple,  # Channels of the skips, in the order of use
        c_out:int,      # Channels of this level
        res,            # As in `DownBlock`
        att,            # As in `DownBlock`
        up:bool,        # Twice the size at the end?
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            res((c_out if i else c_in) + c, c_out) for i, c in enumerate(c_skips))
        self.attentions = nn.ModuleList(att(c_out) for _ in c_skips)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x, skips, emb): # the last skip is used first
        for r, a, skip in zip(self.resnets, self.attentions, reversed(skips)):
            x = a(r(torch.cat([x, skip], 1), emb))
        for u in self.upsamplers: x = u(x)
        return x
