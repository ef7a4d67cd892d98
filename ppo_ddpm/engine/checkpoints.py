"""A run is one folder; it survives Ctrl-C, a kill, a full disk and NaN, and goes on as if nothing had been."""
import math
import os
import secrets
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn


@contextmanager
def atomic_write(
    path, # File to write; its folder is made where it is missing
):
    "Yields a temporary path; what is written there becomes `path` in one step, or vanishes."
    path = Path(path)
    if path.is_dir(): raise IsADirectoryError(f"cannot write the file {path}: a folder has that name")
    tmp = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb+") as file: os.fsync(file.fileno()) # on the disk before it takes the name
        os.replace(tmp, path)
    except Exception as e:
        text = str(e)
        hidden = any(s in text for s in ("os error", "inline_container")) # of torch and safetensors
        if not isinstance(e, OSError) and not hidden: raise
        why = getattr(e, "strerror", None) or "no space left, or a limit on file sizes"
        raise OSError(f"cannot write {path} ({why.lower()}); what was there is unchanged") from e
    finally:
        with suppress(OSError): tmp.unlink()

def tensors_of(state, name=""):
    "(name, value) of all numbers in dictionaries and lists."
    if not isinstance(state, (dict, list, tuple)):
        yield name, state
        return
    for k, v in state.items() if isinstance(state, dict) else enumerate(state):
        yield from tensors_of(v, f"{name}.{k}".lstrip("."))

def not_finite(state)->str | None: # "policy.conv_in.weight", or None
    "The name of the first part that holds NaN or infinity."
    named = list(tensors_of(state))
    numbers = {n: v for n, v in named if isinstance(v, float)}
    tensors = {n: v for n, v in named if isinstance(v, Tensor) and v.is_floating_point()}
    norm = nn.utils.get_total_norm(list(tensors.values())) # one number to wait for, not hundreds
    if norm.isfinite() and all(map(math.isfinite, numbers.values())): return None
    bad = lambda v: not torch.as_tensor(v).isfinite().all()
    return next((n for n, v in (numbers | tensors).items() if bad(v)), None)

WRITTEN = ("config.yaml", "checkpoint.pt", "metrics.json", "report.html", "README.md", "events.out.tfevents.*",
           "ddpm.safetensors", "reward.safetensors", "policy.safetensors", "samples.png", "samples.gif",
           "before.png", "after.png", "curves.png", "most_wrong.png", "calibration.png")

@contextmanager
def run_folder(
    path,            # Folder of the run
    resume=False,    # Go on with what is there
    overwrite=False, # Replace the run that is there, see `clear_run`
):
    "The folder of one run and of no other process; FileExistsError if it is in use."
    path = Path(path).expanduser()
    used = path.is_dir() and any(p.name != ".lock" for p in path.iterdir())
    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other; give one of them")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; choose another folder")
    if resume and not used:
        raise FileNotFoundError(f"there is nothing to resume in {path}; leave out --resume")
    if used and not (resume or overwrite):
        raise FileExistsError(f"{path} is not empty; use --resume, --overwrite or another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", timeout=0).acquire()
    except Timeout:
        raise FileExistsError(f"another process runs in {path}; choose another folder") from None
    except OSError as e:
        raise OSError(f"cannot write into {path} ({e.strerror.lower()}); choose another") from None
    with lock:
        for file in path.glob(".*.tmp*"): file.unlink() # of a writer that was killed
        try: yield path
        finally:
            if os.listdir(path) == [".lock"]: shutil.rmtree(path) # the run ended before it wrote anything

def clear_run(path):
    "Remove what an earlier run has written, and nothing else."
    for pattern in WRITTEN:
        for file in Path(path).glob(pattern): file.unlink()

def copy_of(state):
    "A copy of tensors and numbers in dictionaries and lists."
    if isinstance(state, Tensor): return state.detach().clone()
    if isinstance(state, dict): return {k: copy_of(v) for k, v in state.items()}
    return type(state)(map(copy_of, state)) if isinstance(state, (list, tuple)) else state

@contextmanager
def intact(
    *parts, # Have `state_dict` and `load_state_dict`
):
    "The block happens whole or not at all; FloatingPointError if it leaves NaN or infinity behind."
    before = [copy_of(p.state_dict()) for p in parts]
    try:
        yield
        if name := not_finite([p.state_dict() for p in parts]):
            raise FloatingPointError(f"{name} became NaN or infinite; lower the learning rate")
    except BaseException: # Ctrl-C too
        for part, state in zip(parts, before): part.load_state_dict(state)
        raise

def check_record(rec, tolerance):
    for name, v in rec.items():
        if isinstance(v, float) and not math.isfinite(v):
            raise FloatingPointError(f"{name} is {v}; lower the learning rate")
    if rec.get("ratio_error", 0) > tolerance:
        raise RuntimeError(
            f"before any update ratios were off 1 by {rec['ratio_error']:.3g}: the policy does not "
            "repeat itself; compute in fp32 without dropout, or raise finetune.ratio_tolerance")

def whole_rounds(
    records,           # A training loop
    *parts,            # What it changes
    tolerance=math.inf, # Largest `ratio_error` of a record
):
    "The same loop, but a round that fails or is interrupted never happened."
    n = 0
    while True:
        try:
            with intact(*parts):
                rec = next(records, None)
                if rec is None: return
                check_record(rec, tolerance)
        except (FloatingPointError, ValueError, RuntimeError) as e:
            raise type(e)(f"round {n + 1} of this run was taken back: {e}") from e
        n += 1
        yield rec

class Saver:
    "Writes a checkpoint now and then, and when the run is asked to stop."
    def __init__(self,
        path,       # File to write
        command,    # Who writes it
        parts:dict, # What to keep: numbers, lists, dictionaries, things with `state_dict`
        pause=20,   # Between two checkpoints, in multiples of the time that one takes
    ):
        self.path, self.command, self.parts, self.pause = Path(path), command, parts, pause
        self.stopping, self.next, self.start = False, 0., time.time()

    def __call__(self, last=False):
        "After each round; KeyboardInterrupt once the state is safe, if Ctrl-C was pressed."
        start = time.monotonic()
        if start < self.next and not (last or self.stopping): return
        state = {k: p.state_dict() if hasattr(p, "state_dict") else p for k, p in self.parts.items()}
        state |= dict(command=self.command, version=2, seconds=time.time() - self.start)
        with atomic_write(self.path) as tmp: torch.save(state, tmp)
        self.next = time.monotonic() + self.pause * (time.monotonic() - start)
        if self.stopping: raise KeyboardInterrupt

    @contextmanager
    def patient(self):
        "Inside, Ctrl-C and SIGTERM wait for the end of the round; a second one does not."
        def stop(*_):
            if self.stopping: raise KeyboardInterrupt
            self.stopping = True
            with suppress(RuntimeError):
                print("\nstopping at the end of this round", file=sys.stderr, flush=True)
        old = {}
        with suppress(ValueError): # not the main thread
            for s in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(s) != signal.SIG_IGN: old[s] = signal.signal(s, stop)
        try: yield
        finally:
            for s, handler in old.items(): signal.signal(s, handler)
        if self.stopping: raise KeyboardInterrupt

def load_checkpoint(
    path,        # What a `Saver` wrote
    command,     # Of the same command
)->dict:         # Empty if there is none
    "ValueError for a broken checkpoint, one of another command or of an older version."
    if not Path(path).is_file(): return {}
    again = "; start again with --overwrite"
    try: state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        kind = type(e).__name__
        raise ValueError(f"{path} is no checkpoint or is cut short ({kind}){again}") from None
    if not isinstance(state, dict) or state.get("version") != 2:
        raise ValueError(f"{path} was written by another version of this package{again}")
    if state["command"] != command:
        raise ValueError(f"{path} is a checkpoint of {state['command']}, not of {command}")
    if name := not_finite(state):
        raise ValueError(f"{path} holds NaN or infinity in {name}{again}")
    return state
