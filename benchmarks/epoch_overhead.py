"""What one round of fine-tuning costs beyond the network passes it contains.

    python benchmarks/epoch_overhead.py                         writes benchmarks/results/epoch_overhead.md
    python benchmarks/epoch_overhead.py --threads 1 --rounds 20
    python benchmarks/epoch_overhead.py --cfg smoke --rounds 5 --no-write

Contestants, turn by turn in one process:
- round: one round of `ppo_ddpm.finetune` with everything on (reference KL, control variate, average of the weights), always the
  same round from the same weights; the refresh of the reward model is not part of it and is reported beside it;
- bare: the forward and backward passes of that very round, recorded from it and replayed on the same networks, and nothing else;
- distinct: the bare passes without those that repeat an earlier one (same network, same pictures). It is no goal, but says what a
  round would cost that remembered everything.
The reward is the one that the command pays: the classifiers, and the count of kinds where `train_reward.variety` is above 0.
"""
import argparse, copy, statistics, sys, tempfile, time
from pathlib import Path

from common import folder, machine, markdown, said

import torch

from ppo_ddpm.cli import draw, parse, prepare, reward_parts
from ppo_ddpm.finetune import Finetuning, finetune
from ppo_ddpm.reward import refresh_reward, reward_of

GOAL = 1.10


class Recorder:
    "Writes down every call of some networks: which one, its inputs, and the gradient that came back."
    def __init__(self, networks): self.networks, self.calls = networks, []

    def __enter__(self):
        self.hooks = [net.register_forward_hook(lambda net, args, out, name=name: self._note(name, args, out)) for name, net in self.networks.items()]
        return self

    def __exit__(self, *_):
        for h in self.hooks: h.remove()

    def _note(self, name, args, out):
        call = dict(name=name, args=[a.detach().clone() for a in args], grad=None)
        if out.requires_grad: out.register_hook(lambda g: call.update(grad=g.detach().clone()))
        self.calls.append(call)

    def pictures(self):
        "{network and direction: pictures}"
        counts = {}
        for c in self.calls:
            for key in [c["name"] + ", forward"] + [c["name"] + ", backward"] * (c["grad"] is not None):
                counts[key] = counts.get(key, 0) + len(c["args"][0])
        return counts


def replay(networks, calls):
    "The passes, and nothing else."
    for c in calls:
        net = networks[c["name"]]
        if c["grad"] is None:
            with torch.no_grad(): net(*c["args"])
        else:
            net(*c["args"]).backward(c["grad"])
            net.zero_grad()


def distinct(calls):
    "The calls without repetitions; passes with a gradient are all kept."
    kept = []
    for c in calls:
        same = lambda k: k["name"] == c["name"] and k["grad"] is None and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(k["args"], c["args"]))
        if c["grad"] is not None or not any(map(same, kept)): kept.append(c)
    return kept


def clock(f, device):
    "(wall seconds, processor seconds) of a call."
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    sync(); wall, cpu = time.perf_counter(), time.process_time()
    f()
    sync(); return time.perf_counter() - wall, time.process_time() - cpu


def expected(job):
    "The pictures that a round must process, by arithmetic."
    cfg, d = job.cfg.finetune, job.ddim.n_decisions
    pairs = d * cfg.episodes_per_epoch * cfg.passes
    counts = {"policy, forward": job.ddim.n_steps * cfg.episodes_per_epoch + pairs, "policy, backward": pairs}
    if cfg.kl: counts["reference, forward"] = pairs
    judged = cfg.episodes_per_epoch * (1 + (d if cfg.control_variate else 0))
    return counts | {f"reward {i}, forward": judged for i in range(job.cfg.train_reward.n_models)}


def row(name, times, bare=None):
    "A line of the table."
    wall, cpu = zip(*times)
    ms = lambda v: f"{1e3 * statistics.median(v):.1f} ({1e3 * min(v):.1f} to {1e3 * max(v):.1f})"
    ratios = [[a / b for a, b in zip(v, w)] for v, w in zip((wall, cpu), zip(*bare))] if bare else []
    return [name, ms(wall), ms(cpu), *([f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in ratios] or ["", ""])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default="digits")
    parser.add_argument("--rounds", type=int, default=15, help="times that each contestant runs, at least 5 (default 15)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: as torch decides)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-write", action="store_true", help="only print")
    args = parser.parse_args()
    if args.rounds < 5: parser.error("--rounds must be at least 5")
    if args.threads: torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as tmp:
        job = parse(["finetune", "--cfg", args.cfg, "--device", args.device, "--out", str(Path(tmp) / "none")])
        prepare(job)
    paid, data = reward_parts(job, load=False)   # untrained: its passes take as long
    run, shape, seed = Finetuning(job.model, job.cfg.finetune), job.shape, job.cfg.seed
    networks = {"policy": run.policy, "reference": run.reference} | {f"reward {i}": net for i, net in enumerate(paid.model.nets)}
    start, reward = copy.deepcopy(run.state_dict()), reward_of(paid, data)

    def one_round(): next(finetune(run, job.ddim, reward, shape, seed=seed))
    def rewind(): run.load_state_dict(copy.deepcopy(start))

    with Recorder(networks) as made: one_round()
    with Recorder(networks) as repeated: rewind(); replay(networks, made.calls)
    counts, right = made.pictures(), expected(job)
    if not counts == repeated.pictures() == right:
        sys.exit(f"the contestants do not process the same pictures: round {counts}, bare {repeated.pictures()}, expected {right}")
    print("both process, in pictures: " + ", ".join(f"{k} {v}" for k, v in counts.items()), flush=True)

    once, full, bare, least, refresh, x0 = distinct(made.calls), [], [], [], [], draw(job, run.policy, job.cfg.finetune.episodes_per_epoch, "refresh")
    for i in range(-2, args.rounds):             # two to warm up
        def time_round(): rewind(); full.append(clock(one_round, job.device))
        def time_bare(): rewind(); bare.append(clock(lambda: replay(networks, made.calls), job.device))
        def time_least(): rewind(); least.append(clock(lambda: replay(networks, once), job.device))
        for f in (time_round, time_bare, time_least)[::1 if i % 2 else -1]: f()
        refresh.append(clock(lambda: refresh_reward(paid, data, x0, job.cfg.finetune.refresh_steps), job.device))
    full, bare, least, refresh = full[2:], bare[2:], least[2:], refresh[2:]

    ratio = statistics.median(a[1] / b[1] for a, b in zip(full, bare))
    c = job.cfg.finetune
    text = "\n\n".join([
        "# One round of fine-tuning against the passes it contains",
        f"Made by `python benchmarks/epoch_overhead.py`: {said(machine(job.device))}.",
        f"Configuration {args.cfg}: {c.episodes_per_epoch} episodes of {c.ddim_steps} steps, {c.microbatch * job.ddim.n_decisions} (episode, step) pairs per optimiser step, "
        f"{run.policy.n_params:,} parameters, {job.cfg.train_reward.n_models} reward networks. Pictures in a round: " + ", ".join(f"{k} {v}" for k, v in counts.items()) + ".",
        f"Median (smallest to largest) of {args.rounds} turns; a ratio is that of two runs in the same turn. Processor time sums over threads.",
        markdown(["", "wall, ms", "processor, ms", "ratio, wall", "ratio, processor"],
                 [row("a round of `finetune`", full, bare), row("its bare passes", bare), row("its distinct passes", least), ["a round over its distinct passes", "", "", *row("", full, least)[3:]], row(f"refresh, every {c.refresh_every} rounds, not in the above", refresh)]),
        f"Goal: a ratio of at most {GOAL:.2f} in processor time, which does not depend on what else the machine does. Measured: {ratio:.3f}, {'reached' if ratio <= GOAL else 'NOT reached'}."])
    print(text)
    if not args.no_write: (folder / "results" / "epoch_overhead.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__": main()
