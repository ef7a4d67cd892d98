"Devices without float64, such as MPS of a Mac: nothing of that type may be made there, only after the way to the CPU."
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppo_ddpm.evaluate import discriminator_auc, frechet_distance, kernel_distance, precision_recall
from ppo_ddpm.judge import FeatureNet, Judge
from ppo_ddpm.kinds import Kinds
from ppo_ddpm.ppo import whiten
from ppo_ddpm.reward import auc
from ppo_ddpm.sampling import DDIM, rollout
from ppo_ddpm.schedule import NoiseSchedule
from ppo_ddpm.unet import UNet

aten = torch.ops.aten


class NoFloat64(TorchDispatchMode):
    "The device meta, which computes shapes and types only, stands for the accelerator; what leaves it is random. `found`: where float64 was made on it."
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else None
        if isinstance(x, torch.Tensor) and x.is_meta:
            if func is aten._local_scalar_dense.default: return torch.ones((), dtype=x.dtype).item()
            if func is aten.bincount.default:
                n = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
                return torch.zeros(n, dtype=torch.int64, device="meta")
            if func is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
                return torch.rand(x.shape).to(kwargs.get("dtype") or x.dtype)
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_meta and t.dtype == torch.float64: self.note()
        return out

    def note(self):
        ours = lambda f: Path(f.filename).parent.name in ("ppo_ddpm", "engine", "tests")
        stack = [f for f in traceback.extract_stack() if ours(f) and f.name not in ("note", "__torch_dispatch__")]
        line = stack[-1]
        fault = f"{Path(line.filename).name}:{line.lineno} makes float64 on the device: .cpu() first, then .double()"
        if fault not in self.found: self.found.append(fault)


def judge(): return Judge(FeatureNet().to("meta").eval(), True, 1.)


def sampler(): return DDIM(NoiseSchedule("cosine"), 4).to("meta")


MEASURES = dict(
    auc=lambda x, f: auc(x[:, 0, 0, 0], x[:30, 0, 0, 0]),
    shares=lambda x, f: (judge().shares(f) - judge().shares(f)).abs().sum(),
    features=lambda x, f: judge().features(x),
    discriminator_auc=lambda x, f: discriminator_auc(x, x, x, x, n_steps=10),
    frechet_distance=lambda x, f: frechet_distance(f, f),
    kernel_distance=lambda x, f: kernel_distance(f, f),
    precision_recall=lambda x, f: precision_recall(f, f),
    kinds=lambda x, f: Kinds(x, 4)(x),
    whiten=lambda x, f: whiten(f[:, 0]),
    network=lambda x, f: UNet().to("meta")(x, torch.zeros(len(x), dtype=torch.long, device="meta")),
    rollout=lambda x, f: rollout(lambda x, t: x, sampler(), x))


@pytest.mark.parametrize("name", MEASURES)
def test_no_float64_on_the_device(name):
    x, features = torch.zeros(40, 1, 8, 8, device="meta"), torch.zeros(40, 32, device="meta")
    with NoFloat64() as watch: MEASURES[name](x, features)
    assert not watch.found, "\n".join(watch.found)


def test_planted_float64():
    x = torch.zeros(4, device="meta")
    with NoFloat64() as watch:
        x.cpu().double()
        x.float().sum().item()
        (x > 0).sum().cpu()
    assert not watch.found
    for plant in (lambda: x.double().cpu(), lambda: torch.zeros(2, dtype=torch.float64, device="meta")):
        with NoFloat64() as watch: plant()
        assert len(watch.found) == 1 and watch.found[0].startswith("test_device.py")
