import copy
import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from torch import Tensor, nn

from .data import Pictures, seeded
from .schedule import NoiseSchedule, add_noise
from .unet import UNet

def ddpm_loss(
    model,     # `model(x_t, t) -> eps`
    schedule:NoiseSchedule,
    x0:Tensor,  # Clean pictures in [-1, 1], shape (B, ...)
    t:Tensor,   # Noise step of each, shape (B,)
    eps:Tensor, # Standard normal noise, shape of `x0`
)->Tensor:      # Mean squared error of each picture, shape (B,)
    "The simple loss of DDPM (eq. 14): 1 for a network that answers 0."
    error = model(add_noise(schedule, x0, t, eps), t) - eps
    return error.square().flatten(1).mean(1)

class Resumable:
    "Something that changes in training; `changing` names the parts that do."
    changing = ()

    def state_dict(self)->dict:
        "Everything needed to go on: tensors and numbers."
        parts = {name: getattr(self, name) for name in self.changing}
        return {k: p.state_dict() if hasattr(p, "state_dict") else p for k, p in parts.items()}

    def load_state_dict(self, state):
        "Go on from there."
        for name in self.changing:
            part = getattr(self, name)
            if hasattr(part, "load_state_dict"): part.load_state_dict(state[name])
            else: setattr(self, name, state[name])

class EMA(Resumable):
    "An exponential moving average of a model's weights: `ema.model`."
    changing = ("model", "n")

    def __init__(self,
        model:nn.Module,  # The model to follow
        decay=0.995,      # Share of the average that stays at each update, [0, 1)
        warmup=9,         # Start with short averages: decay (1 + n) / (1 + warmup + n)
    ):
        self.decay, self.warmup, self.n = decay, warmup, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        "Move the average towards `model`."
        self.n += 1
        decay = min(self.decay, (1 + self.n) / (1 + self.warmup + self.n))
        pairs = zip(self.model.parameters(), model.parameters())
        mine, new = zip(*[(a, b) for a, b in pairs if b.requires_grad])
        torch._foreach_lerp_(mine, new, 1 - decay)

def gradient_step(
    model:nn.Module,
    opt:torch.optim.Optimizer,
    rows_of:Callable,   # rows_of(batch) -> (n, S): a row per item, the loss first
    batch:Tensor,       # Indices of the items, shape (n,)
    max_norm=1.,        # Largest norm of the gradient
)->Tensor:              # Means of the columns, and the gradient's norm, shape (S + 1,)
    "One step of the optimiser on the mean loss of a batch."
    rows = rows_of(batch)
    opt.zero_grad()
    rows[:, 0].mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    opt.step()
    return torch.cat([rows.detach().mean(0), norm[None]])

@dataclass(frozen=True)
class TrainDDPM:
    "Pretraining of the diffusion model."
    lr: PositiveFloat = 1e-3       # Learning rate of AdamW
    num_steps: PositiveInt = 1500  # Optimiser steps
    batch_size: PositiveInt = 128  # Pictures per step
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995 # Decay of the averaged weights per step

class Pretraining(Resumable):
    "What changes while a diffusion model is trained."
    changing = ("model", "ema", "opt", "step")

    def __init__(self, model:nn.Module, cfg:TrainDDPM):
        self.model, self.cfg, self.step = model, cfg, 0
        self.ema = EMA(model, cfg.ema)
        self.opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0)

def set_lr(opt, lr):
    for group in opt.param_groups: group["lr"] = lr

def train_ddpm(
    run:Pretraining,         # Changed in place
    schedule:NoiseSchedule,
    pictures:Pictures,       # The train split
    seed=0,                  # Seed of batches and noise
    every=50,                # Steps between records
    step=gradient_step,      # Makes an optimiser step
)->Iterator[dict]:           # step, loss (mean since the last record), lr
    "Train with AdamW: 100 steps of warm-up, then a linear decay to zero."
    cfg, device = run.cfg, next(run.model.parameters()).device
    pictures, schedule = pictures.to(device), schedule.to(device)
    run.model.train()
    losses = []
    while run.step < cfg.num_steps:
        lr = cfg.lr * min(1, (run.step + 1) / 100) * (1 - run.step / cfg.num_steps)
        set_lr(run.opt, lr)
        g = seeded(seed, "ddpm", run.step, device=device)
        i = torch.randint(len(pictures), (cfg.batch_size,), generator=g, device=device)
        x0 = pictures.unit(i)
        t = torch.randint(schedule.T, (len(x0),), generator=g, device=device)
        eps = torch.randn(x0.shape, generator=g, device=device)
        rows_of = lambda j: ddpm_loss(run.model, schedule, x0[j], t[j], eps[j])[:, None]
        losses.append(step(run.model, run.opt, rows_of, torch.arange(len(x0), device=device))[0])
        run.ema.update(run.model)
        run.step += 1
        if run.step % every == 0 or run.step == cfg.num_steps:
            yield dict(step=run.step, loss=torch.stack(losses).mean().item(), lr=lr)
            losses = []
    run.model.eval()

def pretrained()->tuple[UNet, NoiseSchedule]: # In evaluation mode, on the CPU
    "The digits model that ships with the package, and its noise schedule."
    path = resources.files("ppo_ddpm") / "weights" / "digits.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}
    model = UNet(**json.loads(about["config"]))
    model.load_state_dict(state)
    return model.eval(), NoiseSchedule(**json.loads(about["schedule"]))
