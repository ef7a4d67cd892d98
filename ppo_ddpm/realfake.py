from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from .data import quantize
from .ddpm import Resumable

def blank_pictures(
    n:int,       # How many
    shape:tuple, # (C, H, W)
    generator:torch.Generator,
)->Tensor:       # Shape (n, C, H, W)
    "Pictures that show nothing: half noise, a quarter white, a quarter black."
    x = torch.randn(n, *shape, generator=generator, device=generator.device)
    x[n // 2:3 * n // 4] = 1
    x[3 * n // 4:] = -1
    return x.clamp(-1, 1)

def corrupt(
    x:Tensor, # Pictures in [-1, 1], shape (B, C, H, W)
    generator:torch.Generator,
)->Tensor:    # Same shape
    "Spoil each picture in one of five ways."
    n, g, at = len(x), generator, dict(generator=generator, device=generator.device)
    u = torch.rand(n, 1, 1, 1, **at)
    other = x[torch.randperm(n, **at)]
    low, half = x.amin((1, 2, 3), keepdim=True), x.shape[2] // 2
    pale = low + (0.3 + 0.5 * u) * (x - low)
    noisy = x + (0.1 + 0.4 * u) * torch.randn(x.shape, **at)
    mixed = torch.lerp(x, other, 0.3 + 0.4 * u)
    halves = torch.cat([x[:, :, :half], other[:, :, half:]], 2)
    pixels = (n, 1, *x.shape[2:])
    dropped = torch.where(torch.rand(pixels, **at) < 0.05 + 0.25 * u, 2 * torch.rand(pixels, **at) - 1, x)
    ways = torch.stack([pale, noisy, mixed, halves, dropped])
    return ways[torch.randint(5, (n,), **at), torch.arange(n, device=g.device)]

@dataclass(frozen=True)
class TrainReward:
    "The classifiers that tell real pictures from generated ones, and what they pay."
    num_img: PositiveInt = 800        # Generated pictures; real ones are num_img + num_noise
    num_noise: NonNegativeInt = 120   # Blank pictures
    num_corrupt: NonNegativeInt = 270 # Corrupted real pictures
    batch_size: Annotated[int, Field(ge=2)] = 256 # Pictures per step, half of them real
    lr: PositiveFloat = 1e-3          # Learning rate of AdamW
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1 # s in the labels s/2 (fake) and 1 - s/2 (real)
    instance_noise: NonNegativeFloat = 0.15 # Standard deviation of the noise added in training
    num_epochs: PositiveInt = 20      # Passes over the real pictures
    n_models: PositiveInt = 2         # Classifiers whose logits are averaged
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5 # Reward: 0 the logit l, else (exp(alpha l) - 1) / alpha
    variety: NonNegativeFloat = 1.    # Weight of how rare a picture's kind is among those drawn
    n_kinds: PositiveInt = 20         # Kinds of pictures, by k-means on the real ones

class RealFake(Resumable):
    "Real pictures against generated, corrupted and blank ones; a tenth is held out."
    changing = ("fake",)

    def __init__(self,
        real:Tensor,      # Real pictures in [-1, 1], shape (N, C, H, W): the train split
        fake:Tensor,      # Generated pictures, shape (M, C, H, W)
        cfg:TrainReward,
        levels=256,       # Grey levels of the data; fakes are rounded to them
    ):
        if min(len(real), len(fake)) < 10:
            raise ValueError(
                "a real/fake set needs at least 10 pictures of each kind, "
                f"got {len(real)} real and {len(fake)} generated")
        real, fake = real[:cfg.num_img + cfg.num_noise], quantize(fake[:cfg.num_img], levels)
        n, m = len(real) // 10, len(fake) // 10
        self.held_real, self.real = real[:n], real[n:]
        self.held_fake, self.fake = fake[:m], fake[m:]
        self.levels, self.sizes = levels, (len(fake), cfg.num_corrupt, cfg.num_noise)

    def batch(self,
        n:int,                     # Pictures, half of them real
        generator:torch.Generator,
    )->tuple[Tensor, Tensor]:      # Pictures (n, C, H, W); labels (n,): 1 real, 0 fake
        "A fresh batch."
        g, half, total = generator, n // 2, sum(self.sizes)
        pick = lambda x, k: x[torch.randint(len(x), (k,), generator=g, device=g.device)]
        k_fake, k_corrupt = (round(half * size / total) for size in self.sizes[:2])
        k_corrupt = min(k_corrupt, half - k_fake)
        real = pick(self.real, half)
        spoilt = corrupt(pick(self.real, k_corrupt), g)
        blank = blank_pictures(half - k_fake - k_corrupt, real.shape[1:], g)
        made = quantize(torch.cat([spoilt, blank]), self.levels)
        x = torch.cat([real, pick(self.fake, k_fake), made])
        return x, (torch.arange(len(x), device=x.device) < half).float()
