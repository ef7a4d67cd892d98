import copy
import math

import torch
from torch import Tensor

def linear_abar(
    T:int=1000,             # Number of noise steps
    beta_start:float=1e-4,  # Variance added by the first step
    beta_end:float=0.02,    # Variance added by the last step
)->Tensor:                  # float64, shape (T,), falling
    "DDPM's schedule ([Ho et al. 2020](https://arxiv.org/abs/2006.11239), section 4)."
    beta = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    return (1 - beta).cumprod(0)

def cosine_abar(
    T:int=1000,          # Number of noise steps
    s:float=8e-3,        # Offset that keeps the first steps from being too small
    truncate:float=0.96, # Where on the cosine the last step lies; 1: as published
)->Tensor:               # float64, shape (T,), falling
    "Cosine schedule ([Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672), eq. 17), stopped early."
    u = truncate * torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (f[1:] / f[:-1]).clamp(min=1e-3).cumprod(0)

class NoiseSchedule:
    "How much picture and how much noise there is at step t = 0..T-1."
    def __init__(self,
        kind="linear", # "linear", "cosine", or a table of abar, shape (T,)
        T:int=1000,    # Number of noise steps; a table brings its own
    ):
        known = {"linear": linear_abar, "cosine": cosine_abar}
        if isinstance(kind, str) and kind not in known:
            raise ValueError(f"unknown schedule {kind!r}; expected linear, cosine or a table of abar")
        named = isinstance(kind, str)
        abar = known[kind](T) if named else torch.as_tensor(kind).cpu().double()
        tiny = torch.finfo(torch.float32).tiny
        steps = torch.cat([abar.new_ones(1), abar, abar.new_full((1,), tiny)])
        if not (steps.diff() < 0).all():
            raise ValueError("abar must fall from below 1 to above 0 at every step; check T and the table")
        self.kind = kind if named else "table"
        self.T = len(abar)
        self.abar64 = abar # always on the CPU
        self.abar = abar.float()
        self.signal = abar.sqrt().float()
        self.noise = (1 - abar).sqrt().float()

    def to(self, device):
        "A copy with its tables on `device`."
        new = copy.copy(self)
        for name in ("abar", "signal", "noise"):
            setattr(new, name, getattr(self, name).to(device))
        return new

    def __repr__(self):
        return f"NoiseSchedule({self.kind}, T={self.T}, abar_T={self.abar64[-1]:.2e})"

def at(
    table:Tensor,  # One number for each step, shape (K,)
    k,             # Step: an int for all, or int64 of shape (B,)
    like:Tensor,   # Shape (B, ...)
)->Tensor:         # Shape () or (B, 1, ...), to multiply `like` with
    "Look up one number per picture."
    v = table[k]
    return v.view(-1, *[1] * (like.ndim - 1)) if v.ndim else v

def add_noise(
    schedule:NoiseSchedule,
    x0:Tensor,   # Clean pictures, shape (B, ...)
    t,           # Noise step, int or shape (B,)
    eps:Tensor,  # Standard normal noise, shape of `x0`
)->Tensor:       # Noisy pictures x_t
    "All noise up to step t in one jump (DDPM eq. 4)."
    return at(schedule.signal, t, x0) * x0 + at(schedule.noise, t, x0) * eps

def predict_x0(
    schedule:NoiseSchedule,
    x:Tensor,    # Noisy pictures x_t, shape (B, ...)
    t,           # Noise step, int or shape (B,)
    eps:Tensor,  # The noise believed to be in `x`
)->Tensor:       # The clean pictures which that implies
    "`add_noise` solved for x0 (DDPM eq. 15)."
    return (x - at(schedule.noise, t, x) * eps) / at(schedule.signal, t, x)
