import copy
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from .data import Splits, quantize, seeded
from .ddpm import EMA, Resumable, gradient_step, set_lr
from .evaluate import frechet_distance
from .judge import Judge
from .ppo import PPO, control_variate, ppo_update, whiten
from .reward import checked
from .sampling import DDIM, rollout, sample

@dataclass(frozen=True)
class Finetune(PPO):
    "The settings of fine-tuning."
    lr: PositiveFloat = 1e-4              # Learning rate of Adam
    lr_decay: Literal["linear", "none"] = "linear" # linear: falls to 0 over num_epochs
    num_epochs: PositiveInt = 45          # Rounds of drawing and learning
    episodes_per_epoch: PositiveInt = 256 # Pictures drawn per round
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99 # Decay of the averaged policy per optimiser step
    control_variate: bool = True          # Subtract what the predicted x0 explains of the reward
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.5 # Weight of later decisions' luck
    adv_clip: PositiveFloat = 5.          # Largest advantage, in standard deviations
    refresh_every: NonNegativeInt = 1     # Rounds between lessons of the reward model; 0: never

class Finetuning(Resumable):
    "A policy that is being fine-tuned, its average and its optimiser, beside its pretrained copy."
    changing = ("policy", "ema", "opt", "epoch")

    def __init__(self,
        policy:nn.Module, # `policy(x, t) -> eps`; trained in place
        cfg:Finetune,
        reference=None,   # The pretrained policy; None: a copy of `policy`
    ):
        self.policy, self.cfg, self.epoch = policy.eval(), cfg, 0
        self.reference = reference or copy.deepcopy(policy).requires_grad_(False)
        self.ema = EMA(policy, cfg.ema, warmup=2)
        learned = [p for p in policy.parameters() if p.requires_grad]
        self.opt = torch.optim.Adam(learned, lr=cfg.lr, fused=True)

def finetune(
    run:Finetuning,       # Changed in place
    ddim:DDIM,            # The sampler to improve
    reward:Callable,      # reward(x0) -> (B,), any function of finished pictures
    shape:tuple,          # Of one picture, (C, H, W)
    refresh=None,         # Called with the newest pictures every `cfg.refresh_every` rounds
    seed=0,               # Seed of all episodes
    step=gradient_step,   # Makes an optimiser step
)->Iterator[dict]:        # One record per round
    "Fine-tune a sampler with PPO: draw, judge, learn, repeat."
    cfg, device = run.cfg, next(run.policy.parameters()).device
    while run.epoch < cfg.num_epochs:
        g = seeded(seed, "finetune", run.epoch, device=device)
        x_T = torch.randn(cfg.episodes_per_epoch, *shape, generator=g, device=device)
        traj = rollout(run.policy, ddim, x_T, g)
        r = gain = checked(reward, traj.x0)
        if cfg.control_variate:
            x0s = [ddim.predict_x0(k, x, eps) for k, (x, eps) in enumerate(zip(traj.x, traj.eps))]
            expected = torch.stack([checked(reward, x0) for x0 in x0s])
            gain = control_variate(r, expected, cfg.gae_lambda)
        left = 1 - run.epoch / cfg.num_epochs if cfg.lr_decay == "linear" else 1
        set_lr(run.opt, cfg.lr * left)
        stats = ppo_update(
            run.policy, run.reference, run.opt, ddim, traj, whiten(gain, cfg.adv_clip), g, cfg,
            after=lambda: run.ema.update(run.policy), step=step)
        run.epoch += 1
        if refresh and cfg.refresh_every and run.epoch % cfg.refresh_every == 0: refresh(traj.x0)
        yield dict(epoch=run.epoch, reward=r.mean().item(), reward_std=r.std(correction=0).item(),
                   rewards=r, lr=cfg.lr * left, **{name: v.item() for name, v in stats.items()})

def watcher(
    judge:Judge,
    splits:Splits,
    ddim:DDIM,
    n=400,     # Pictures to draw
    n_show=36, # How many of them to hand on
    seed=0,    # Seed of the noise, the same at every call
)->Callable:   # watch(policy) -> dict(fd, samples)
    "Make a function that draws from fixed noise and measures the distance to the judge split."
    describe = lambda x: judge.features(quantize(x, splits.judge.levels))
    real = describe(splits.judge.unit())
    def watch(policy):
        device = next(policy.parameters()).device
        g = seeded(seed, "watch", device=device)
        x_T = torch.randn(n, *splits.judge.x.shape[1:], generator=g, device=device)
        x0 = sample(policy, ddim, x_T, g)
        return dict(fd=frechet_distance(describe(x0), real), samples=x0[:n_show].cpu())
    return watch

def random_reward(seed=0)->Callable: # reward(x0) -> standard normal numbers, shape (B,)
    "A control: pays at random."
    g = seeded(seed, "random reward")
    return lambda x0: torch.randn(len(x0), generator=g)
