import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import NoiseSchedule, at, predict_x0

def ddim_timesteps(
    T:int,               # Noise steps of the schedule
    n_steps:int,         # Steps K of the sampler, 1..T
    spacing="trailing",  # "trailing", "leading" or "linspace"
    power=1.,            # Above 1 the grid is denser towards the picture
)->Tensor:               # int64, shape (K,), 0-based, falling
    "Where the K steps lie ([Lin et al. 2023](https://arxiv.org/abs/2305.08891), table 2)."
    k = torch.arange(n_steps, dtype=torch.float64)
    grids = dict(
        trailing=T - k * T / n_steps - 1,
        leading=(n_steps - 1 - k) * (T // n_steps),
        linspace=(T - 1) * (1 - k / max(n_steps - 1, 1)))
    if spacing not in grids:
        raise ValueError(f"spacing must be one of {', '.join(grids)}, got {spacing!r}")
    t = grids[spacing]
    if power != 1: t = (T * ((t + 1) / T) ** power - 1).clamp(min=0)
    t = t.round().long()
    if n_steps > T or (t.diff() >= 0).any():
        raise ValueError(
            f"{n_steps} steps ({spacing}, power {power}) do not fit on T = {T} noise steps "
            "without visiting one twice; take fewer steps, or a power nearer to 1")
    return t

class DDIM:
    """A sampler of K Gaussian steps, `x_next = a x + b eps + sigma z`
    ([Song et al. 2021](https://arxiv.org/abs/2010.02502), eq. 12)."""
    def __init__(self,
        schedule:NoiseSchedule,
        n_steps=4,          # Steps K, 1..T
        eta=1.,             # Noise put back: 0 none, 1 as much as DDPM
        spacing="trailing", # See `ddim_timesteps`
        power=1.,           # See `ddim_timesteps`
        clip_x0=None,       # Clamp the predicted picture to +- this; None: leave it
    ):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}; 1 adds as much noise as DDPM")
        self.n_steps, self.eta, self.spacing, self.clip_x0 = n_steps, eta, spacing, clip_x0
        self.schedule = schedule
        self.t = ddim_timesteps(schedule.T, n_steps, spacing, power)
        abar = schedule.abar64[self.t]
        self.fill(abar, torch.cat([abar[1:], abar.new_ones(1)])) # ends on the clean picture

    def fill(self,
        abar:Tensor, # Signal share before each step, float64, shape (K,)
        prev:Tensor, # After it
    ):
        "Compute the table: one row for each step."
        self.sigma = self.eta * ((1 - prev) / (1 - abar) * (1 - abar / prev)).sqrt() # eq. 16
        self.turn = (1 - prev - self.sigma**2).clamp(min=0).sqrt()
        self.a = (prev / abar).sqrt()
        self.b = self.turn - self.a * (1 - abar).sqrt()
        self.n_decisions = int((self.sigma > 0).sum()) # steps that have a density
        self.c = (self.b / self.sigma)[:self.n_decisions]
        self.scale = prev.sqrt()
        for name in ("a", "b", "sigma", "c", "scale", "turn"):
            setattr(self, name, getattr(self, name).float())

    def to(self, device):
        "Move the table to `device`."
        self.schedule = self.schedule.to(device)
        for name in ("t", "a", "b", "sigma", "c", "scale", "turn"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def predict_x0(self,
        k,          # Step, int or shape (B,)
        x:Tensor,   # State, shape (B, ...)
        eps:Tensor, # The network's output there
    )->Tensor:      # Shape of `x`
        "The finished picture that the policy expects."
        x0 = predict_x0(self.schedule, x, self.t[k], eps)
        return x0.clamp(-self.clip_x0, self.clip_x0) if self.clip_x0 else x0

    def mean(self, k, x, eps)->Tensor: # As in `predict_x0`
        "Mean of the next state."
        if self.clip_x0:
            return at(self.scale, k, x) * self.predict_x0(k, x, eps) + at(self.turn, k, x) * eps
        return at(self.a, k, x) * x + at(self.b, k, x) * eps

    def __repr__(self):
        return f"DDIM(K={self.n_steps}, eta={self.eta}, {self.spacing}, {self.n_decisions} decisions)"

@dataclass
class Step:
    "One step of denoising."
    k: int         # index, 0 = first
    x: Tensor      # state before the step, shape (B, ...)
    eps: Tensor    # the network's output there
    z: Tensor      # the noise drawn (zeros in a step without noise)
    x_next: Tensor # state after the step

@torch.no_grad()
def denoise(
    policy,         # `policy(x, t) -> eps`
    ddim:DDIM,
    x_T:Tensor,     # Standard normal noise, shape (B, ...)
    generator=None, # Source of the noise of the steps
)->Iterator[Step]:
    "Walk from noise to pictures, a step at a time."
    x = x_T
    for k in range(ddim.n_steps):
        noisy = k < ddim.n_decisions
        z = torch.zeros_like(x)
        if noisy: z = torch.randn(x.shape, generator=generator, device=x.device)
        eps = policy(x, ddim.t[k].repeat(len(x)))
        x_next = ddim.mean(k, x, eps) + ddim.sigma[k] * z
        yield Step(k, x, eps, z, x_next)
        x = x_next

def sample(policy, ddim:DDIM, x_T:Tensor, generator=None)->Tensor: # As in `denoise`; shape of `x_T`
    "Finished pictures, not clamped."
    for step in denoise(policy, ddim, x_T, generator): pass
    return step.x_next

@dataclass
class Trajectory:
    "N episodes of D decisions each."
    x: Tensor   # states, shape (D, N, ...)
    eps: Tensor # the policy's output there
    z: Tensor   # the noise drawn
    x0: Tensor  # finished pictures, shape (N, ...), not clamped

    def flat(self):
        "All (episode, step) pairs as one batch: k (D N,), x, eps, z (D N, ...)."
        D, N = self.x.shape[:2]
        k = torch.arange(D, device=self.x.device).repeat_interleave(N)
        return k, self.x.flatten(0, 1), self.eps.flatten(0, 1), self.z.flatten(0, 1)

def rollout(policy, ddim:DDIM, x_T:Tensor, generator=None)->Trajectory: # As in `denoise`
    "Play episodes and remember the decisions."
    if not ddim.n_decisions:
        raise ValueError(
            f"eta = {ddim.eta} and {ddim.n_steps} steps leave no step with noise, so there is "
            "no density to learn from; choose eta in (0, 1] and at least 2 steps")
    seen = torch.empty(3, ddim.n_decisions, *x_T.shape, device=x_T.device)
    for step in denoise(policy, ddim, x_T, generator):
        if step.k < ddim.n_decisions:
            seen[:, step.k] = torch.stack([step.x, step.eps, step.z])
    return Trajectory(*seen, step.x_next)

def log_prob(
    ddim:DDIM,
    k,             # Decision, int or shape (B,)
    x:Tensor,      # State, shape (B, ...)
    x_next:Tensor, # State after it
    eps:Tensor,    # A policy's output at `x`
)->Tensor:         # Nats, summed over pixels, shape (B,)
    "Log-density of a decision: log N(x_next; mean, sigma^2)."
    sigma = at(ddim.sigma, k, x)
    z = (x_next - ddim.mean(k, x, eps)) / sigma
    return -(z.square() / 2 + sigma.log() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

def mean_shift(
    ddim:DDIM,
    k,              # Decision, int or shape (B,)
    eps_new:Tensor, # One policy's output, shape (B, ...)
    eps_old:Tensor, # Another's at the same states
    x:Tensor=None,  # These states, which a sampler that clips needs
)->Tensor:          # Shape (B, ...)
    "How far the mean moves between two policies, in units of sigma."
    if not ddim.clip_x0: return at(ddim.c, k, eps_new) * (eps_new - eps_old)
    return (ddim.mean(k, x, eps_new) - ddim.mean(k, x, eps_old)) / at(ddim.sigma, k, x)

def log_ratio(
    delta:Tensor, # From `mean_shift`, shape (B, ...)
    z:Tensor,     # Noise of the decision under the old policy
)->Tensor:        # Nats, shape (B,)
    "log p_new - log p_old of the decision taken; 0 where the policies agree."
    return (delta * (z - delta / 2)).flatten(1).sum(1)

def gaussian_kl(
    delta:Tensor, # From `mean_shift`, shape (B, ...)
)->Tensor:        # Nats, shape (B,)
    "KL divergence between the two decisions."
    return delta.square().flatten(1).sum(1) / 2
