"""What one round of PPO costs on the same network, episodes, sampler steps and optimiser steps, three ways.

    python benchmarks/epoch_cost.py                        writes benchmarks/results/epoch_cost.md and .json
    python benchmarks/epoch_cost.py --device gpu --precision bf16 --compile
    python benchmarks/epoch_cost.py --sizes "8x8 grey" --rounds 9

Contestants, turn by turn in one process:
- original: the algorithm of the repository that this one began as, written anew from its description, on our UNet. One episode at a time
  is drawn with a frozen copy of the policy; then, episode by episode and step by step, the log-probabilities under the old and the new
  policy are both computed again. Three of its choices cost nothing and are replaced by ours, so that gradients can be compared: the
  mean of the step (its one-step mean is wrong for a strided sampler), the sum over pixels, and one clipped ratio per step, not per episode.
- one step at a time: what implementations of DDPO do, on diffusers' `UNet2DModel` and `DDIMScheduler`. Episodes are drawn as one batch
  and their log-probabilities kept; then, for each minibatch of episodes, each timestep in turn goes forward and backward, and gradients
  add up over timesteps. Once with whole minibatches, and once with four episodes at a time, as in the larger configuration that
  ddpo-pytorch ships (its default is one).
- ours: `rollout` and `ppo_update`, where (episode, step) pairs are one flat batch, without a reference network as the others; and
  `finetune`, the loop that users run, with a trivial reward and no control variate, but with its checks, average of the weights, copies
  for safety, and the reference's passes that measure the KL divergence. Where all run in fp32,
  ours runs in bf16 as well: a switch away, with ratios that still start at 1, but not the same arithmetic, so it has a goal of its own.

Before anything is timed all must draw the same pictures from the same noise and, after the same push to the weights, take the same
gradient step of the same loss on the same pairs, with ratios away from 1. The pictures that go through the network are counted.
"""
import copy, math
from dataclasses import replace
from functools import cached_property

from common import CLOCKS, NETS, TINY, agree, apart, begin, digits_schedule, goal, main_clock, options, our_unet, ratios, report, shown, spread, theirs, turns

import torch
from torch import nn

from ppo_ddpm.data import seeded
from ppo_ddpm.engine.checkpoints import whole_rounds
from ppo_ddpm.engine.fast import HALF, Engine, PieceStep, piece_size
from ppo_ddpm.engine.settings import Compute
from ppo_ddpm.finetune import Finetune, Finetuning, finetune
from ppo_ddpm.ppo import PPO, ppo_loss, ppo_update, whiten
from ppo_ddpm.sampling import DDIM, log_prob, rollout

CLIP, STEPS = .2, 4
# network, episodes, of these per optimiser step; on a GPU 256 and 64 where a CPU does fewer
WORK = {"8x8 grey": ("8x8 grey", 256, 64), "8x8 grey, small steps": ("8x8 grey", 256, 8), "32x32 RGB": ("32x32 RGB", 16, 8), "64x64 RGB": ("64x64 RGB", 8, 4)}


class Noise:
    "Where episodes start, and what their decisions draw: ours draws from the generator as it goes, the others take `z`."
    def __init__(self, n, shape, ddim, seed, device):
        self.generator, self.ddim = seeded(seed, "benchmark", device=device), ddim
        self.x_T = torch.randn(n, *shape, generator=self.generator, device=device)

    @cached_property
    def z(self):
        draw = lambda k: torch.randn(self.x_T.shape, generator=self.generator, device=self.x_T.device) if k < self.ddim.n_decisions else torch.zeros_like(self.x_T)
        return [draw(k) for k in range(self.ddim.n_steps)]


class Contestant:
    "Draws episodes, then learns from them, `minibatch` episodes per optimiser step."
    def __init__(self, net, ddim, minibatch, compute):
        self.net, self.ddim, self.minibatch, self.max_norm = net, ddim, minibatch, 1.
        self.opt, self.device, self.low = torch.optim.Adam(net.parameters(), lr=1e-6, fused=True), next(net.parameters()).device, HALF[compute.precision]

    def run(self, net, x, t):
        "The network in the precision that is asked for."
        with torch.autocast(x.device.type, self.low, enabled=self.low is not None): out = net(x, t)
        return getattr(out, "sample", out).float()

    def step(self):
        nn.utils.clip_grad_norm_(self.net.parameters(), self.max_norm)
        self.opt.step(); self.opt.zero_grad()

    def nets(self): return [self.net]

    def epoch(self, noise): self.learn(whiten(self.rollout(noise).flatten(1).mean(1)))


class Original(Contestant):
    def __init__(self, *args):
        super().__init__(*args)
        self.old = copy.deepcopy(self.net).requires_grad_(False)

    def nets(self): return [self.net, self.old]

    @torch.no_grad()
    def rollout(self, noise):
        self.old.load_state_dict(self.net.state_dict())
        self.episodes = []
        for i in range(len(noise.x_T)):
            states = [noise.x_T[i:i + 1]]
            for k in range(self.ddim.n_steps):
                eps = self.run(self.old, states[-1], self.ddim.t[k:k + 1])
                states.append(self.ddim.mean(k, states[-1], eps) + self.ddim.sigma[k] * noise.z[k][i:i + 1])
            self.episodes.append(states)
        return torch.cat([states[-1] for states in self.episodes])

    def learn(self, advantage):
        D, total = self.ddim.n_decisions, 0.
        for group in torch.randperm(len(self.episodes)).split(self.minibatch):
            for i in group.tolist():
                loss = 0.
                for k in range(D):
                    x, x_next, t = *self.episodes[i][k:k + 2], self.ddim.t[k:k + 1]
                    with torch.no_grad(): old = log_prob(self.ddim, k, x, x_next, self.run(self.old, x, t))
                    new = log_prob(self.ddim, k, x, x_next, self.run(self.net, x, t))
                    loss = loss + ppo_loss(new - old, advantage[i:i + 1], CLIP).sum()
                (loss / (len(group) * D)).backward()
                total += loss.detach() / (len(self.episodes) * D)
            self.step()
        return total


class StepByStep(Contestant):
    "Episodes stay batches; timesteps take turns."
    def __init__(self, net, scheduler, ddim, minibatch, compute, at_once=None):
        super().__init__(net, ddim, minibatch, compute)
        self.scheduler, self.at_once = scheduler, at_once or minibatch
        self.scheduler.set_timesteps(ddim.n_steps)

    def decide(self, eps, t, x, z=None, x_next=None):
        "The scheduler's step and the log-probability of what it led to."
        s = self.scheduler
        mean = s.step(eps, t, x, eta=1., variance_noise=torch.zeros_like(x)).prev_sample
        sd = s._get_variance(t, t - s.config.num_train_timesteps // s.num_inference_steps) ** .5
        if x_next is None: x_next = mean + sd * z
        return x_next, -((x_next - mean) ** 2 / (2 * sd ** 2) + torch.log(sd) + math.log(2 * math.pi) / 2).flatten(1).sum(1)

    @torch.no_grad()
    def rollout(self, noise):
        self.states, self.log_probs = [noise.x_T], []
        for t, z in zip(self.scheduler.timesteps.tolist(), noise.z):
            x_next, lp = self.decide(self.run(self.net, self.states[-1], t), t, self.states[-1], z)
            self.states.append(x_next); self.log_probs.append(lp)
        return x_next

    def learn(self, advantage):
        D, N, total, steps = self.ddim.n_decisions, len(advantage), 0., self.scheduler.timesteps.tolist()
        for group in torch.randperm(N, device=self.device).split(self.minibatch):
            for i in group.split(self.at_once):
                for k in range(D):
                    x, x_next = self.states[k][i], self.states[k + 1][i]
                    new = self.decide(self.run(self.net, x, steps[k]), steps[k], x, x_next=x_next)[1]
                    loss = ppo_loss(new - self.log_probs[k][i], advantage[i], CLIP).sum()
                    (loss / (len(group) * D)).backward()
                    total += loss.detach() / (N * D)
            self.step()
        return total


class Flat(Contestant):
    "Ours: all pairs are one batch."
    def __init__(self, net, ddim, minibatch, compute):
        super().__init__(net, ddim, minibatch, compute)
        self.policy, self.compute = Engine(net, compute), compute

    def rollout(self, noise):
        self.generator = noise.generator
        self.policy.size = pieces(self.ddim, len(noise.x_T), self.minibatch, self.compute)
        self.traj = rollout(self.policy, self.ddim, noise.x_T, noise.generator)
        return self.traj.x0

    def learn(self, advantage):
        cfg = PPO(clip_eps=CLIP, kl=0., minibatch=self.minibatch, grad_clip=self.max_norm)
        step = PieceStep(self.compute, self.device, self.policy.batch)
        nothing = lambda x, t: torch.zeros_like(x) # no reference, as the others
        return ppo_update(self.policy, nothing, self.opt, self.ddim, self.traj, advantage, self.generator, cfg, step=step)["loss"]


def pieces(ddim, episodes, minibatch, compute):
    "Pictures in a piece, as the command chooses them."
    D = ddim.n_decisions
    return piece_size(ddim.n_steps, episodes, episodes * D, min(minibatch, episodes) * D, compute.max_batch)


def whole_loop(net, ddim, shape, episodes, minibatch, compute):
    "Rounds of `finetune`, one per call."
    cfg = Finetune(lr=1e-6, lr_decay="none", num_epochs=10**6, episodes_per_epoch=episodes, minibatch=minibatch, clip_eps=CLIP, kl=0.,
                   control_variate=False, refresh_every=0)
    run, size = Finetuning(net, cfg), pieces(ddim, episodes, minibatch, compute)
    run.policy, run.reference = Engine(net, compute, size), Engine(run.reference, compute, size)
    step = PieceStep(compute, next(net.parameters()).device, run.policy.batch)
    loop = finetune(run, ddim, lambda x0: x0.flatten(1).mean(1), shape, step=step)
    loop = whole_rounds(loop, run, step, tolerance=.01 if compute.precision == "fp32" else .1)
    return lambda: next(loop)


def build(net, ddim, schedule, minibatch, compute, device):
    "{name: function that makes the contestant anew, on a network of its own}"
    pair = lambda: theirs(our_unet(net, device), schedule)
    plain = Compute(precision=compute.precision)
    return {"original": lambda: Original(our_unet(net, device), ddim, minibatch, plain),
            "one step at a time": lambda: StepByStep(*pair(), ddim, minibatch, plain),
            "one step at a time, 4 episodes at once": lambda: StepByStep(*pair(), ddim, minibatch, plain, at_once=4),
            "ours": lambda: Flat(our_unet(net, device), ddim, minibatch, compute)}


def counted(c, f):
    "(pictures forward, pictures backward) while f runs"
    n = [0, 0]
    def back(g, k): n[1] += k
    def note(net, args, out):
        y = getattr(out, "sample", out); n[0] += len(y)
        if y.requires_grad: y.register_hook(lambda g: back(g, len(y)))
    hooks = [net.register_forward_hook(note) for net in c.nets()]
    f()
    for h in hooks: h.remove()
    return tuple(n)


def check(makers, n, shape, ddim, device, tolerance=1e-4):
    "Same pictures, same loss, same gradient; returns the largest differences."
    pictures, losses, steps = {}, {}, {}
    advantage = whiten(torch.randn(n, generator=seeded("advantage")).to(device))
    for name, make in makers.items():
        c = make()
        c.minibatch, c.max_norm, c.opt = n, math.inf, torch.optim.SGD(c.net.parameters(), lr=1.)
        pictures[name] = c.rollout(Noise(n, shape, ddim, 0, device))
        params = dict(sorted(c.net.named_parameters()))
        with torch.no_grad():                                  # the policy moves, so that ratios are not 1; some are clipped
            for key, p in params.items(): p *= 1 + .02 / math.prod(shape) ** .5 * torch.randn(p.shape, generator=seeded(key)).to(device)
        before = [p.detach().clone() for p in params.values()]
        losses[name] = torch.stack([c.learn(advantage), torch.ones((), device=device)])     # beside advantages of size 1: alone it is about 0
        steps[name] = torch.cat([(a - b.detach()).flatten() for a, b in zip(before, params.values())])
    # a difference of two log-probabilities summed over all pixels keeps fewer digits than each
    far = agree("pictures", pictures, tolerance), agree("loss", losses, 100 * tolerance), agree("gradient", steps, 100 * tolerance)
    return dict(zip(("pictures", "loss", "gradient"), far))


def goals(size, device, over):
    "What was hoped for, and what came: `over` is the median of time / ours."
    cuda, out = torch.device(device).type == "cuda", []
    least = {"original": 50, "one step at a time": 1.5} if cuda else {"8x8 grey": {"original": 15, "one step at a time": 2}, "32x32 RGB": {"one step at a time": 1.3}}.get(size, {})
    for name, v in least.items(): out.append(goal(f"{size}: {name} takes at least {v} times as long as ours", f"{over[name]:.2f}", over[name] >= v))
    if "RGB" in size and not cuda and "ours, in bf16" in over:
        v = over["one step at a time"] / over["ours, in bf16"]
        out.append(goal(f"{size}: one step at a time, in fp32, takes at least 1.3 times as long as ours in bf16", f"{v:.2f}", v >= 1.3))
    return out


def main(argv=None):
    parser = options(__doc__, rounds=7)
    parser.add_argument("--sizes", nargs="+", choices=list(WORK), help="default: all")
    parser.add_argument("--precision", choices=list(HALF), default="fp32", help="for all contestants (default fp32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for ours")
    args = begin(parser, argv)
    cuda, compute = torch.device(args.device).type == "cuda", Compute(precision=args.precision, compile=args.compile)
    schedule, rows, data, said = digits_schedule(), [], [], []
    ddim = DDIM(schedule, STEPS).to(args.device)
    for size in ["8x8 grey"] if args.quick else args.sizes or WORK:
        name, n, m = WORK[size]
        net, n, m = (TINY, 8, 4) if args.quick else (NETS[name], 256, 64) if cuda and n < 256 else (NETS[name], n, m)
        shape, start = (net["in_channels"], net["size"], net["size"]), lambda seed: Noise(n, shape, ddim, seed, args.device)
        plain, makers = (build(net, ddim, schedule, m, c, args.device) for c in (Compute(), compute))
        far = check(plain, min(n, 8), shape, ddim, args.device)
        passes = {name: counted(c := make(), lambda: c.epoch(start(0))) for name, make in plain.items()}
        made = {name: make() for name, make in makers.items()}
        if compute != Compute(): agree("pictures in this precision", {name: c.rollout(start(0)) for name, c in made.items()}, 3e-2)
        print(f"{size}: contestants agree; largest relative differences {', '.join(f'{k} {v:.0e}' for k, v in far.items())}", flush=True)
        seeds = {name: iter(range(10**6)) for name in made}
        todo = {name: lambda c=c, seed=seeds[name]: c.epoch(start(next(seed))) for name, c in made.items()}
        if args.precision == "fp32" and not args.quick:
            todo["ours, in bf16"] = lambda c=build(net, ddim, schedule, m, replace(compute, precision="bf16"), args.device)["ours"](), seed=iter(range(10**6)): c.epoch(start(next(seed)))
        todo["ours, the whole loop"] = whole_loop(our_unet(net, args.device), ddim, shape, n, m, compute)
        times = turns(todo, args.rounds, args.device)
        which = main_clock(args.device)
        for name, v in times.items():
            fwd, bwd = passes.get(name, passes["ours"])
            if "loop" in name: fwd += bwd # the reference's
            over = ratios(v, times["ours"], which)
            rows.append([f"{size}, {name}", fwd, bwd, shown(spread([t[0] for t in v]), 1e3, 1), shown(spread([t[1] for t in v]), 1e3, 1), shown(over)])
            data.append(dict(size=size, contestant=name, episodes=n, minibatch=m, forward=fwd, backward=bwd, wall=[t[0] for t in v], cpu=[t[1] for t in v], over_ours=over, apart=far))
        said += goals(size, args.device, {d["contestant"]: d["over_ours"][0] for d in data if d["size"] == size}) if not args.quick else []
    report(args, "epoch_cost", "One round of PPO, three ways", f"""The same network, episodes, {STEPS} sampler steps and optimiser steps for all; pictures that go forward and backward
        through the network in one round; median (smallest to largest) over rounds in which the contestants take turns. The last column is a contestant's time over that of ours in the same
        round, in {CLOCKS[main_clock(args.device)]} time. Before timing all drew the same pictures and took the same gradient step. `benchmarks/epoch_cost.py --help` says what the contestants do.""",
        ["", "forward", "backward", "wall, ms", "processor, ms", "time / ours"], rows, said, clock=CLOCKS[main_clock(args.device)], results=data, steps=STEPS)


if __name__ == "__main__": main()
