"""A file of weights says what network it belongs to and what noise it was trained with."""
import json
import pickle
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ppo_ddpm.engine.checkpoints import atomic_write, not_finite
from ppo_ddpm.layers import Downsample
from ppo_ddpm.schedule import NoiseSchedule
from ppo_ddpm.unet import UNet

def build_unet(
    config:dict, # Of a `UNet`; and where a checkpoint differs from DDPM: eps, flip_sin_to_cos, freq_shift, pad_all
)->UNet:
    "The network that a file describes, in evaluation mode."
    variant = dict(eps=1e-6, flip_sin_to_cos=False, freq_shift=1, pad_all=False)
    net = UNet(**{k: v for k, v in config.items() if k not in variant}).eval()
    differs = {k: config[k] for k in variant if config.get(k, variant[k]) != variant[k]}
    variant |= differs
    net.config |= differs
    net.flip, net.shift = variant["flip_sin_to_cos"], variant["freq_shift"]
    for m in net.modules():
        if isinstance(m, nn.GroupNorm): m.eps = variant["eps"]
        if isinstance(m, Downsample) and variant["pad_all"]: m.pad = (1, 1, 1, 1)
    return net

def save_weights(
    model:nn.Module,
    path,                        # .safetensors, or .pth and .pt for a plain state dict
    schedule:NoiseSchedule=None, # What it was trained with
    **about,                     # Facts to keep with them
)->Path:                         # The file
    "Write weights, in a .safetensors file with network and schedule; ValueError for NaN."
    path = Path(path).expanduser()
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights are saved as .safetensors, .pth or .pt, got the name {path.name}")
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    if name := not_finite(state):
        raise ValueError(f"{name} holds NaN or infinity, so {path} was not written")
    about |= dict(config=getattr(model, "config", None))
    if schedule:
        kind = schedule.abar64.tolist() if schedule.kind == "table" else schedule.kind
        about |= dict(schedule=dict(kind=kind, T=schedule.T))
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items() if v is not None}
    with atomic_write(path) as tmp:
        if path.suffix == ".safetensors": save_file(state, tmp, text | dict(format="pt"))
        else: torch.save(state, tmp)
    return path

def read_weights(
    path,
)->tuple[dict, dict]: # State dict; what the file says of itself (empty for .pth and .pt)
    "Read weights without running code from the file; FileNotFoundError or ValueError in one sentence."
    path = Path(path).expanduser()
    if not path.is_file(): raise FileNotFoundError(f"there is no weights file {path}")
    about = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                state = {k: file.get_tensor(k) for k in file.keys()}
        else:
            with warnings.catch_warnings(): # of old pickles; what matters is said below
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        code = path.read_bytes()[:2] == b"PK" and "nsupported" in str(e) # a pickle of torch, not a web page
        why = "holds more than tensors and could run code" if code else "is no weights file"
        raise ValueError(f"{path} {why}, so it was not read; save a state_dict()") from None
    except (PermissionError, MemoryError): raise
    except Exception as e:
        kind = type(e).__name__
        raise ValueError(f"{path} is no weights file or is cut short ({kind}); get it again") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no plain state dict; save model.state_dict()")
    if name := not_finite(state):
        raise ValueError(f"{name} in {path} holds NaN or infinity; take another file")
    about = {k: json.loads(v) if k in ("config", "schedule") else v for k, v in about.items()}
    return state, about

def load_weights(
    model:nn.Module, # Unchanged if anything is wrong
    path,
)->dict:             # What the file says of itself
    "Fill a model; ValueError says which tensors do not fit."
    state, about = read_weights(path)
    own = model.state_dict()
    shape = lambda d, k: tuple(d[k].shape) if k in d else "none"
    wrong = [k for k in {**own, **state} if shape(own, k) != shape(state, k)]
    if wrong:
        raise ValueError(
            f"{path} does not fit this {type(model).__name__}: {len(wrong)} of {len(own)} tensors "
            f"differ, such as {wrong[0]} ({shape(state, wrong[0])} in the file, "
            f"{shape(own, wrong[0])} in the network)")
    model.load_state_dict(state)
    return about

def load_unet(
    path,      # A .safetensors file of `save_weights`
)->tuple[UNet, NoiseSchedule | None, dict]: # Network, its schedule if known, all that the file says
    "Network and schedule from one file."
    _, about = read_weights(path)
    if not isinstance(about.get("config"), dict) or "channels" not in about["config"]:
        raise ValueError(f"{path} does not say what network it belongs to; use load_weights")
    model = build_unet(about["config"])
    load_weights(model, path)
    s = about.get("schedule")
    return model, NoiseSchedule(**s) if s else None, about
