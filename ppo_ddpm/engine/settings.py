"""Every setting has a type, a range, a default and a sentence; files and the command line are two ways to write them."""
import difflib
import inspect
import os
import random
import re
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Annotated, Literal, get_type_hints

import numpy as np
import torch
from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ppo_ddpm import ddpm, finetune, realfake
from ppo_ddpm.sampling import DDIM
from ppo_ddpm.schedule import NoiseSchedule
from ppo_ddpm.unet import UNet

def set_seed(
    seed:int,           # 0 to 2**32 - 1
    deterministic=True, # Choose kernels that repeat; slower on a GPU
):
    "Seed Python, NumPy and torch; an operation that has no repeatable kernel says so in a warning."
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8") # cuBLAS repeats only with a fixed workspace
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic) # its backward pass does not repeat,
    torch.backends.cuda.enable_flash_sdp(not deterministic)         # nor does this one's
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False

def pick_device(
    name="auto", # auto (CUDA, else MPS, else CPU), cpu, gpu (the first CUDA device), cuda, cuda:1, mps
)->torch.device:
    "The device of that name; ValueError for no such name, RuntimeError for a device that is not there."
    n, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto": return torch.device("cuda" if n else "mps" if mps else "cpu")
    if not re.fullmatch(r"cpu|gpu|mps|cuda(:\d+)?", str(name)):
        raise ValueError(f"unknown device {name!r}; expected auto, cpu, gpu, cuda, cuda:0 (or higher) or mps")
    device = torch.device("cuda:0" if name == "gpu" else name)
    if device.type == "cuda" and (device.index or 0) >= n or device.type == "mps" and not mps:
        raise RuntimeError(f"device {name!r} is not here: torch sees {n} CUDA devices; use auto or cpu")
    return device

STRICT = ConfigDict(extra="forbid")
Share = Annotated[float, Field(ge=0, lt=1)]

@dataclass(frozen=True, config=STRICT)
class Paths:
    "Where things come from."
    real_img: str = "digits"     # digits, FashionMNIST, CIFAR10, CelebA, or a folder of pictures
    fake_img: str | None = None  # Folder of generated pictures; null: drawn from the model
    ddpm: str | None = None      # Weights, a diffusers folder or a name on the Hub; null: the digits model
    rm: str | None = None        # Weights of the reward model; null: it is trained first

@dataclass(frozen=True, config=STRICT)
class Data:
    "The pictures."
    size: Annotated[int, Field(ge=1, le=8192)] = 8 # Height and width; others are resized and cropped
    channels: Literal[1, 3] = 1  # 1 (grey) or 3 (RGB)
    root: str = "data"           # Folder for sets that are downloaded
    download: bool = True        # Fetch a set that is not there yet
    value_range: tuple[float, float] | None = None # Darkest and brightest value in the files; null: found

@dataclass(frozen=True, config=STRICT)
class Model:
    "The network."
    channels: tuple[PositiveInt, ...] = (24, 48) # Width of each level; the size is halved between them
    n_blocks: Annotated[int, Field(ge=1, le=64)] = 1 # Residual blocks of a level
    attn: tuple[PositiveInt, ...] = (4,)         # Sizes with self-attention
    dropout: Share = 0.                          # Share of activations dropped
    head_dim: PositiveInt | None = None          # Channels of an attention head; null: one head
    groups: PositiveInt = 8                      # Groups of the group norms

@dataclass(frozen=True, config=STRICT)
class Schedule:
    "How noise grows."
    kind: Literal["linear", "cosine"] = "cosine" # Which noise schedule
    T: Annotated[int, Field(ge=2, le=1_000_000)] = 1000 # Noise steps in training

@dataclass(frozen=True, config=STRICT)
class TrainDDPM(ddpm.TrainDDPM):
    "Pretraining of the diffusion model."
    save: bool = True # Write the weights into the run folder

@dataclass(frozen=True, config=STRICT)
class TrainReward(realfake.TrainReward):
    "The reward model."
    num_workers: NonNegativeInt = 0 # Threads that read picture files; 0: one per core
    save: bool = True               # Write the weights into the run folder

@dataclass(frozen=True, config=STRICT)
class Finetune(finetune.Finetune):
    "Fine-tuning with PPO."
    ddim_steps: PositiveInt = 4  # Steps K of the sampler
    eta: Annotated[float, Field(gt=0, le=1)] = 1. # Noise of the sampler; a step without noise has no density
    spacing: Literal["trailing", "leading", "linspace"] = "trailing" # How the K steps are chosen
    power: Annotated[float, Field(ge=0.5, le=3)] = 1. # Above 1 the grid is denser towards the picture
    clip_x0: PositiveFloat | None = None # Clamp the predicted picture to +- this; null: leave it
    refresh_steps: PositiveInt = 12      # Optimiser steps in a lesson of the reward model
    ratio_tolerance: NonNegativeFloat = 0.01 # How far ratios may be off 1 at the start of a round
    lora_rank: PositiveInt | None = None # Learn corrections of this rank; null: learn the layers
    save: bool = True                    # Write the weights into the run folder

@dataclass(frozen=True, config=STRICT)
class Evaluate:
    "Measuring the result."
    n: Annotated[int, Field(ge=33)] = 800 # Pictures drawn for each row of the table
    full_steps: PositiveInt = 50 # Steps of the slow sampler to compare with
    every: PositiveInt = 5       # Rounds between looks at the held-out distance

@dataclass(frozen=True, config=STRICT)
class Compute:
    "How the network is run."
    precision: Literal["fp32", "bf16", "fp16"] = "fp32" # bf16 for recent GPUs, fp16 for older ones
    compile: bool = False        # Let torch.compile make one program of the network
    max_batch: PositiveInt | Literal["auto"] | None = None # Most pictures in the network at once; auto: what fits
    checkpointing: bool = False  # Compute forward passes twice, to save memory

@dataclass(frozen=True, config=STRICT)
class Config:
    "Everything that decides a run."
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0 # Seed of everything random
    device: str = "auto"         # auto, cpu, gpu, cuda, cuda:1, mps
    path: Paths = Paths()
    data: Data = Data()
    model: Model = Model()
    schedule: Schedule = Schedule()
    train_ddpm: TrainDDPM = TrainDDPM()
    train_reward: TrainReward = TrainReward()
    finetune: Finetune = Finetune()
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def fits_together(self):
        "What each section allows and their sum forbids shows before any work is done."
        self.sampler(self.finetune.ddim_steps), self.sampler(self.evaluate.full_steps)
        if (n := self.finetune.decisions) and n >= max(2, self.finetune.ddim_steps):
            raise ValueError(f"finetune.decisions = {n}, but {self.finetune.ddim_steps} steps have one decision less")
        with torch.device("meta"): self.unet()
        return self

    def noise_schedule(self): return NoiseSchedule(self.schedule.kind, self.schedule.T)

    def sampler(self, n_steps, schedule=None):
        f = self.finetune
        return DDIM(schedule or self.noise_schedule(), n_steps, f.eta, f.spacing, f.power, f.clip_x0)

    def unet(self): return UNet(self.data.size, self.data.channels, **asdict(self.model))

RENAMED = {"finetune.microbatch": "finetune.minibatch"}
RETIRED = {"compute.host": False} # may still be written in a file, with this value

def flat(d, prefix=""):
    "Nested dictionaries as one with dotted keys."
    out = {}
    for k, v in d.items():
        inner = isinstance(v, dict)
        out |= flat(v, f"{prefix}{k}.") if inner else {f"{prefix}{k}": v}
    return out

def nested(d):
    "The inverse of `flat`."
    out = {}
    for key, v in d.items():
        *sections, name = key.split(".")
        here = out
        for s in sections: here = here.setdefault(s, {})
        here[name] = v
    return out

@cache
def describe()->dict: # {dotted key: (type, default, comment)}
    "All settings."
    def walk(cls, prefix=""):
        hints, comments = get_type_hints(cls, include_extras=True), {}
        for c in reversed(cls.__mro__[:-1]):
            comments |= dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(c), re.M))
        for f in fields(cls):
            if is_dataclass(hints[f.name]): yield from walk(hints[f.name], f"{f.name}.")
            else: yield prefix + f.name, (hints[f.name], f.default, comments.get(f.name, ""))
    return dict(walk(Config))

def unknown(key, src):
    near = difflib.get_close_matches(key, describe(), 1, 0.6) or [
        k for k in describe() if k.split(".")[-1] == key.split(".")[-1]]
    hint = f"did you mean {near[0]!r}?" if near else "ppo-ddpm finetune --help lists them"
    return ValueError(f"unknown setting {key!r} in {src}; {hint}")

def make_config(
    settings:dict,        # Dotted keys
    src="the settings",   # What to call them in an error
)->Config:
    "Checked settings; ValueError in one sentence names the key."
    settings = {RENAMED.get(k, k): v for k, v in settings.items() if k not in RETIRED or v != RETIRED[k]}
    known = describe()
    for k, v in settings.items():
        empty = v is None and any(other.startswith(f"{k}.") for other in known)
        if k not in known and not empty: raise unknown(k, src)
    settings = {k: v for k, v in settings.items() if k in known}
    try: return TypeAdapter(Config).validate_python(nested(settings))
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(p) for p in first["loc"] if str(p).isidentifier())
        said = first["msg"].removeprefix("Value error, ")
        if not key: raise ValueError(f"{said} (in {src})") from None
        raise ValueError(f"{key} in {src}: {said[0].lower()}{said[1:]}, got {first['input']!r}") from None
