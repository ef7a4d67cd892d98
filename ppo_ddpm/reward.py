import io
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from .data import quantize, seeded
from .ddpm import Resumable
from .realfake import RealFake, TrainReward

class RewardNet(nn.Sequential):
    "A small convolutional classifier."
    def __init__(self,
        size=8,     # Side of the pictures in pixels: 8, 16, 32, ...
        channels=1, # 1 or 3
        width=32,   # Channels of the first layer; doubled at each halving, up to four times this
    ):
        if size < 8 or size & (size - 1):
            raise ValueError(
                f"the reward model needs 8, 16, 32, ... pixels a side, got {size}; "
                "load pictures of such a size")
        def conv(a, b, stride=1): return nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.SiLU()
        layers, c = [*conv(channels, width)], width
        for _ in range(int(math.log2(size)) - 2):
            layers += conv(c, min(2 * c, 4 * width), 2)
            c = min(2 * c, 4 * width)
        super().__init__(*layers, *conv(c, c), nn.Flatten(), nn.Linear(16 * c, 1))
        self.to(memory_format=torch.channels_last)

class RewardModel(nn.Module):
    "How real a picture looks to a few classifiers."
    def __init__(self,
        shape:tuple,  # (C, H, W) of the pictures
        levels=256,   # Grey levels of the data
        n_models=2,   # Number of classifiers
        alpha=0.,     # Reward: 0 the logit l, else (exp(alpha l) - 1) / alpha
    ):
        super().__init__()
        self.config = dict(shape=tuple(shape), levels=levels, n_models=n_models, alpha=alpha)
        self.nets = nn.ModuleList(RewardNet(shape[1], shape[0]) for _ in range(n_models))
        self.levels, self.alpha = levels, alpha

    @torch.no_grad()
    def logit(self, x0): # (B, C, H, W) -> (B,)
        "Mean logit of the classifiers: above 0 is real."
        x = quantize(x0, self.levels)
        return torch.stack([net(x)[:, 0] for net in self.nets]).mean(0)

    def forward(self, x0): # (B, C, H, W) -> (B,)
        "The reward: the Box-Cox transform of the density ratio exp(logit)."
        logit = self.logit(x0)
        return torch.expm1(self.alpha * logit) / self.alpha if self.alpha else logit

class RewardTraining(Resumable):
    "A reward model and its optimiser."
    changing = ("model", "opt", "step", "epoch")

    def __init__(self,
        shape:tuple,      # (C, H, W) of the pictures
        levels:int,       # Their grey levels
        cfg:TrainReward,
        seed=0,           # Seed of the first weights and of all that follows
        device="cpu",
    ):
        self.cfg, self.seed, self.step, self.epoch = cfg, seed, 0, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = RewardModel(shape, levels, cfg.n_models, cfg.alpha).to(device)
        # little momentum, because the reward must turn when the policy does
        adam = dict(lr=cfg.lr, betas=(0.5, 0.99), weight_decay=0.01, fused=True)
        self.opt = torch.optim.AdamW(self.model.parameters(), **adam)

def fit_steps(
    run:RewardTraining, # Changed in place
    data:RealFake,
    n_steps:int,        # Optimiser steps of each classifier
)->Tensor:              # Mean loss
    "Train each classifier on fresh batches of its own."
    cfg, device, losses = run.cfg, data.real.device, []
    for _ in range(n_steps):
        run.opt.zero_grad()
        for i, net in enumerate(run.model.nets):
            g = seeded(run.seed, "reward", run.step, i, device=device)
            x, y = data.batch(cfg.batch_size, g)
            x = x + cfg.instance_noise * torch.randn(x.shape, generator=g, device=device)
            y = y * (1 - cfg.label_smoothing) + cfg.label_smoothing / 2
            loss = F.binary_cross_entropy_with_logits(net(x)[:, 0], y)
            loss.backward()
            losses.append(loss.detach())
        run.opt.step()
        run.step += 1
    return torch.stack(losses).mean()

def auc(
    real:Tensor, # Scores of real pictures, shape (N,)
    fake:Tensor, # Scores of generated ones, shape (M,)
)->float:        # 0.5: no better than chance; 1: all higher
    "The probability that a real picture outranks a generated one; ties count half."
    y = [1] * len(real) + [0] * len(fake)
    return float(roc_auc_score(y, torch.cat([real, fake]).cpu().numpy()))

def train_reward(
    run:RewardTraining, # Changed in place
    data:RealFake,
)->Iterator[dict]:      # epoch, loss; accuracy and auc on held-out pictures
    "Train for `num_epochs` passes over the real pictures."
    n_steps = math.ceil(len(data.real) / (run.cfg.batch_size // 2))
    while run.epoch < run.cfg.num_epochs:
        loss = fit_steps(run, data, n_steps).item()
        run.epoch += 1
        real, fake = run.model.logit(data.held_real), run.model.logit(data.held_fake)
        right = torch.cat([real > 0, fake < 0]).float().mean().item()
        yield dict(epoch=run.epoch, loss=loss, accuracy=right, auc=auc(real, fake))

def refresh_reward(
    run:RewardTraining, # Changed in place
    data:RealFake,      # Gets the newest pictures
    x0:Tensor,          # What the policy draws now, shape (B, C, H, W)
    n_steps=12,         # Optimiser steps
    n_old=512,          # Generated pictures of before that stay
):
    "Show the reward model what the policy draws now."
    old = data.fake[max(0, len(data.fake) - n_old):]
    data.fake = torch.cat([old, quantize(x0, data.levels)])
    fit_steps(run, data, n_steps)

def ink(
    x0:Tensor, # Pictures, shape (B, C, H, W)
)->Tensor:     # 0 (all black) to 1 (all white), shape (B,)
    "Mean brightness."
    return (x0.clamp(-1, 1).flatten(1).mean(1) + 1) / 2

def file_size(
    x0:Tensor,    # Pictures, shape (B, C, H, W)
    format="PNG", # "PNG" or "JPEG"
)->Tensor:        # Bytes, shape (B,)
    "How well a picture compresses ([DDPO](https://arxiv.org/abs/2305.13301), section 5)."
    def n_bytes(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(file, format)
        return file.tell()
    pixels = ((x0.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy()
    return torch.tensor([float(n_bytes(p)) for p in pixels], device=x0.device)

def checked(
    reward:Callable, # reward(x0) -> (B,)
    x0:Tensor,       # Pictures, shape (B, ...)
)->Tensor:           # float32, shape (B,), without a graph
    "Rewards that PPO can use; TypeError or ValueError for others."
    r = reward(x0)
    name = getattr(reward, "__name__", type(reward).__name__)
    if not isinstance(r, Tensor):
        raise TypeError(
            f"the reward {name} returned {type(r).__name__}, "
            f"expected a tensor of shape ({len(x0)},)")
    if r.shape != (len(x0),):
        raise ValueError(
            f"the reward {name} returned shape {tuple(r.shape)}, "
            f"expected one number per picture, ({len(x0)},)")
    r = r.detach().to(x0.device, torch.float32)
    if bad := int((~r.isfinite()).sum()):
        raise ValueError(
            f"the reward {name} returned NaN or infinity for {bad} of {len(r)} pictures; "
            "make it finite")
    return r
