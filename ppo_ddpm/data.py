import hashlib
import math
import operator
from dataclasses import dataclass, replace
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.utils import make_grid

def seeded(
    *key,         # Integers and strings: `seeded(seed, "rollout", epoch)`
    device="cpu", # Where the generator lives
)->torch.Generator: # Equal keys give equal numbers
    "A random generator named by what its numbers are for."
    plain = [k if isinstance(k, str) else operator.index(k) for k in key]
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    return torch.Generator(device).manual_seed(number)

@dataclass(repr=False)
class Pictures:
    "Pictures in memory, as bytes."
    x: Tensor               # uint8, shape (N, C, H, W), values 0..levels-1
    y: Tensor | None = None # class of each, int64, shape (N,)
    levels: int = 256       # values that a pixel can take, 2..256
    name: str = "pictures"
    classes: tuple = ()     # names of the classes

    def __post_init__(self):
        if self.x.dtype != torch.uint8 or self.x.ndim != 4:
            raise TypeError(
                f"pictures must be uint8 of shape (N, C, H, W), got {self.x.dtype} "
                f"of shape {tuple(self.x.shape)}; convert them to bytes first")

    def __len__(self): return len(self.x)

    def __getitem__(self, idx): # a slice, list, mask or tensor of indices
        "The chosen pictures."
        return replace(self, x=self.x[idx], y=None if self.y is None else self.y[idx])

    def to(self, device):
        "A copy on `device`."
        y = None if self.y is None else self.y.to(device)
        return replace(self, x=self.x.to(device), y=y)

    def unit(self, idx=slice(None))->Tensor: # float32, (B, C, H, W), in [-1, 1]
        "The pictures as networks see them."
        return self.x[idx].float() * (2 / (self.levels - 1)) - 1

    def __repr__(self):
        shape = "x".join(map(str, self.x.shape[1:]))
        return f"Pictures({self.name}: {len(self):,} of {shape}, {self.levels} levels)"

def digits()->Pictures: # 1,797 of 1x8x8, 17 levels
    "Handwritten digits, from a file inside scikit-learn."
    d = load_digits()
    x = torch.tensor(d.images, dtype=torch.uint8)[:, None]
    return Pictures(x, torch.tensor(d.target), 17, "digits", tuple("0123456789"))

def quantize(
    x:Tensor,    # Pictures, any shape
    levels:int,  # Values that a pixel of the data can take
)->Tensor:       # Same shape, in [-1, 1]
    "The nearest pictures that could have been data."
    scale = (levels - 1) / 2
    return ((x.clamp(-1, 1) + 1) * scale).round() * (1 / scale) - 1

class Splits(NamedTuple):
    "Three sets that share no picture."
    train: Pictures # to learn from
    judge: Pictures # to train the judge, and to choose on
    test: Pictures  # for final numbers only

def to_grid(
    x:Tensor,      # Shape (B, C, H, W) in [-1, 1], C = 1 or 3
    ncol:int=None, # Pictures in a row; None: as square as it gets
):                 # NumPy array (H', W', 3) in [0, 1]
    "Many pictures as one, with white gaps."
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"expected pictures of shape (B, 1 or 3, H, W), got {tuple(x.shape)}")
    x = (x.detach().cpu().float().clamp(-1, 1) + 1) / 2
    ncol = min(len(x), ncol or math.ceil(math.sqrt(len(x))))
    gap = max(1, x.shape[2] // 32)
    grid = make_grid(x, ncol, gap, pad_value=1)
    return grid[:, gap:-gap, gap:-gap].permute(1, 2, 0).numpy()

def show_grid(
    x:Tensor,       # Shape (B, C, H, W) in [-1, 1], C = 1 or 3
    ncol:int=None,  # Pictures in a row; None: as square as it gets
    title:str="",   # Shown above
    ax=None,        # Axes to draw on; None: a new figure of fitting size
):                  # The axes
    "Draw pictures side by side."
    grid = to_grid(x, ncol)
    if ax is None:
        h, w = grid.shape[:2]
        inch = min(7 / w, 5 / h, 0.6 / x.shape[-1]) # of one pixel
        size = (max(w * inch, 1.5), h * inch + 0.3 * bool(title))
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    ax.imshow(grid, interpolation="nearest")
    ax.set_title(title, fontsize=10)
    ax.axis("off")
    return ax

def split(
    pictures:Pictures,
    seed=0, # Same seed, same splits
)->Splits:  # Half of the pictures to train, a quarter to the judge, a quarter to test
    "Three disjoint random splits, stratified by class where classes are known."
    n, g = len(pictures), seeded("split", seed)
    order = torch.randperm(n, generator=g)
    y = torch.zeros(n, dtype=torch.long) if pictures.y is None else pictures.y.cpu()
    def cut(groups, fraction): # what rounding leaves over is carried to the next group
        first, rest, seen, taken = [], [], 0, 0
        for group in groups:
            seen += len(group)
            k = math.floor(fraction * seen + 0.5) - taken
            taken += k
            first.append(group[:k])
            rest.append(group[k:])
        return first, rest
    train, rest = cut([order[y[order] == c] for c in y.unique()], 0.5)
    judge, test = cut(rest, 0.5)
    parts = [torch.cat(p) for p in (train, judge, test)]
    if min(map(len, parts)) < 2:
        raise ValueError(f"{n} pictures are too few for three splits; add pictures")
    return Splits(*[pictures[p[torch.randperm(len(p), generator=g)]] for p in parts])
