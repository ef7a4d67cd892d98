from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from .ddpm import gradient_step
from .sampling import DDIM, Trajectory, gaussian_kl, log_ratio, mean_shift

def whiten(
    reward:Tensor, # Any shape
    clip=5.,       # Largest size, in standard deviations
)->Tensor:         # Same shape; zeros for a constant reward
    "Mean 0 and standard deviation 1, then clipped."
    r = reward.float()
    tiny = torch.finfo(torch.float32).tiny
    r = r / r.abs().max().clamp(min=tiny).log2().floor().exp2() # no size overflows
    r = r - r.mean()
    std = r.std(correction=0)
    return (r / std).clamp(-clip, clip).where(std > 1e-6, 0)

def state_value(
    reward:Tensor,   # Of each episode, shape (N,)
    expected:Tensor, # Reward of the predicted x0 before each decision, shape (D, N)
)->Tensor:           # Shape (D, N)
    "Linear prediction of the reward from `expected`, fitted on the other half of the episodes."
    r, expected = reward.float(), expected.float()
    value = torch.empty_like(expected)
    even = torch.arange(len(r), device=r.device) % 2 == 0
    for fit in even, ~even:
        mean = expected[:, fit].mean(1, keepdim=True)
        d = expected[:, fit] - mean
        slope = (d * (r[fit] - r[fit].mean())).sum(1) / d.square().sum(1).clamp(min=1e-8)
        value[:, ~fit] = r[fit].mean() + slope[:, None] * (expected[:, ~fit] - mean)
    return value

def control_variate(
    reward:Tensor,   # Of each episode, shape (N,)
    expected:Tensor, # Reward of the predicted x0 before each decision, shape (D, N)
    lam=1.,          # Weight of later decisions' luck, in [0, 1]
)->Tensor:           # What each decision gained, shape (D, N)
    "Generalised advantages ([Schulman et al. 2016](https://arxiv.org/abs/1506.02438), eq. 16)."
    value = state_value(reward, expected)
    gain = torch.cat([value[1:], reward[None].float()]) - value
    for k in reversed(range(len(gain) - 1)): gain[k] += lam * gain[k + 1]
    return gain

def ppo_loss(
    log_r:Tensor,     # Log-ratio of each decision, summed over pixels, nats, shape (B,)
    advantage:Tensor, # Shape (B,)
    clip_eps=0.2,     # Beyond 1 +- this the ratio earns nothing
)->Tensor:            # Loss of each decision, shape (B,)
    "PPO's clipped objective ([Schulman et al. 2017](https://arxiv.org/abs/1707.06347), eq. 7)."
    ratio = log_r.clamp(max=20).exp() # exp would overflow at 89
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.minimum(ratio * advantage, clipped * advantage)

def choose_pairs(
    D:int,         # Decisions of an episode
    N:int,         # Episodes
    decisions,     # How many of each episode to choose; None: all
    generator:torch.Generator,
)->Tensor:         # Places in `Trajectory.flat()`, shape (decisions * N,), shuffled
    "The (episode, step) pairs to learn from, in random order."
    device = generator.device
    pairs = torch.arange(D * N, device=device)
    if decisions:
        k = torch.rand(D, N, generator=generator, device=device).argsort(0)[:decisions]
        pairs = (k * N + torch.arange(N, device=device)).flatten()
    return pairs[torch.randperm(len(pairs), generator=generator, device=device)]

@dataclass(frozen=True)
class PPO:
    "The settings of one round."
    clip_eps: PositiveFloat = 0.2      # The probability ratio is clipped to 1 +- this
    kl: NonNegativeFloat = 0.1         # Weight of the KL divergence to the pretrained model
    minibatch: PositiveInt = 64        # Episodes per optimiser step, with all their decisions
    passes: PositiveInt = 1            # Times that a round's decisions are used
    decisions: PositiveInt | None = None # Decisions of each episode to learn from; null: all
    grad_clip: PositiveFloat = 1.      # Largest norm of the gradient

def ppo_update(
    policy,                     # `policy(x, t) -> eps`; changed in place
    reference,                  # The pretrained policy
    opt:torch.optim.Optimizer,
    ddim:DDIM,                  # The sampler that played the episodes
    traj:Trajectory,            # D decisions of N episodes
    advantage:Tensor,           # Shape (N,), or (D, N) for one per decision
    generator:torch.Generator,  # Source of the order of pairs
    cfg=PPO(),
    after=lambda: None,         # Called after each optimiser step
    step=gradient_step,         # Makes an optimiser step
)->dict:                        # Scalars: loss, kl, clip_frac, ratio_error, grad_norm
    "One round of PPO on (episode, step) pairs."
    D, N = traj.x.shape[:2]
    k, x, eps, z = traj.flat()
    adv = advantage.expand(D, N).flatten()
    def rows_of(i):
        t = ddim.t[k[i]]
        eps_new = policy(x[i], t)
        with torch.no_grad(): eps_ref = reference(x[i], t)
        log_r = log_ratio(mean_shift(ddim, k[i], eps_new, eps[i], x[i]), z[i])
        kl = gaussian_kl(mean_shift(ddim, k[i], eps_new, eps_ref, x[i]))
        gain = log_r.expm1() * adv[i].sign()
        loss = ppo_loss(log_r, adv[i], cfg.clip_eps) + cfg.kl * kl
        return torch.stack([loss, kl, (gain > cfg.clip_eps).float(), log_r.expm1().square()], 1)
    rows = []
    for _ in range(cfg.passes):
        size = cfg.minibatch * (cfg.decisions or D)
        for i in choose_pairs(D, N, cfg.decisions, generator).split(size):
            rows.append(step(policy, opt, rows_of, i, cfg.grad_clip))
            after()
    loss, kl, clip_frac, _, grad_norm = torch.stack(rows).mean(0)
    return dict(loss=loss, kl=kl, clip_frac=clip_frac, ratio_error=rows[0][3].sqrt(), grad_norm=grad_norm)
