import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Pictures, seeded

class FeatureNet(nn.Module):
    "A small classifier; the 32 standardised numbers before its last layer are the features."
    def __init__(self,
        size=8,        # Side of the pictures in pixels, at least 8
        in_channels=1, # 1 or 3
        n_classes=10,
        width=32,      # Channels of the first layer; doubled at each halving, up to four times this
    ):
        super().__init__()
        if size < 8:
            raise ValueError(f"the judge needs at least 8 pixels a side, got {size}; load larger pictures")
        self.shape = (in_channels, size, size)
        def conv(a, b): return nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.GELU()
        layers, c = [*conv(in_channels, width)], width
        for _ in range(max(1, round(math.log2(size / 4)))):
            layers += [*conv(c, min(2 * c, 4 * width)), nn.MaxPool2d(2)]
            c = min(2 * c, 4 * width)
        layers += [*conv(c, c), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2)]
        self.body = nn.Sequential(*layers)
        self.embed = nn.Sequential(nn.Linear(4 * c, 32), nn.BatchNorm1d(32, affine=False))
        self.head = nn.Linear(32, n_classes)

    def features(self, x): return self.embed(self.body(x))
    def forward(self, x): return self.head(self.features(x))

def fit_net(
    make,     # Makes the network
    batch,    # batch() -> pictures, labels
    loss,     # loss(logits, labels) -> scalar
    n_steps,  # Optimiser steps
    lr,       # Highest learning rate
    seed,     # Seed of weights and dropout
    device,
)->nn.Module: # In evaluation mode, frozen
    "Train a network from scratch, without touching the global random state."
    gpu = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=gpu):
        torch.manual_seed(seed)
        net = make().to(device, memory_format=torch.channels_last)
        opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
        cycle = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=n_steps)
        for _ in range(n_steps):
            x, y = batch()
            opt.zero_grad()
            loss(net(x), y).backward()
            opt.step()
            cycle.step()
    return net.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)

def augment(
    x:Tensor,  # Pictures, shape (B, C, H, W)
    g:torch.Generator,
)->Tensor:     # Same shape
    "Shift each picture by up to a pixel and add noise of a random strength."
    B, C, H, W = x.shape
    top, left = torch.randint(0, 3, (2, B, 1, 1, 1), generator=g)
    rows, cols = top + torch.arange(H)[:, None], left + torch.arange(W)
    index = (torch.arange(B)[:, None, None, None], torch.arange(C)[:, None, None], rows, cols)
    x = F.pad(x, (1, 1, 1, 1), value=-1.)[tuple(i.to(x.device) for i in index)]
    noise, strength = torch.randn(x.shape, generator=g), torch.rand(B, 1, 1, 1, generator=g)
    return x + noise.to(x.device) * (0.3 * strength.to(x.device))

@dataclass
class Judge:
    "A frozen network that neither policy nor reward has met."
    net: FeatureNet
    labelled: bool  # trained on labels; False: on telling rotations
    accuracy: float # on pictures of the judge split that it has not learned from

    @property
    def device(self): return next(self.net.parameters()).device

    @torch.no_grad()
    def features(self, x)->Tensor: # Pictures (B, C, H, W) in [-1, 1] -> (B, 32)
        "Describe pictures in 32 numbers."
        if x.shape[1:] != self.net.shape:
            raise ValueError(f"this judge knows pictures of shape {self.net.shape}, got {tuple(x.shape[1:])}")
        return torch.cat([self.net.features(b.to(self.device)) for b in x.split(1024)])

    def shares(self, features)->Tensor: # (B, 32) -> (n_classes,), on the CPU
        "How often each class is seen."
        logits = self.net.head(features).cpu()
        return torch.bincount(logits.argmax(1), minlength=logits.shape[1]).double() / len(logits)

def rotations(x)->tuple[Tensor, Tensor]: # (4B, C, H, W); quarter turns (4B,)
    "Every picture in four orientations."
    turns = torch.arange(4, device=x.device).repeat_interleave(len(x))
    return torch.cat([x.rot90(k, (2, 3)) for k in range(4)]), turns

def train_judge(
    pictures:Pictures, # The judge split
    seed=0,            # Same seed, same judge
    n_steps=250,       # Optimiser steps
    device="cpu",      # Where the judge stays
)->Judge:
    "Train a judge on labels where there are some, else on telling rotations."
    n = len(pictures)
    if n < 40:
        raise ValueError(
            f"the judge split of {pictures.name} has {n} pictures, expected at least 40; "
            "take more pictures")
    order = torch.randperm(n, generator=seeded(seed, "judge-held-out"))
    held, rest = order[:max(1, round(0.1 * n))], order[max(1, round(0.1 * n)):]
    labelled = pictures.y is not None and len(pictures.y.unique()) > 1
    g, size = seeded(seed, "judge-batches"), 64 if labelled else 16
    def pick(i):
        x = pictures.unit(i).to(device)
        return (x, pictures.y[i].to(device)) if labelled else rotations(x)
    def batch():
        x, y = pick(rest[torch.randint(len(rest), (size,), generator=g)])
        return augment(x, g), y
    n_classes = int(pictures.y.max()) + 1 if labelled else 4
    make = lambda: FeatureNet(pictures.x.shape[-1], pictures.x.shape[1], n_classes)
    loss = lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1)
    net = fit_net(make, batch, loss, n_steps, 2e-3, seed, device)
    x, y = pick(held)
    return Judge(net, labelled, (net(x).argmax(1) == y).float().mean().item())
