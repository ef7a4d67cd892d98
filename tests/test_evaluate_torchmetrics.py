"The distances of ppo_ddpm.evaluate against those of torchmetrics, on random features and on a judge's features of digits."
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ppo_ddpm.data import digits, quantize, seeded, split
from ppo_ddpm.evaluate import frechet_distance, kernel_distance
from ppo_ddpm.judge import train_judge

pytestmark = pytest.mark.filterwarnings("ignore:Metric .Kernel Inception Distance. will save all")


class Given(nn.Module):
    "A feature network whose features are what it is given."
    def __init__(self, n): super().__init__(); self.num_features = n
    def forward(self, x): return x


def their_frechet(a, b):
    metric = FrechetInceptionDistance(feature=Given(a.shape[1]), reset_real_features=False).set_dtype(torch.float64)
    metric.update(b.double(), real=True); metric.update(a.double(), real=False)
    return metric.compute().item()


def their_kernel(a, b):
    "On one subset that is the whole sample; they need samples of one size for that."
    metric = KernelInceptionDistance(feature=Given(a.shape[1]), subsets=1, subset_size=len(a))
    metric.update(b.double(), real=True); metric.update(a.double(), real=False)
    return metric.compute()[0].item()


def random_pair(name):
    "Features of several kinds: as many of `a` as of `b` only where both are 300."
    g = seeded("torchmetrics", name)
    normal = lambda n, d: torch.randn(n, d, generator=g, dtype=torch.float64)
    mixing = normal(32, 32)
    return {"same": (normal(300, 32), normal(300, 32)), "shifted": (normal(300, 32) + 1, normal(300, 32)), "scaled": (normal(900, 16) * 3, normal(200, 16)),
            "correlated": (normal(500, 32) @ mixing, normal(450, 32)), "skewed": (normal(300, 8).exp(), normal(300, 8)),
            "low rank": (normal(300, 4) @ normal(4, 32), normal(300, 32))}[name]


names = ["same", "shifted", "scaled", "correlated", "skewed", "low rank"]


@pytest.mark.parametrize("name", names)
def test_random_features(name):
    a, b = random_pair(name)
    assert frechet_distance(a, b) == pytest.approx(their_frechet(a, b), rel=1e-5)
    if len(a) == len(b): assert kernel_distance(a, b) == pytest.approx(their_kernel(a, b), rel=1e-5)


def test_features_of_digits():
    splits = split(digits())
    judge, x = train_judge(splits.judge, n_steps=40), splits.train.unit()
    real, g = judge.features(splits.test.unit()), seeded("torchmetrics", "digits")
    for fake in (x, quantize(x + .3 * torch.randn(x.shape, generator=g), splits.train.levels), x[splits.train.y < 5]):
        a = judge.features(fake)
        assert frechet_distance(a, real) == pytest.approx(their_frechet(a, real), rel=1e-3)
        n = min(len(a), len(real))
        assert kernel_distance(a[:n], real[:n]) == pytest.approx(their_kernel(a[:n], real[:n]), rel=1e-3, abs=1e-6)
