"""What the commands do: each is a short story told with the functions of the other modules."""
import hashlib
import json
import math
import os
import platform
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ppo_ddpm import __version__
from ppo_ddpm.data import split
from ppo_ddpm.ddpm import Pretraining, pretrained, train_ddpm
from ppo_ddpm.engine.board import log_record, save_grid
from ppo_ddpm.engine.checkpoints import Saver, atomic_write, clear_run, load_checkpoint, whole_rounds
from ppo_ddpm.engine.fast import Engine, PieceStep, fitting_batch, recompute_blocks
from ppo_ddpm.engine.hub import open_pretrained
from ppo_ddpm.engine.options import save_config
from ppo_ddpm.engine.pictures import load_pictures
from ppo_ddpm.engine.settings import Config, pick_device, set_seed
from ppo_ddpm.engine.weights import load_unet, load_weights, save_weights
from ppo_ddpm.evaluate import evaluate, floor
from ppo_ddpm.judge import train_judge
from ppo_ddpm.realfake import RealFake
from ppo_ddpm.reward import RewardTraining, train_reward
from ppo_ddpm.sampling import sample
from ppo_ddpm.data import seeded

def bar(items, desc, total=None, show=True):
    "A progress bar; where nobody watches it move, a line now and then."
    pause = 0.1 if sys.stderr.isatty() else 10 # seconds
    return tqdm(items, desc, total, disable=not show, mininterval=pause)

def contradiction(path, setting, theirs, ours):
    return ValueError(f"{path} was made with {setting} = {theirs}, and the settings say {ours}; "
                      f"set --{setting} to that, or give other weights")

def load_model(cfg:Config): # -> network in evaluation mode, its schedule, the settings that describe it
    "The network that `path.ddpm` names; ValueError where it contradicts the settings."
    path, model, schedule = cfg.path.ddpm, cfg.unet().eval(), cfg.noise_schedule()
    if not path:
        shipped, its = pretrained()
        if (shipped.config, repr(its), "digits") == (model.config, repr(schedule), cfg.path.real_img):
            print("model: path.ddpm is null, so the digits model of this package")
            return shipped, its, cfg
        print("model: path.ddpm is null and no shipped model fits, so an UNTRAINED network; "
              "train one first with ppo-ddpm train-ddpm")
        return model, schedule, cfg
    file = Path(path).expanduser()
    if file.suffix in (".pth", ".pt"): load_weights(model, file)
    elif file.suffix == ".safetensors":
        ours, named = model.config, repr(schedule)
        model, its, _ = load_unet(file)
        where = dict(size="data.size", in_channels="data.channels")
        for k, v in ours.items():
            if model.config[k] != v: raise contradiction(path, where.get(k, f"model.{k}"), model.config[k], v)
        if its and its.kind != "table" and repr(its) != named:
            raise contradiction(path, "schedule.kind", f"{its.kind} (T = {its.T})", f"{schedule.kind} (T = {schedule.T})")
        schedule = its or schedule
    else:
        model, its, clips = open_pretrained(path)
        for setting, k in ("data.size", "size"), ("data.channels", "in_channels"):
            ours = getattr(cfg.data, setting.split(".")[1])
            if model.config[k] != ours: raise contradiction(path, setting, model.config[k], ours)
        if clips and not cfg.finetune.clip_x0:
            print("note: its own sampler clamps the predicted picture; --finetune.clip_x0 1 does the same")
        keys = ("channels", "n_blocks", "attn", "dropout", "head_dim", "groups")
        cfg = replace(cfg, model=replace(cfg.model, **{k: model.config[k] for k in keys}))
        schedule = its or schedule
    print(f"model: {path}, {schedule}")
    return model, schedule, cfg

def fingerprint(pictures)->str:
    "A short name for exactly these pictures."
    return hashlib.blake2b(pictures.x.cpu().numpy().tobytes(), digest_size=8).hexdigest()

class Job:
    "All that a run starts from."
    def __init__(self,
        command, cfg:Config,
        out,               # Folder of the run
        state:dict,        # Of the checkpoint to go on from, or empty
        untrained=False,   # A new network is wanted
        device=None,       # None: as the settings say
        main=True,         # Does this process write?
    ):
        self.command, self.out, self.state, self.main = command, Path(out).expanduser(), state, main
        self.start = time.time() - state.get("seconds", 0)
        set_seed(cfg.seed)
        self.device = device or pick_device(cfg.device)
        model, self.schedule, cfg = (cfg.unet(), cfg.noise_schedule(), cfg) if untrained else load_model(cfg)
        self.model = model.to(self.device)
        if cfg.compute.checkpointing: recompute_blocks(self.model)
        pictures = self.pictures(cfg, cfg.path.real_img)
        self.shape, self.data = tuple(pictures.x.shape[1:]), fingerprint(pictures)
        if state and state["data"] != self.data:
            raise ValueError(f"the pictures in {cfg.path.real_img} are not those that this run began with; "
                             "restore them, or start a new run in another folder")
        print(f"data: {pictures}; seed {cfg.seed}, on {self.device}", flush=True)
        self.splits = split(pictures)
        if cfg.compute.max_batch == "auto":
            fits = fitting_batch(self.model, self.shape, cfg.compute.precision)
            cfg = replace(cfg, compute=replace(cfg.compute, max_batch=fits))
            print(f"compute.max_batch: auto, so {fits} pictures at once", flush=True)
        self.cfg, self.ddim = cfg, self.sampler(cfg, cfg.finetune.ddim_steps)
        self.history, self.reward_history = state.get("history", []), state.get("reward_history", [])

    def pictures(self, cfg, source):
        d = cfg.data
        return load_pictures(source, d.size, d.channels, d.root, d.download,
                             workers=cfg.train_reward.num_workers or None, value_range=d.value_range)

    def sampler(self, cfg, n_steps): return cfg.sampler(n_steps, self.schedule).to(self.device)

    def draw(self, policy, n, *key, n_steps=None):
        "Pictures (n, C, H, W); the noise depends on seed and key only."
        g = seeded(self.cfg.seed, *key, device=self.device)
        ddim = self.sampler(self.cfg, n_steps) if n_steps else self.ddim
        if not isinstance(policy, Engine):
            policy = Engine(policy, self.cfg.compute, min(self.cfg.compute.max_batch or 256, 256))
        starts = bar(range(0, n, 256), f"drawing in {ddim.n_steps} steps", show=n > 256)
        noise = lambda k: torch.randn(k, *self.shape, generator=g, device=self.device)
        return torch.cat([sample(policy, ddim, noise(min(256, n - i)), g) for i in starts])

    def begin(self, parts:dict): # What a checkpoint keeps besides the curves
        "Restore a checkpoint, open the log; from here on files are written."
        for name in parts:
            if name in self.state: restore(parts[name], self.state[name], name)
        clear = not self.state and self.main
        if clear: clear_run(self.out)
        save_config(self.cfg, self.out / "config.yaml")
        self.writer = open_log(self.out, self.history, self.reward_history)
        keep = dict(history=self.history, reward_history=self.reward_history, data=self.data)
        self.saver = Saver(self.out / "checkpoint.pt", self.command, parts | keep)
        self.saver.start = self.start

    def follow(self, loop, total, desc, history, prefix="", look=lambda rec: {}):
        "Go through a training loop with a bar, a log and checkpoints."
        with self.saver.patient(), bar(loop, desc, total, show=total > 0) as rounds:
            for rec in rounds:
                rec |= look(rec)
                numbers = {k: v for k, v in rec.items() if isinstance(v, (int, float))}
                shown = {k: f"{numbers[k]:.3g}" for k in ("loss", "reward", "fd", "auc") if k in numbers}
                rounds.set_postfix(shown, refresh=False)
                log_record(self.writer, rec, prefix)
                history.append(numbers)
                self.saver(last=len(history) >= total)

    def judge(self, seed=0):
        judge = train_judge(self.splits.judge, seed, device=self.device)
        print(f"judge: {judge.accuracy:.0%} right on unseen pictures of the judge split", flush=True)
        return judge

    def about(self):
        "What a run was made with, for metrics.json."
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else platform.machine()
        return dict(
            seed=self.cfg.seed, seconds=time.time() - self.start, n=self.cfg.evaluate.n,
            data=self.splits.train.name, fingerprint=self.data, device=str(self.device), hardware=name,
            cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
            python=platform.python_version(), ppo_ddpm=__version__)

    def floor(self, judge, which="test", with_auc=True):
        return floor(judge, self.splits, min(self.cfg.evaluate.n, len(self.splits.train)), which, with_auc=with_auc)

def restore(part, state, name):
    try: part.load_state_dict(state)
    except Exception as e:
        raise ValueError(f"the checkpoint does not fit the settings: '{name}' is of another run "
                         f"({type(e).__name__}); start again with --overwrite") from None

def open_log(out, history, reward_history):
    "TensorBoard's writer, which hides what came after the last checkpoint."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter
    files = list(out.glob("events.out.tfevents.*"))
    done = max((r.get("epoch", r.get("step", 0)) for r in history), default=0)
    if any(f".{int(time.time())}." in f.name for f in files): time.sleep(1) # sorted by the second in their names
    writer = SummaryWriter(str(out), purge_step=done + 1 if files and done else None)
    text = (out / "config.yaml").read_text(encoding="utf-8")
    if not files: writer.add_text("config", "    " + text.replace("\n", "\n    "), 0)
    for rec in reward_history:
        if rec["epoch"] > done: log_record(writer, rec, "reward_model/")
    return writer

def write_json(path, metrics:dict):
    "Numbers with six digits; null for NaN."
    def plain(v):
        if isinstance(v, dict): return {k: plain(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)): return [plain(x) for x in v]
        return (float(f"{v:.6g}") if math.isfinite(v) else None) if isinstance(v, float) else v
    with atomic_write(path) as tmp: tmp.write_text(json.dumps(plain(metrics), indent=1) + "\n", encoding="utf-8")

COLUMNS = dict(fd="distance", kd="kernel", precision="precision", recall="recall",
               discriminator_auc="AUC", class_tv="classes")

def table(rows:dict)->str: # {name: numbers of `evaluate`}
    "Numbers side by side; what was not measured is a dash."
    columns = {k: v for k, v in COLUMNS.items() if any(k in r for r in rows.values())}
    width = max(map(len, rows))
    line = lambda name, cells: name.ljust(width) + "".join(c.rjust(11) for c in cells)
    cell = lambda r, k: f"{r[k]:.3f}" if r.get(k) is not None else "-"
    return "\n".join([line("", columns.values()), *(line(n, [cell(r, k) for k in columns]) for n, r in rows.items())])

def run_train_ddpm(job):
    "Train a diffusion model from scratch."
    cfg, compute = job.cfg.train_ddpm, job.cfg.compute
    batch = min(compute.max_batch or cfg.batch_size, cfg.batch_size)
    run, step = Pretraining(job.model, cfg), PieceStep(compute, job.device, batch, scale=2.**16)
    run.model, average = Engine(run.model, compute, batch), Engine(run.ema.model, compute, min(batch, 256))
    job.begin(dict(run=run, step=step))
    every = 50 if cfg.num_steps >= 500 else 5
    shown = run.step * 10 // cfg.num_steps
    def look(rec): # ten times in a run
        nonlocal shown
        last, shown = shown, run.step * 10 // cfg.num_steps
        return dict(samples=job.draw(average, 36, "show", n_steps=job.cfg.evaluate.full_steps)) if shown > last else {}
    loop = train_ddpm(run, job.schedule, job.splits.train, job.cfg.seed, every, step)
    left = math.ceil((cfg.num_steps - run.step) / every)
    job.follow(whole_rounds(loop, run, step), left, "training", job.history, look=look)
    if cfg.save:
        facts = dict(data=job.splits.train.name, fingerprint=job.data, pictures=str(len(job.splits.train)),
                     seed=str(job.cfg.seed), steps=str(run.step))
        for path in filter(None, (job.out / "ddpm.safetensors", job.cfg.path.ddpm)):
            print(f"weights: {save_weights(run.ema.model, path, job.schedule, **facts)}")
    measure_ddpm(job, average)

def measure_ddpm(job, policy):
    "Distances at several step counts."
    full, rows = job.cfg.evaluate.full_steps, {}
    save_grid(job.draw(policy, 60, "show", n_steps=full), job.out / "samples.png", ncol=10)
    try: judge = job.judge()
    except ValueError as e: print(f"not measured: {e}")
    else:
        for k in sorted({min(4, full), min(10, full), full}):
            x0 = job.draw(policy, job.cfg.evaluate.n, "evaluate", n_steps=k)
            rows[f"{k} steps"] = evaluate(judge, x0, job.splits, with_auc=False)
        rows["real pictures"] = job.floor(judge, with_auc=False)
        print(table(rows))
    write_json(job.out / "metrics.json", job.about() | dict(
        steps=job.cfg.train_ddpm.num_steps, history=job.history, rows=rows))

def reward_parts(job, load=True)->tuple[RewardTraining, RealFake]:
    "The reward model, as it is in `path.rm` or untrained, and its pictures."
    cfg, train = job.cfg.train_reward, job.splits.train
    paid = RewardTraining(job.shape, train.levels, cfg, job.cfg.seed, job.device)
    if load and job.cfg.path.rm:
        about = load_weights(paid.model, job.cfg.path.rm)
        for k, theirs in about.get("config", {}).items():
            ours = paid.model.config.get(k)
            if k in ("alpha", "n_models") and theirs != ours:
                raise contradiction(job.cfg.path.rm, f"train_reward.{k}", theirs, ours)
        paid.epoch = cfg.num_epochs
    if job.cfg.path.fake_img:
        fakes = job.pictures(job.cfg, job.cfg.path.fake_img)
        order = torch.randperm(len(fakes), generator=seeded(job.cfg.seed, "choose fakes"))
        fakes = fakes.unit(order[:cfg.num_img]).to(job.device)
    else: fakes = job.draw(job.model, cfg.num_img, "fakes")
    real = train.unit(slice(0, cfg.num_img + cfg.num_noise)).to(job.device)
    return paid, RealFake(real, fakes, cfg, train.levels)

def fit_reward(job, paid, data):
    "Train the reward model, unless it is trained."
    left = paid.cfg.num_epochs - paid.epoch
    loop = whole_rounds(train_reward(paid, data), paid)
    job.follow(loop, left, "reward model", job.reward_history, "reward_model/")
    if job.reward_history:
        last = job.reward_history[-1]
        print(f"reward model: accuracy {last['accuracy']:.2f}, AUC {last['auc']:.2f} on held-out pictures")

def run_train_reward(job):
    "Train the reward model."
    paid, data = reward_parts(job, load=False)
    job.begin(dict(reward=paid, pictures=data))
    fit_reward(job, paid, data)
    if paid.cfg.save:
        facts = dict(data=job.splits.train.name, fingerprint=job.data, seed=str(job.cfg.seed))
        for path in filter(None, (job.out / "reward.safetensors", job.cfg.path.rm)):
            print(f"weights: {save_weights(paid.model, path, **facts)}")
    real, fake = paid.model.logit(data.held_real), paid.model.logit(data.held_fake)
    k = min(12, len(real), len(fake))
    wrong = torch.cat([data.held_real[real.argsort()[:k]], data.held_fake[fake.argsort(descending=True)[:k]]])
    save_grid(wrong, job.out / "most_wrong.png", ncol=k)
    write_json(job.out / "metrics.json", job.about() | job.reward_history[-1] | dict(history=job.reward_history))

def run_evaluate(job):
    "Measure a model at few and at many steps, beside real pictures."
    few, full = job.cfg.finetune.ddim_steps, job.cfg.evaluate.full_steps
    judge = job.judge()
    job.begin({})
    x = {k: job.draw(job.model, job.cfg.evaluate.n, "evaluate", n_steps=k) for k in (few, full)}
    rows = {f"{k} steps": evaluate(judge, x[k], job.splits) for k in x} | {"real pictures": job.floor(judge)}
    save_grid(torch.cat([x[k][:20] for k in (few, full)]), job.out / "samples.png", ncol=20)
    write_json(job.out / "metrics.json", job.about() | dict(
        steps=few, few_steps=rows[f"{few} steps"], full_steps=rows[f"{full} steps"], floor=rows["real pictures"]))
    for name, r in rows.items(): log_record(job.writer, dict(step=0) | r, f"evaluate/{name}/")
    print(table(rows))
