"""What the untouched digits model draws with better solvers, for nothing: the strongest free alternative to fine-tuning.

    python benchmarks/free_solvers.py             five seeds of the noise, on the test split
    python benchmarks/free_solvers.py --quick     one seed, few pictures: does the script run? (writes to --out)

Solvers but DDIM are diffusers' own, on the trailing grid and this project's noise schedule. The grid's bend of DDIM with noise is the
recipe's. Rows of fine-tuned samplers are in digits_seeds.md: same weights, judge, split and n.
"""
import statistics

import torch
from common import begin, options, report

from ppo_ddpm.data import digits, seeded, split
from ppo_ddpm.ddpm import pretrained
from ppo_ddpm.evaluate import evaluate, floor
from ppo_ddpm.judge import train_judge
from ppo_ddpm.sampling import DDIM, sample

COLUMNS = ("fd", "recall", "discriminator_auc")


def diffusers_solver(kind, **settings):
    "A function that draws with one of diffusers' schedulers."
    import diffusers
    def draw(model, schedule, n_steps, x, generator):
        before = torch.cat([schedule.abar64.new_ones(1), schedule.abar64[:-1]])
        betas = (1 - schedule.abar64 / before).numpy()
        solver = getattr(diffusers, kind)(trained_betas=betas, timestep_spacing="trailing", **settings)
        solver.set_timesteps(n_steps)
        x = x * solver.init_noise_sigma
        for t in solver.timesteps:
            eps = model(solver.scale_model_input(x, t), t.repeat(len(x)))
            extra = dict(generator=generator) if "sde" in str(settings) else {}
            x = solver.step(eps, t, x, **extra).prev_sample
        return x
    return draw


def ddim(**settings):
    return lambda model, schedule, n_steps, x, g: sample(model, DDIM(schedule, n_steps, **settings), x, g)


UNIPC = diffusers_solver("UniPCMultistepScheduler", solver_order=2)
SOLVERS = [
    ("DDIM, eta 1, bent grid (before fine-tuning)", 4, ddim(eta=1., power=1.25)),
    ("DDIM, eta 0", 4, ddim(eta=0.)),
    ("SDE-DPM-Solver++ (2M)", 4, diffusers_solver("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")),
    ("DPM-Solver++ (2M)", 4, diffusers_solver("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++")),
    ("UniPC (order 2)", 4, UNIPC),
    *(("UniPC (order 2)", k, UNIPC) for k in (5, 6, 8, 10)),
    ("DDIM, eta 1", 50, ddim(eta=1.))]


def main():
    args = begin(options(__doc__))
    n, seeds = (64, [0]) if args.quick else (800, range(5))
    splits, (model, schedule) = split(digits()), pretrained()
    judge = train_judge(splits.judge)
    rows, results = [], []
    for name, n_steps, draw in SOLVERS:
        found = []
        for seed in seeds:
            g = seeded(seed, "evaluate")
            with torch.no_grad(): x0 = draw(model, schedule, n_steps, torch.randn(n, 1, 8, 8, generator=g), g)
            found.append(evaluate(judge, x0, splits, seed=seed, with_auc=not args.quick))
        results.append(dict(solver=name, n_steps=n_steps, seeds=found))
        rows.append([name, n_steps, *(spread([r[c] for r in found if c in r]) for c in COLUMNS)])
    lowest = floor(judge, splits, n, with_auc=not args.quick)
    rows.append(["real pictures (floor)", "-", *(f"{lowest[c]:.2f}" if c in lowest else "-" for c in COLUMNS)])
    report(args, "free_solvers", "Solvers that cost nothing", __doc__.split("\n\n")[0],
           ["solver, nothing trained", "steps", "distance", "recall", "AUC of a fresh discriminator"], rows, results=results, floor=lowest)


def spread(values):
    if not values: return "-"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


if __name__ == "__main__": main()
