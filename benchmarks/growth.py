"""How the cost of a round grows: its time with episodes, steps, resolution and width, its memory with episodes.

    python benchmarks/growth.py                        writes benchmarks/results/growth.md and .json
    python benchmarks/growth.py --device gpu

Time: one round (`rollout` and `ppo_update`) on a small network, one thing varied at a time, all variants taking turns in one process.
The work of a round is counted: floating-point operations of all forward and backward passes, by torch's own counter. If the cost is
linear in the work, operations per second stay the same; small layers and batches do fewer, so that time may grow more slowly than work.
A large product of matrices in fp32 shows what the machine can do.

Memory: the most that a round needs beyond what was there before it, each time in a new process. On a CPU that is the growth of the
process (its largest resident set), on a GPU what torch has allocated there. With pieces of a fixed size (`compute.max_batch`) only the
episodes themselves grow.
"""
import multiprocessing, re, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common import CLOCKS, TINY, begin, digits_schedule, flops, goal, main_clock, matmul_rate, options, our_unet, report, shown, spread, turns

import torch

from epoch_cost import Flat, Noise
from ppo_ddpm.engine.settings import Compute
from ppo_ddpm.sampling import DDIM

BASE, PIECE = dict(size=8, in_channels=1, channels=(24, 48), attn=(), groups=8), 256
SERIES = {"episodes": [dict(episodes=n) for n in (64, 128, 256, 512, 1024)], "steps": [dict(steps=k) for k in (2, 4, 8, 16)],
          "resolution": [dict(size=s) for s in (8, 16, 32, 64)], "width": [dict(channels=(c, 2 * c)) for c in (16, 32, 64, 128)]}
MEMORY = {"pieces": (256, 1024, 4096), "all at once": (64, 256, 1024)}
LINEAR, FLAT = 1.25, 1.25             # time per operation: largest over that of the least work; memory: most over fewest episodes


def a_round(device, compute=Compute(), episodes=64, steps=4, minibatch=64, **net):
    "(function that plays and learns from a round, its operations)"
    unet, ddim = our_unet(BASE | net, device), DDIM(digits_schedule(), steps).to(device)
    c, shape = Flat(unet, ddim, minibatch, compute), tuple(unet.config[k] for k in ("in_channels", "size", "size"))
    work = episodes * (steps * flops(unet) + ddim.n_decisions * flops(unet, backward=True))
    seeds = iter(range(10**9))
    return lambda: c.epoch(Noise(episodes, shape, ddim, next(seeds), device)), work


def most_resident():
    "The largest resident set of this process so far, in bytes."
    try: return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])    # getrusage would count a parent's as well
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak(device, threads, episodes, mode, net):
    "Most bytes that a round of so many episodes needs beyond what was there before."
    torch.set_num_threads(threads)
    piece, cuda = None if mode == "all at once" else PIECE, torch.device(device).type == "cuda"
    made = [a_round(device, Compute(max_batch=piece), n, minibatch=n if piece is None else 64, **net)[0] for n in (2, episodes)]
    made[0]()                                                        # what is loaded or made at first use is not counted
    if cuda: torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else most_resident()
    made[1]()
    return (torch.cuda.max_memory_allocated(device) if cuda else most_resident()) - before


def in_new_process(f, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool: return pool.submit(f, *args).result()


def main(argv=None):
    args = begin(options(__doc__, rounds=5), argv)
    n = 128 if args.quick else 2048
    which, data, memory, said, rate = main_clock(args.device), [], [], [], matmul_rate(n, args.device)
    rows = [[f"product of {n} x {n} matrices", f"{2 * n**3 / 1e9:.2f}", "", "", f"{rate / 1e9:.1f}", "", ""]]
    small = {k: v for k, v in TINY.items() if k != "attn"}
    series = {"episodes": [dict(episodes=n, **small) for n in (4, 8)]} if args.quick else SERIES
    made = {(name, i): a_round(args.device, **what) for name, points in series.items() for i, what in enumerate(points)}
    times = turns({k: play for k, (play, _) in made.items()}, args.rounds, args.device)
    for name, points in series.items():
        rates = []
        for i, what in enumerate(points):
            v, work, x = times[name, i], made[name, i][1], what.get(name) or what.get("size") or what["channels"][0]
            rates.append(work / spread([t[which] for t in v])[0])
            rows.append([f"{name} {x}", f"{work / 1e9:.2f}", shown(spread([t[0] for t in v]), 1e3, 1), shown(spread([t[1] for t in v]), 1e3, 1), f"{rates[-1] / 1e9:.1f}", "", ""])
            data.append(dict(series=name, x=x, flop=work, wall=[t[0] for t in v], cpu=[t[1] for t in v]))
        if not args.quick: said.append(goal(f"{name}: an operation takes at most {LINEAR} times as long as with the least work", f"{rates[0] / min(rates):.2f}", rates[0] <= LINEAR * min(rates)))
    pixels, decisions = BASE["in_channels"] * BASE["size"]**2, 3
    for mode, ns in {"pieces": (4,)}.items() if args.quick else MEMORY.items():
        for n in ns:
            most = in_new_process(peak, args.device, torch.get_num_threads(), n, mode, small if args.quick else {})
            own = 4 * 3 * decisions * n * pixels
            rows.append([f"memory, {mode}, episodes {n}", "", "", "", "", f"{most / 2**20:.1f}", f"{own / 2**20:.1f}"])
            memory.append(dict(mode=mode, episodes=n, bytes=most, own=own))
        over = memory[-1]["bytes"] / memory[-len(ns)]["bytes"]
        if mode != "all at once" and not args.quick: said.append(goal(f"memory, {mode}: {ns[-1]} episodes need at most {FLAT} times as much as {ns[0]}", f"{over:.2f}", over <= FLAT))
    report(args, "growth", "How the cost of a round grows", f"""One round of 64 episodes of 4 steps (three decisions) of an 8x8 network with channels 24 and 48, one thing varied at a time; median (smallest to
        largest) over rounds in which all variants take turns. Operations are those of all forward and backward passes; their rate is in {CLOCKS[which]} time. Memory is the most that a round adds, in a
        new process, with at most {PIECE} pictures in the network at once, or all; what the episodes themselves (states, outputs and noise) take
        of it is computed. `benchmarks/growth.py --help` says more.""",
        ["", "GFLOP", "wall, ms", "processor, ms", "GFLOP / s", "peak, MiB", "of it episodes"], rows, said, clock=CLOCKS[which], results=data, memory=memory, piece=PIECE, matmul=rate)


if __name__ == "__main__": main()
