"""The main result over several seeds: digits in 4 steps, before and after fine-tuning, on the test split.

    python benchmarks/digits_seeds.py                     seeds 0 to 4, and the control that is paid at random for seeds 0 and 1
    python benchmarks/digits_seeds.py --seeds 5 6 7       more seeds
    python benchmarks/digits_seeds.py --no-control        without the control
    python benchmarks/digits_seeds.py --quick             the smoke configuration, two seeds: does the script run? (writes to --out, default runs/quick)
    python benchmarks/digits_seeds.py --report            only the tables, from the numbers that are stored

Each seed is what `ppo-ddpm finetune --seed N` does: the noise, the reward model and PPO follow the seed; split and judge are always the
same. The rows go into benchmarks/results/digits_seeds.json as they come, and a seed that is there with the same settings is not run
again, so the script may be stopped and started again. It ends with a table and the goals, in benchmarks/results/digits_seeds.md.
"""
import argparse, copy, hashlib, json, statistics, tempfile, time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

from common import folder, machine, markdown, said

import torch

import ppo_ddpm
from ppo_ddpm.engine.commands import parse
from ppo_ddpm.engine.jobs import Job, bar, write_json
from ppo_ddpm.engine.tuning import run_finetune
from ppo_ddpm.evaluate import evaluate, floor
from ppo_ddpm.finetune import Finetuning, finetune, random_reward, watcher


def settings(args, seed, out):
    "The job of one seed, as the command line makes it; the held-out distance is looked at every fifth round."
    return parse(["finetune", "--cfg", "smoke" if args.quick else args.cfg, "--seed", str(seed), "--device", args.device, "--out", str(out), "--evaluate.every", "5"])


def start(args, seed, out):
    "The job of one seed, with the folder that it writes into."
    todo = settings(args, seed, out)
    todo.out.mkdir(parents=True)
    return Job(todo.command, todo.cfg, todo.out, {})


def measured(job, judge, policies):
    "{name: numbers on the test split} of {name: function that draws pictures}"
    return {name: evaluate(judge, draw(), job.splits) for name, draw in policies.items()}


def fingerprint(cfg):
    "Names all settings but the seed, and the model that it starts from."
    d = asdict(cfg) | dict(seed=None, device=None)
    weights = Path(cfg.path.ddpm) if cfg.path.ddpm else Path(ppo_ddpm.__file__).parent / "weights/digits.safetensors"
    return hashlib.sha256(json.dumps(d, sort_keys=True).encode() + weights.read_bytes()).hexdigest()[:12]


LOOKS = 4


def look_again(job, judge, averages):
    "{epoch: distance to the judge split}, the mean over LOOKS samples of n pictures: one sample is as noisy as the drift that it should show."
    looks = [watcher(judge, job.splits, job.ddim, job.cfg.evaluate.n, seed=1000 + i) for i in range(LOOKS)]
    return {epoch: statistics.mean(look(model)["fd"] for look in looks) for epoch, model in bar(averages.items(), "looking again")}


def main_run(job):
    "Reward model and PPO of one seed, measured on the test split with the seed's noise."
    averages, looked = {}, []
    def keeping(*args, **kwargs):
        watch = watcher(*args, **kwargs)
        def look(engine):
            if job.history or looked: averages[len(job.history) + 1] = copy.deepcopy(engine.model)
            looked.append(True) # the first look is at the model before fine-tuning
            return watch(engine)
        return look
    with mock.patch("ppo_ddpm.engine.tuning.watcher", keeping): policies, judge, metrics = run_finetune(job)
    seconds, n, full = time.time() - job.start, job.cfg.evaluate.n, job.cfg.evaluate.full_steps
    draws = {name: lambda policy=policy: job.draw(policy, n, "evaluate") for name, policy in policies.items()}
    rows = measured(job, judge, draws | dict(full_steps=lambda: job.draw(policies["before"], n, "evaluate", n_steps=full)))
    watched = {r["epoch"]: r["fd"] for r in job.history if "fd" in r}
    best, again = min(watched, key=watched.get), look_again(job, judge, averages)
    assert again.keys() == watched.keys()
    return rows | dict(floor=floor(judge, job.splits, min(n, len(job.splits.train)), seed=job.cfg.seed), seconds=seconds, best_epoch=best, best_fd=watched[best], last_epoch=max(watched),
                       last_fd=watched[max(watched)], again=list(again.items()), marks=metrics["marks"], history=job.history)


def control_run(job):
    "The same, paid at random: same noise, same rounds, nothing to learn."
    judge, run, n, seed = job.judge(), Finetuning(job.model, job.cfg.finetune), job.cfg.evaluate.n, job.cfg.seed
    loop = finetune(run, job.ddim, random_reward(seed), job.shape, seed=seed)
    for rec in (rounds := bar(loop, "paid at random", job.cfg.finetune.num_epochs)): rounds.set_postfix(KL=f"{rec['kl']:.2f}")
    seconds = time.time() - job.start
    draws = dict(before=lambda: job.draw(run.reference, n, "evaluate"), after=lambda: job.draw(run.ema.model, n, "evaluate"))
    return measured(job, judge, draws) | dict(seconds=seconds)


def spread(v, digits=3):
    "Mean and standard deviation over seeds."
    return f"{statistics.mean(v):.{digits}f} ± {statistics.stdev(v):.{digits}f}" if len(v) > 1 else f"{v[0]:.{digits}f}"


COLUMNS = {"before": lambda r: r["before"]["fd"], "after": lambda r: r["after"]["fd"], "after / before": lambda r: r["after"]["fd"] / r["before"]["fd"],
           "last / best round": lambda r: r["again"][-1][1] / min(fd for _, fd in r["again"]), "with one look": lambda r: r["last_fd"] / r["best_fd"], "recall before": lambda r: r["before"]["recall"], "recall after": lambda r: r["after"]["recall"],
           "AUC before": lambda r: r["before"]["discriminator_auc"], "AUC after": lambda r: r["after"]["discriminator_auc"], "seconds": lambda r: r["seconds"]}
CONTROL = ["before", "after", "after / before", "recall before", "recall after", "AUC before", "AUC after", "seconds"]


def seeds_table(rows, names):
    "One line per seed, and the mean."
    cells = {c: [COLUMNS[c](r) for r in rows] for c in names}
    digits = {"seconds": 0}
    lines = [[r["seed"], *[f"{cells[c][i]:.{digits.get(c, 3)}f}" for c in names]] for i, r in enumerate(rows)]
    return markdown(["seed", *names], [*lines, ["**mean ± sd**", *[spread(cells[c], digits.get(c, 3)) for c in names]]])


def kinds_table(rows, steps, full):
    "What the seeds agree on, row by row."
    kinds = {f"before, {steps} steps": "before", f"after, {steps} steps": "after", f"before, {full} steps": "full_steps", "real pictures (floor)": "floor"}
    keys = {"distance": "fd", "kernel": "kd", "precision": "precision", "recall": "recall", "AUC": "discriminator_auc", "classes": "class_tv"}
    return markdown(["test split", *keys], [[name, *[spread([r[kind][k] for r in rows]) for k in keys.values()]] for name, kind in kinds.items()])


def verdicts(rows, control):
    "(goal, measured, reached) for each goal of the project."
    mean = lambda f, rs=rows: statistics.mean(map(f, rs))
    ratios, drifts = [[COLUMNS[c](r) for r in rows] for c in ("after / before", "last / best round")]
    after, full = mean(COLUMNS["after"]), mean(lambda r: r["full_steps"]["fd"])
    auc, recall = mean(COLUMNS["AUC before"]) - mean(COLUMNS["AUC after"]), mean(COLUMNS["recall before"]) - mean(COLUMNS["recall after"])
    out = [("after / before, worst seed: at most 0.35", max(ratios), max(ratios) <= .35), ("after / before, mean: at most 0.27", statistics.mean(ratios), statistics.mean(ratios) <= .27),
           ("after / 50 steps, of the means: at most 1.25", after / full, after / full <= 1.25), ("fall of the fresh discriminator's AUC, mean: at least 0.1", auc, auc >= .1),
           ("fall of recall, mean: at most 0.05", recall, recall <= .05), ("last / best round on the judge split, mean: at most 1.25", statistics.mean(drifts), statistics.mean(drifts) <= 1.25),
           ("last / best round on the judge split, worst seed: at most 1.25", max(drifts), max(drifts) <= 1.25)]
    if control:
        # smallest after / before that noise alone gives: two standard deviations of "before" over the seeds' noise
        c, least = mean(COLUMNS["after / before"], control), 1 - 2 * statistics.stdev([r["before"]["fd"] for r in rows]) / mean(COLUMNS["before"]) if len(rows) > 1 else 1
        out.append((f"paid at random, after / before, mean: at least {least:.2f} (1 less two sd of the noise's)", c, c >= least))
    return [[goal, f"{v:.3f}", "yes" if ok else "**no**"] for goal, v, ok in out]


def report(stored, key, steps, full):
    "The page, from what is stored."
    rows, control = [sorted((r for r in stored if r["settings"] == key and r["kind"] == kind), key=lambda r: r["seed"]) for kind in ("main", "control")]
    if not rows: return "no results yet"
    made = sorted({said({k: v for k, v in r["machine"].items()}) for r in rows + control})
    parts = ["# Digits in few steps, over seeds", f"Made by `python benchmarks/digits_seeds.py`: {'; '.join(made)}. Settings {key}, {rows[0]['after']['n']} pictures drawn for each number.",
             "Mean ± standard deviation over seeds. Distance is the Frechet distance to the test split in 32 features of a judge that neither policy nor reward has seen.",
             kinds_table(rows, steps, full), "## Seed by seed", "Distances on the test split; last / best round on the judge split, at every fifth round, each the mean of four samples (with one look: of one, as a run itself sees it).",
             seeds_table(rows, list(COLUMNS))]
    if control: parts += ["## Paid at random", seeds_table(control, CONTROL)]
    return "\n\n".join([*parts, "## Goals", markdown(["goal", "measured", "reached"], verdicts(rows, control))])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2 3 4")
    parser.add_argument("--control", type=int, nargs="*", metavar="SEED", help="seeds of the control that is paid at random (default 0 1)")
    parser.add_argument("--no-control", action="store_true")
    parser.add_argument("--cfg", default="digits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch (default: as torch decides)")
    parser.add_argument("--quick", action="store_true", help="the smoke configuration, seeds 0 and 1")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables")
    parser.add_argument("--out", type=Path, help="folder of results (default benchmarks/results)")
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    out = args.out or (Path("runs/quick") if args.quick else folder / "results")
    seeds = args.seeds or list(range(2 if args.quick else 5))
    control = [] if args.no_control else [0, 1] if args.control is None else args.control
    todo = [] if args.report else [("main", s) for s in seeds] + [("control", s) for s in control]

    path = out / "digits_seeds.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    cfg = settings(args, 0, "runs/none").cfg
    key, steps, full = fingerprint(cfg), cfg.finetune.ddim_steps, cfg.evaluate.full_steps
    done = {(r["kind"], r["seed"]) for r in stored if r["settings"] == key}
    for i, (kind, seed) in enumerate(todo):
        if (kind, seed) in done: print(f"{kind}, seed {seed}: stored already"); continue
        print(f"--- {kind}, seed {seed}: {i + 1} of {len(todo)}", flush=True)
        with tempfile.TemporaryDirectory() as tmp:   # the run's own folder is not kept
            made = (main_run if kind == "main" else control_run)(start(args, seed, Path(tmp) / "run"))
        stored.append(dict(kind=kind, seed=seed, settings=key, machine=machine(args.device), **made))
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, stored)
    text = report(stored, key, steps, full)
    print(text)
    if any(r["settings"] == key for r in stored): (out / "digits_seeds.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__": main()
