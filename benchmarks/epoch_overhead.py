"""What one round of fine-tuning costs beyond the network passes it contains.

    python benchmarks/epoch_overhead.py                         writes benchmarks/results/epoch_overhead.md and .json
    python benchmarks/epoch_overhead.py --threads 1 --rounds 20
    python benchmarks/epoch_overhead.py --quick                 the smoke configuration: does the script run?

Contestants, turn by turn in one process:
- round: one round of `ppo_ddpm.finetune` with everything on (reference KL, control variate, average of the weights), always the
  same round from the same weights; the refresh of the reward model is not part of it and is reported beside it;
- bare: the forward and backward passes of that very round, recorded from it and replayed on the same networks, and nothing else;
- distinct: the bare passes without those that repeat an earlier one (same network, same pictures). It is no goal, but says what a
  round would cost that remembered everything.
The reward is the one that the command pays: the classifiers, and the count of kinds where `train_reward.variety` is above 0.
"""
import copy, sys, tempfile
from pathlib import Path

from common import CLOCKS, begin, goal, main_clock, n_params, options, ratios, report, shown, spread, turns

import torch

from ppo_ddpm.engine.checkpoints import whole_rounds
from ppo_ddpm.engine.commands import parse
from ppo_ddpm.engine.jobs import Job
from ppo_ddpm.engine.runs import reward_parts
from ppo_ddpm.engine.tuning import Tuning
from ppo_ddpm.finetune import finetune
from ppo_ddpm.kinds import reward_of
from ppo_ddpm.reward import refresh_reward

GOALS = 1.10, 1.05


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


def expected(job):
    "The pictures that a round must process, by arithmetic."
    cfg, d = job.cfg.finetune, job.ddim.n_decisions
    pairs = d * cfg.episodes_per_epoch * cfg.passes
    counts = {"policy, forward": job.ddim.n_steps * cfg.episodes_per_epoch + pairs, "policy, backward": pairs, "reference, forward": pairs}
    judged = cfg.episodes_per_epoch * (1 + (d if cfg.control_variate else 0))
    return counts | {f"reward {i}, forward": judged for i in range(job.cfg.train_reward.n_models)}


def main(argv=None):
    parser = options(__doc__, rounds=15)
    parser.add_argument("--cfg", default="digits", help="configuration (default digits; with --quick smoke)")
    args = begin(parser, argv)
    if args.quick: args.cfg = "smoke"
    with tempfile.TemporaryDirectory() as tmp:
        todo = parse(["finetune", "--cfg", args.cfg, "--device", args.device, "--out", str(Path(tmp) / "none")])
        job = Job(todo.command, todo.cfg, todo.out, {})
    paid, data = reward_parts(job, load=False)   # untrained: its passes take as long
    tuning = Tuning(job)
    run, step, shape, seed = tuning.run, tuning.step, job.shape, job.cfg.seed
    networks = {"policy": run.policy.model, "reference": run.reference.model} | {f"reward {i}": net for i, net in enumerate(paid.model.nets)}
    start, reward = copy.deepcopy(run.state_dict()), reward_of(paid, data)

    def one_round(): next(whole_rounds(finetune(run, job.ddim, reward, shape, seed=seed, step=step), run, step, paid, data))
    def rewind(): run.load_state_dict(copy.deepcopy(start))

    with Recorder(networks) as made: one_round()
    with Recorder(networks) as repeated: rewind(); replay(networks, made.calls)
    counts, right = made.pictures(), expected(job)
    if not counts == repeated.pictures() == right:
        sys.exit(f"the contestants do not process the same pictures: round {counts}, bare {repeated.pictures()}, expected {right}")
    print("both process, in pictures: " + ", ".join(f"{k} {v}" for k, v in counts.items()), flush=True)

    once, x0, c = distinct(made.calls), job.draw(run.policy, job.cfg.finetune.episodes_per_epoch, "refresh"), job.cfg.finetune
    names = "a round of `finetune`", "its bare passes", "its distinct passes", f"refresh, every {c.refresh_every} rounds, not in the above"
    times = turns(dict(zip(names, (one_round, lambda: replay(networks, made.calls), lambda: replay(networks, once), lambda: refresh_reward(paid, data, x0, c.refresh_steps)))),
                  args.rounds, job.device, warm=2, before=rewind)
    full, bare, least, _ = times.values()
    rows = [[name, *[shown(spread([t[i] for t in v]), 1e3, 1) for i in (0, 1)], *([shown(ratios(full, v, i), digits=3) for i in (0, 1)] if v in (bare, least) else ["", ""])] for name, v in times.items()]
    ratio = ratios(full, bare, 1)
    said = [goal(f"a round takes at most {g:.2f} times the processor time of its bare passes", f"{ratio[0]:.3f}", ratio[0] <= g) for g in GOALS]
    report(args, "epoch_overhead", "One round of fine-tuning against the passes it contains", f"""Configuration {args.cfg}: {c.episodes_per_epoch} episodes of {c.ddim_steps} steps,
        {c.minibatch * job.ddim.n_decisions} (episode, step) pairs per optimiser step, {n_params(run.policy):,} parameters, {job.cfg.train_reward.n_models} reward networks. Pictures in a round:
        {', '.join(f'{k} {v}' for k, v in counts.items())}. Median (smallest to largest) over rounds in which the contestants take turns; a ratio is that of two runs in the same round. Processor time
        sums over threads and does not depend on what else the machine does.""",
        ["", "wall, ms", "processor, ms", "the round over it, wall", "the round over it, processor"], rows, [] if args.quick else said, clock=CLOCKS[main_clock(args.device)],
        results=[dict(what=name, wall=[t[0] for t in v], cpu=[t[1] for t in v]) for name, v in times.items()], over_bare=ratio, counts=counts)


if __name__ == "__main__": main()
