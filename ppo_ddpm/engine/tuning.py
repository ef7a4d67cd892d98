"""Fine-tuning and the demo as commands."""
import base64
import copy
import math
import shlex
import time
from importlib import resources

import jinja2
import torch

from ppo_ddpm.engine.board import Board, save_grid
from ppo_ddpm.engine.checkpoints import atomic_write, whole_rounds
from ppo_ddpm.engine.fast import Engine, PieceStep, add_lora, merge_lora, piece_size
from ppo_ddpm.engine.jobs import COLUMNS, Job, fit_reward, reward_parts, table, write_json
from ppo_ddpm.engine.processes import Shared, SharedStep, agree, same_reward
from ppo_ddpm.engine.weights import save_weights
from ppo_ddpm.evaluate import evaluate
from ppo_ddpm.finetune import Finetuning, finetune, watcher
from ppo_ddpm.kinds import reward_of
from ppo_ddpm.reward import refresh_reward

class Tuning:
    "Fine-tuning as the settings want it: fast, in pieces, with corrections, in several processes."
    def __init__(self, job:Job, accelerator=None):
        cfg, compute = job.cfg.finetune, job.cfg.compute
        self.job, self.accelerator = job, accelerator
        reference = copy.deepcopy(job.model).requires_grad_(compute.compile) # compiled as the policy is
        if cfg.lora_rank: add_lora(job.model, cfg.lora_rank)
        self.run = run = Finetuning(job.model, cfg, reference)
        size = self.pieces()
        self.average = Engine(run.ema.model, compute, size)
        run.policy, run.reference = Engine(run.policy, compute, size), Engine(reference, compute, size)
        how = dict(compute=compute, device=job.device, batch=run.policy.batch)
        self.step = PieceStep(**how)
        if accelerator:
            run.policy, self.step = Shared(run.policy, accelerator), SharedStep(accelerator, **how)

    def pieces(self):
        "One size for all that must run one program."
        cfg, n = self.job.cfg.finetune, self.accelerator.num_processes if self.accelerator else 1
        D = cfg.decisions or self.job.ddim.n_decisions
        pairs, minibatch = cfg.episodes_per_epoch * D, min(cfg.minibatch, cfg.episodes_per_epoch) * D
        each = [math.ceil(v / n) for v in (cfg.episodes_per_epoch, pairs, minibatch)]
        return piece_size(self.job.ddim.n_steps, *each, self.job.cfg.compute.max_batch)

    def rounds(self, paid, data):
        "The loop; a round that fails never happened."
        job, acc, cfg = self.job, self.accelerator, self.job.cfg.finetune
        reward = reward_of(paid, data)
        parts = (self.run, self.step, paid, data)
        if acc:
            agree(acc, *parts)
            reward = same_reward(reward, acc)
        def refresh(x0):
            refresh_reward(paid, data, x0, cfg.refresh_steps)
            if acc: agree(acc, paid)
        loop = finetune(self.run, job.ddim, reward, job.shape, refresh, job.cfg.seed, self.step)
        return whole_rounds(loop, *parts, tolerance=cfg.ratio_tolerance)

def follow_only(job, accelerator):
    "What every process but the first does: its share of the work; it writes nothing."
    tuning = Tuning(job, accelerator)
    for _ in tuning.rounds(*reward_parts(job)): pass

def run_finetune(job, accelerator=None, full=False): # full: also measure what the slow sampler reaches
    "Fine-tune with PPO."
    cfg, n = job.cfg.finetune, job.cfg.evaluate.n
    judge = job.judge()
    paid, data = reward_parts(job)
    tuning = Tuning(job, accelerator)
    run = tuning.run
    watch = watcher(judge, job.splits, job.ddim, n)
    board = Board(cfg.num_epochs, show=False)
    job.begin(dict(run=run, step=tuning.step, reward=paid, pictures=data, board=board))
    reference = Engine(tuning.run.reference.model, job.cfg.compute, tuning.average.size)
    save_grid(job.draw(reference, 60, "show"), job.out / "before.png", ncol=10)
    fit_reward(job, paid, data)
    before = watch(reference)
    board.marks = {f"before, {cfg.ddim_steps} steps": before["fd"]}
    if full:
        k = job.cfg.evaluate.full_steps
        job.full = job.draw(reference, n, "evaluate", n_steps=k)
        board.marks[f"before, {k} steps"] = evaluate(judge, job.full, job.splits, "judge", with_auc=False)["fd"]
    board.marks["real pictures"] = job.floor(judge, "judge", with_auc=False)["fd"]
    if not run.epoch: board.update(dict(epoch=0) | before)
    last, began, first = time.perf_counter(), time.perf_counter(), run.epoch
    def look(rec):
        nonlocal last
        now, seconds = time.perf_counter(), time.perf_counter() - last
        last, left = now, (now - began) / (run.epoch - first) * (cfg.num_epochs - run.epoch)
        rec |= {"seconds": seconds, "images/s": cfg.episodes_per_epoch / seconds, "left_s": left}
        if run.epoch % job.cfg.evaluate.every == 0 or run.epoch == cfg.num_epochs: rec |= watch(tuning.average)
        board.update(rec)
        return rec
    job.follow(tuning.rounds(paid, data), cfg.num_epochs - run.epoch, "fine-tuning", job.history, look=look)
    board.save(job.out / "curves.png")
    board.save_gif(job.out / "samples.gif")
    save_grid(job.draw(tuning.average, 60, "show"), job.out / "after.png", ncol=10)
    if cfg.save:
        facts = dict(data=job.splits.train.name, fingerprint=job.data, seed=str(job.cfg.seed),
                     epochs=str(run.epoch), steps=str(cfg.ddim_steps))
        path = save_weights(merge_lora(run.ema.model), job.out / "policy.safetensors", job.schedule, **facts)
        print(f"weights: {path}")
    metrics = job.about() | dict(
        processes=accelerator.num_processes if accelerator else 1, steps=cfg.ddim_steps, marks=board.marks,
        history=job.history, reward_history=job.reward_history)
    write_json(job.out / "metrics.json", metrics)
    return dict(before=reference, after=tuning.average), judge, metrics

def run_demo(job):
    "The whole path: draw, train the reward model, fine-tune, measure, report."
    policies, judge, metrics = run_finetune(job, full=True)
    n, k = job.cfg.evaluate.n, job.cfg.evaluate.full_steps
    pictures = {name: job.draw(p, n, "evaluate") for name, p in policies.items()} | dict(full_steps=job.full)
    rows = {name: evaluate(judge, x0, job.splits) for name, x0 in pictures.items()}
    metrics |= rows | dict(floor=job.floor(judge), full_n_steps=k, seconds=time.time() - job.start)
    write_json(job.out / "metrics.json", metrics)
    few = job.cfg.finetune.ddim_steps
    names = dict(before=f"before, {few} steps", after=f"after, {few} steps",
                 full_steps=f"before, {k} steps", floor="real pictures (floor)")
    with atomic_write(job.out / "report.html") as tmp:
        tmp.write_text(report(job.out, metrics, names), encoding="utf-8")
    print(table({name: metrics[key] for key, name in names.items()}))
    print(f"{metrics['seconds']:.0f} s; all of it on one page: {job.out / 'report.html'}")

def report(
    out,          # Folder of the run
    metrics:dict, # What metrics.json holds
    names:dict,   # {row: what a reader calls it}
)->str:           # HTML that needs no other file
    "One page about a run of the demo."
    def picture(name):
        data = base64.b64encode((out / name).read_bytes()).decode()
        return f"data:image/{name.rpartition('.')[2]};base64,{data}"
    text = resources.files("ppo_ddpm").joinpath("templates", "report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
    columns = {k: v for k, v in COLUMNS.items() if k in metrics["after"] and k != "kd"}
    config = out / "config.yaml"
    return template.render(m=metrics, rows=names, columns=columns, picture=picture,
                           quoted_config=shlex.quote(str(config)), config=config.read_text(encoding="utf-8"))
