from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from .data import quantize
from .realfake import RealFake
from .reward import RewardTraining

class Kinds:
    "Kinds of pictures, by k-means on the pixels of real ones."
    def __init__(self,
        real:Tensor, # Real pictures, shape (N, C, H, W): the train split
        n=20,        # How many kinds; at most one for every 4 real pictures
        seed=0,
    ):
        n = max(1, min(n, len(real) // 4))
        means = KMeans(n, n_init=4, random_state=seed).fit(self.shrink(real).cpu().numpy())
        self.centres = torch.as_tensor(means.cluster_centers_, dtype=torch.float32, device=real.device)
        self.share = self.count(self(real)) / len(real)

    def shrink(self, x): return F.adaptive_avg_pool2d(x, min(8, x.shape[-1])).flatten(1)
    def __call__(self, x0): return torch.cdist(self.shrink(x0), self.centres).argmin(1)
    def count(self, kinds): return torch.bincount(kinds, minlength=len(self.centres)).float()

    def within(self,
        values:Tensor, # One for each picture, shape (B,)
        kinds:Tensor,  # Their kinds, shape (B,)
    )->Tensor:         # Same shape and mean
        "`values` without the differences between the kinds' means (those of rare kinds shrunk)."
        total = torch.zeros_like(self.share).index_add(0, kinds, values)
        mean = (total + values.mean()) / (self.count(kinds) + 1)
        return values - mean[kinds] + values.mean()

    def rarity(self,
        kinds:Tensor, # Kinds of some pictures, shape (B,)
        drawn:Tensor, # Kinds of what the policy draws, shape (M,)
    )->Tensor:        # log p(kind) - log q(kind), nats, shape (B,)
        "How much too rare each picture's kind is; one picture of each is added to what was drawn."
        n = self.count(drawn) + self.share * len(self.centres)
        return (self.share / n * n.sum()).log()[kinds]

def reward_of(
    run:RewardTraining,
    data:RealFake,      # Its real pictures, and the newest generated ones
)->Callable:            # reward(x0) -> (B,), following `run` and `data` as they change
    "How real a picture looks among those of its kind, plus how rare the kind is."
    if not run.cfg.variety: return run.model
    kinds = Kinds(data.real, run.cfg.n_kinds, run.seed)
    def reward(x0):
        x = quantize(x0, data.levels)
        here = kinds(x)
        rare = kinds.rarity(here, torch.cat([kinds(data.fake), here]))
        return kinds.within(run.model(x), here) + run.cfg.variety * rare
    return reward
