import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Pictures, Splits, quantize, seeded
from .judge import FeatureNet, Judge, fit_net
from .reward import auc

def frechet_distance(
    a:Tensor, # Features, shape (N, D), N > D
    b:Tensor, # Features, shape (M, D), M > D
)->float:     # 0 or more, in squared units of the features
    """Distance of the Gaussians fitted to both
    ([Heusel et al. 2017](https://arxiv.org/abs/1706.08500), eq. 6)."""
    a, b = a.cpu().double(), b.cpu().double()
    if (n := min(len(a), len(b))) <= a.shape[1]:
        raise ValueError(f"{n} pictures cannot fill a covariance of {a.shape[1]} features; draw more")
    shift, A, B = a.mean(0) - b.mean(0), torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return max((shift @ shift + A.trace() + B.trace() - 2 * cross).item(), 0.)

def kernel_distance(
    a:Tensor, # Features, shape (N, D)
    b:Tensor, # Features, shape (M, D)
)->float:     # 0 on average for two samples of the same thing
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3
    ([Binkowski et al. 2018](https://arxiv.org/abs/1801.01401), eq. 4)."""
    a, b = a.cpu().double(), b.cpu().double()
    total = lambda u, v: sum(((c @ v.T / u.shape[1] + 1) ** 3).sum() for c in u.split(2048))
    diagonal = lambda u: ((u.square().sum(1) / u.shape[1] + 1) ** 3).sum()
    within = lambda u: (total(u, u) - diagonal(u)) / (len(u) * (len(u) - 1))
    return (within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))).item()

def precision_recall(
    real:Tensor, # Features of real pictures, shape (N, D)
    fake:Tensor, # Features of generated ones, shape (M, D)
    k=3,         # The neighbour that a ball reaches
)->tuple[float, float]: # Each 0 to 1
    """Share of fakes among the reals, and of reals among the fakes
    ([Kynkäänniemi et al. 2019](https://arxiv.org/abs/1904.06991))."""
    real, fake = real.cpu().double(), fake.cpu().double()
    far = lambda u, v: torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist")
    radii = lambda f: torch.cat([far(c, f).kthvalue(k + 1, 1).values for c in f.split(512)])
    def share_inside(x, centres):
        reach = radii(centres)
        return torch.cat([(far(c, centres) <= reach).any(1) for c in x.split(512)]).double().mean().item()
    return share_inside(fake, real), share_inside(real, fake)

def discriminator_auc(
    real_fit:Tensor,  # Real pictures to learn from, shape (N, C, H, W)
    fake_fit:Tensor,  # Generated pictures to learn from
    real_test:Tensor, # Other real pictures, to be told apart
    fake_test:Tensor, # Other generated pictures
    seed=0,
    n_steps=120,      # Optimiser steps
)->float:             # 0.5: cannot tell, 1: always tells
    "How well a new discriminator tells real from generated on pictures it has not seen."
    g, device = seeded(seed, "discriminator"), real_fit.device
    pick = lambda x: x[torch.randint(len(x), (32,), generator=g).to(device)]
    y = torch.tensor([1., 0.], device=device).repeat_interleave(32)
    batch = lambda: (torch.cat([pick(real_fit), pick(fake_fit)]), y)
    make = lambda: FeatureNet(real_fit.shape[-1], real_fit.shape[1], 1, width=16)
    loss = lambda out, y: F.binary_cross_entropy_with_logits(out[:, 0], y)
    net = fit_net(make, batch, loss, n_steps, 4e-3, seed, device)
    return auc(*(torch.cat([net(b)[:, 0] for b in x.split(1024)]) for x in (real_test, fake_test)))

def cross_auc(
    fake:Tensor, # Generated pictures
    real:Tensor, # Real ones, to be told apart
    fit=None,    # Real ones to learn from; None: the other half of `real`
    seed=0,
)->float:
    "Mean AUC of two discriminators, each tested on the half of the fakes that the other learned from."
    def halves(x, name):
        order = torch.randperm(len(x), generator=seeded(seed, name)).to(x.device)
        return x[order].tensor_split(2)
    f, r = halves(fake, "fakes"), halves(real, "reals")
    reals = [(r[0], r[1]), (r[1], r[0])] if fit is None else [(fit, real)] * 2
    scores = [discriminator_auc(a, f[i], b, f[1 - i], seed + i) for i, (a, b) in enumerate(reals)]
    return sum(scores) / 2

def evaluate(
    judge:Judge,
    fake:Tensor,     # Generated pictures, shape (n, C, H, W), n > 32
    splits:Splits,   # Real pictures
    which="test",    # "test" for what is reported, "judge" for choices
    seed=0,          # Seed of the discriminators
    with_auc=True,   # They take nearly all of the time
)->dict:             # fd, kd, precision, recall, discriminator_auc, class_tv (if labelled), n
    "Compare generated pictures with one split of real ones."
    pictures = dict(test=splits.test, judge=splits.judge)[which]
    real = pictures.unit().to(judge.device)
    fake = quantize(fake, pictures.levels).to(judge.device)
    a, b = judge.features(fake), judge.features(real)
    precision, recall = precision_recall(b, a)
    out = dict(fd=frechet_distance(a, b), kd=kernel_distance(a, b), precision=precision, recall=recall)
    if with_auc:
        fit = splits.judge.unit().to(judge.device) if which == "test" else None
        out["discriminator_auc"] = cross_auc(fake, real, fit, seed)
    if judge.labelled: out["class_tv"] = (judge.shares(a) - judge.shares(b)).abs().sum().item() / 2
    return out | dict(n=len(fake))

def floor(
    judge:Judge,
    splits:Splits,
    n:int,          # Real pictures in the place of generated ones: as many as you evaluate
    which="test",   # As in `evaluate`
    seed=0,
    with_auc=True,  # Of the first choice only
    repeats=8,      # Choices to average over
)->dict:            # As `evaluate`, averaged; and fd_std, the spread of one fd
    "What a perfect model would score: real pictures of the train split in the place of generated ones."
    train, g = splits.train, seeded(seed, "floor")
    if n > len(train):
        raise ValueError(
            f"the train split has {len(train)} pictures, so no floor can be measured "
            f"with {n}; evaluate fewer")
    rows = [evaluate(judge, train.unit(as_if_drawn(train, n, g)), splits, which, seed, with_auc and i == 0)
            for i in range(repeats)]
    mean = {key: sum(r[key] for r in rows if key in r) / sum(key in r for r in rows) for key in rows[0]}
    return mean | dict(n=n, fd_std=torch.tensor([r["fd"] for r in rows]).std().item())

def as_if_drawn(pictures:Pictures, n, g)->Tensor: # Indices, shape (n,)
    "`n` different pictures, the classes as often as in independent draws."
    order = torch.randperm(len(pictures), generator=g)
    if pictures.y is None: return order[:n]
    y, classes = pictures.y, pictures.y.unique()
    share = torch.stack([(y == c).float().mean() for c in classes])
    count = torch.bincount(torch.multinomial(share, n, replacement=True, generator=g), minlength=len(classes))
    chosen = torch.cat([order[y[order] == c][:m] for c, m in zip(classes, count)])
    rest = order[~torch.isin(order, chosen)]
    return torch.cat([chosen, rest[:n - len(chosen)]])
