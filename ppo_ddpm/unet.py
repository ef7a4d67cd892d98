from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    Attention, DownBlock, MidBlock, ResnetBlock, TimeEmbedding, UpBlock, time_features)

class UNet(nn.Module):
    """The network of DDPM: `unet(x, t)` is the noise in `x`
    ([Ho et al. 2020](https://arxiv.org/abs/2006.11239), appendix B)."""
    def __init__(self,
        size:int=8,              # Height and width of the pictures
        in_channels:int=1,       # 1: grey, 3: RGB
        channels:tuple=(24, 48), # Channels of each level; the size is halved between them
        n_blocks:int=1,          # Residual blocks of a level
        attn:tuple=(4,),         # Sizes at which there is attention; the bottom always has it
        attn_up:tuple=None,      # The same on the way up; None: as on the way down
        dropout:float=0.,        # Share of activations dropped; 0 for fine-tuning
        head_dim:int=None,       # Channels of an attention head; None: one head
        groups:int=8,            # Groups of the group norms
    ):
        super().__init__()
        attn_up = attn if attn_up is None else attn_up
        self.config = dict(
            size=size, in_channels=in_channels, channels=tuple(channels), n_blocks=n_blocks,
            attn=tuple(attn), attn_up=tuple(attn_up), dropout=dropout, head_dim=head_dim, groups=groups)
        check_unet(**self.config)
        self.flip, self.shift = False, 1 # of `time_features`
        res = partial(ResnetBlock, c_time=4 * channels[0], groups=groups, dropout=dropout)
        att = partial(Attention, head_dim=head_dim, groups=groups)
        self.build(res, att)
        self.to(memory_format=torch.channels_last) # faster on a CPU and on tensor cores

    def build(self, res, att):
        "Make the layers."
        c = self.config
        channels, n = c["channels"], len(c["channels"])
        here = lambda i, sizes: att if c["size"] // 2**i in sizes else lambda _: nn.Identity()
        self.conv_in = nn.Conv2d(c["in_channels"], channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0])
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        above = channels[0]
        for i, ch in enumerate(channels):
            self.down_blocks.append(
                DownBlock(above, ch, c["n_blocks"], res, here(i, c["attn"]), down=i < n - 1))
            above = ch
        self.mid_block = MidBlock(channels[-1], res, att)
        below = channels[-1]
        for i, ch in reversed(list(enumerate(channels))):
            skips = (*[ch] * c["n_blocks"], channels[max(i - 1, 0)])
            self.up_blocks.append(UpBlock(below, skips, ch, res, here(i, c["attn_up"]), up=i > 0))
            below = ch
        self.conv_norm_out = nn.GroupNorm(c["groups"], channels[0], 1e-6)
        self.conv_out = nn.Conv2d(channels[0], c["in_channels"], 3, padding=1)

    def forward(self,
        x:Tensor, # Noisy pictures, shape (B, in_channels, size, size)
        t,        # Times, 0-based: shape (B,), or one number for all
    )->Tensor:    # Predicted noise, shape of `x`
        "The noise in `x` at time `t`."
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        f = time_features(t, self.config["channels"][0], self.flip, self.shift)
        emb = F.silu(self.time_embedding(f.to(self.conv_in.weight.dtype)))
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            h, new = block(h, emb)
            skips += new
        h = self.mid_block(h, emb)
        for block in self.up_blocks:
            n = len(block.resnets)
            h = block(h, skips[-n:], emb)
            skips = skips[:-n]
        return self.conv_out(F.silu(self.conv_norm_out(h)))

def check_unet(size, channels, attn, attn_up, **_):
    "ValueError for sizes that do not fit together."
    n = len(channels)
    if size % 2 ** (n - 1):
        raise ValueError(
            f"size {size} cannot be halved {n - 1} times for {n} levels of channels; "
            f"give a multiple of {2 ** (n - 1)}")
    sizes = [size // 2**i for i in range(n)]
    if bad := [s for s in (*attn, *attn_up) if s not in sizes]:
        raise ValueError(
            f"attention is asked for at size {bad[0]}, but the levels have sizes "
            f"{', '.join(map(str, sizes))}; choose among these")
