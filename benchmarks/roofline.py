"""How much of a GPU's rate drawing and learning reach at 64x64, and where the time goes.

    python benchmarks/roofline.py                          writes benchmarks/results/roofline.md and .json; needs a CUDA device
    python benchmarks/roofline.py --device cpu --quick     a tiny version on the CPU: does the script run?

The yardstick is measured in the same run: the rate of one large product of bf16 matrices. The network is that of the configuration
`default` (64x64 RGB, channels 64 to 256). Variants, turn by turn in one process: fp32, bf16, bf16 with torch.compile, always in
channels_last, and bf16 without it. Drawing is one forward pass of a batch as `sample` makes it; learning is what `ppo_update` does for one
piece, forward, loss and backward. Operations are counted by torch's own counter, so that recomputation and padding do not count.
torch.profiler names the kernels that take the most time of the compiled variant.
"""
import sys

import torch

from common import CLOCKS, TINY, agree, begin, flops, goal, main_clock, matmul_rate, n_params, options, our_unet, report, shown, spread, turns

from ppo_ddpm.engine.fast import Engine
from ppo_ddpm.engine.options import load_config
from ppo_ddpm.engine.settings import Compute
from ppo_ddpm.ppo import ppo_loss
from ppo_ddpm.sampling import DDIM, log_ratio, mean_shift
from ppo_ddpm.schedule import NoiseSchedule

LEAST = .4


def default_net():
    c = load_config("default")
    return dict(size=c.data.size, in_channels=c.data.channels, channels=c.model.channels, n_blocks=c.model.n_blocks, attn=c.model.attn, groups=c.model.groups)


def variant(net, batch, compute, device, plain=False):
    "(draw, learn): functions that run one batch; `plain`: not in channels_last."
    unet, ddim = our_unet(net, device), DDIM(NoiseSchedule(), 50).to(device)
    if plain: unet = unet.to(memory_format=torch.contiguous_format)
    engine, c = Engine(unet, compute, batch), unet.config
    g = torch.Generator(device).manual_seed(0)
    x, eps, z = (torch.randn(batch, c["in_channels"], c["size"], c["size"], generator=g, device=device) for _ in range(3))
    k = torch.randint(ddim.n_decisions, (batch,), generator=g, device=device)

    def draw():
        with torch.no_grad(): return engine(x, ddim.t[k])

    def learn():
        log_r = log_ratio(mean_shift(ddim, k, engine(x, ddim.t[k]), eps, x), z)
        ppo_loss(log_r, z[:, 0, 0, 0]).mean().backward()
        unet.zero_grad()
    return draw, learn


def top_kernels(f, device, n=8):
    "[(name, share of the time)] of the kernels that take the most."
    from torch.profiler import ProfilerActivity, profile
    cuda = torch.device(device).type == "cuda"
    f()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as p:
        f()
        if cuda: torch.cuda.synchronize()
    took = lambda e: e.self_device_time_total if cuda else e.self_cpu_time_total
    events = [e for e in p.key_averages() if took(e) > 0 and (not cuda or str(e.device_type).endswith("CUDA"))]
    total = sum(map(took, events))
    return [(e.key, took(e) / total) for e in sorted(events, key=took, reverse=True)[:n]]


def main(argv=None):
    parser = options(__doc__, rounds=20, device="auto")
    parser.add_argument("--batch", type=int, default=128, help="pictures at once (default 128)")
    args = begin(parser, argv)
    cuda = torch.device(args.device).type == "cuda"
    if not cuda and not args.quick:
        print("roofline.py measures a GPU and found no CUDA device; run it where torch.cuda.is_available(), or try --device cpu --quick", file=sys.stderr)
        raise SystemExit(2)
    net, batch, size = (TINY, 4, 256) if args.quick else (default_net(), args.batch, 8192)
    rate, which = matmul_rate(size, args.device, torch.bfloat16, args.rounds), main_clock(args.device)
    variants = {"fp32": (Compute(), False), "bf16": (Compute(precision="bf16"), False), "bf16, not channels_last": (Compute(precision="bf16"), True)}
    if cuda: variants["bf16, compiled"] = Compute(precision="bf16", compile=True), False
    made = {name: variant(net, batch, c, args.device, plain) for name, (c, plain) in variants.items()}
    agree("noise", {name: draw() for name, (draw, _) in made.items()}, 5e-2)
    unet, rows, data, said = our_unet(net, args.device), [], [], []
    for what, i, work in ("drawing", 0, batch * flops(unet)), ("learning", 1, batch * flops(unet, backward=True)):
        times = turns({name: f[i] for name, f in made.items()}, args.rounds, args.device, warm=3)
        for name, v in times.items():
            got = work / spread([t[which] for t in v])[0]
            rows.append([f"{what}, {name}", f"{work / 1e9:.1f}", shown(spread([t[0] for t in v]), 1e3, 2), f"{got / 1e12:.3g}", f"{got / rate:.1%}"])
            data.append(dict(what=what, variant=name, flop=work, wall=[t[0] for t in v], cpu=[t[1] for t in v], share=got / rate))
        if cuda and not args.quick: said.append(goal(f"{what}, {name}: at least {LEAST:.0%} of the rate of matrix products", f"{got / rate:.1%}", got >= LEAST * rate))
        for kernel, share in (top := top_kernels(made[name][i], args.device)): rows.append([f"{what}, {name}: `{kernel[:70].replace('|', '/')}`", "", "", "", f"{share:.1%} of time"])
        data[-1]["kernels"] = top
    report(args, "roofline", "What a GPU's rate allows, and what is reached", f"""Batches of {batch} pictures of {net['size']}x{net['size']} through {n_params(unet):,} parameters; median (smallest to largest) over rounds in
        which the variants take turns. The share is that of the rate of a {size} x {size} matrix product in bf16 in the same run; below each last variant, the kernels that take most of its
        time. `benchmarks/roofline.py --help` says more.""", ["", "GFLOP", "wall, ms", "TFLOP / s", "share"], [[f"product of {size} x {size} matrices, bf16", f"{2 * size**3 / 1e9:.1f}", "", f"{rate / 1e12:.3g}", "100 %"], *rows],
        said, clock=CLOCKS[which], results=data, matmul=rate, batch=batch)


if __name__ == "__main__": main()
