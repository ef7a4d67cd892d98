"""Drawing pictures with DDIM beside diffusers, with the same weights, steps, batch and noise.

    python benchmarks/sampling.py                        writes benchmarks/results/sampling.md and .json
    python benchmarks/sampling.py --device gpu --precision bf16 --compile

Contestants, turn by turn in one process:
- pipeline: diffusers' `DDIMPipeline`, called as its documentation does, but for tensors ("pt") instead of PIL pictures and without a bar;
- scheduler loop: the same without the pipeline, `UNet2DModel` and `DDIMScheduler.step` in a loop;
- ours: `sample`.
All start from one seed and draw the same random numbers in the same order. Their pictures are compared first, and nothing is timed if
they differ.
"""
from common import CLOCKS, NETS, TINY, agree, begin, digits_schedule, goal, main_clock, options, our_unet, ratios, report, shown, spread, theirs, turns

import torch

from ppo_ddpm.data import seeded
from ppo_ddpm.engine.fast import HALF, Engine
from ppo_ddpm.engine.settings import Compute
from ppo_ddpm.sampling import DDIM, sample

LEAST = {"8x8 grey": 1.2}             # hoped for; 1 everywhere else


def contestants(unet, schedule, batch, steps, eta, compute, device):
    "{name: function of a seed that gives pictures in [0, 1], as the pipeline does}"
    from diffusers import DDIMPipeline
    net, scheduler = theirs(unet, schedule)
    pipe = DDIMPipeline(net, scheduler).to(device)
    pipe.set_progress_bar_config(disable=True)
    low = lambda: torch.autocast(torch.device(device).type, HALF[compute.precision], enabled=compute.precision != "fp32")
    shape, ddim = (batch, *[unet.config[k] for k in ("in_channels", "size", "size")]), DDIM(schedule, steps, eta).to(device)
    engine, unit = Engine(unet, compute, batch), lambda x: (x / 2 + .5).clamp(0, 1)
    source = lambda seed: seeded(seed, "benchmark", device=device)

    def pipeline(seed):
        with low(): return pipe(batch_size=batch, generator=source(seed), eta=eta, num_inference_steps=steps, output_type="pt").images

    def loop(seed):
        g = source(seed)
        x = torch.randn(shape, generator=g, device=device)
        scheduler.set_timesteps(steps)
        with torch.no_grad():
            for t in scheduler.timesteps:
                with low(): eps = net(x, t).sample
                x = scheduler.step(eps, t, x, eta=eta, generator=g).prev_sample
        return unit(x)

    def ours(seed):
        g = source(seed)
        return unit(sample(engine, ddim, torch.randn(shape, generator=g, device=device), g))

    return {"pipeline": pipeline, "scheduler loop": loop, "ours": ours}


def main(argv=None):
    parser = options(__doc__, rounds=11)
    parser.add_argument("--sizes", nargs="+", choices=list(NETS), help="default: all")
    parser.add_argument("--steps", type=int, default=10, help="steps of the sampler (default 10)")
    parser.add_argument("--eta", type=float, default=1., help="noise of the sampler (default 1)")
    parser.add_argument("--precision", choices=list(HALF), default="fp32", help="for all contestants (default fp32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for ours")
    args = begin(parser, argv)
    if args.quick: args.steps = 4
    cuda, compute, schedule = torch.device(args.device).type == "cuda", Compute(precision=args.precision, compile=args.compile), digits_schedule()
    batches = {"8x8 grey": (1, 16, 64, 256), "32x32 RGB": (1, 8, *[256] * cuda), "64x64 RGB": (1, 4, *[256] * cuda)}
    rows, data, said, which = [], [], [], main_clock(args.device)
    for size in ["8x8 grey"] if args.quick else args.sizes or NETS:
        for batch in (3,) if args.quick else batches[size]:
            todo = contestants(our_unet(TINY if args.quick else NETS[size], args.device), schedule, batch, args.steps, args.eta, compute, args.device)
            far = agree("pictures", {name: draw(0) for name, draw in todo.items()}, 1e-4 if args.precision == "fp32" else 3e-2)
            print(f"{size}, {batch} at once: contestants agree; largest relative difference {far:.0e}", flush=True)
            seeds = {name: iter(range(10**6)) for name in todo}
            times = turns({name: lambda draw=draw, seed=seeds[name]: draw(next(seed)) for name, draw in todo.items()}, args.rounds, args.device, warm=2)
            for name, v in times.items():
                over = ratios(v, times["ours"], which)
                rows.append([f"{size}, {batch} at once, {name}", shown(spread([t[0] for t in v]), 1e3, 1), shown(spread([t[1] for t in v]), 1e3, 1), f"{batch / spread([t[which] for t in v])[0]:.1f}", shown(over)])
                data.append(dict(size=size, batch=batch, contestant=name, wall=[t[0] for t in v], cpu=[t[1] for t in v], over_ours=over, apart=far))
                if name == "pipeline" and not args.quick:
                    said.append(goal(f"{size}, {batch} at once: the pipeline takes at least {LEAST.get(size, 1)} times as long as ours", f"{over[0]:.2f}", over[0] >= LEAST.get(size, 1)))
    report(args, "sampling", "Drawing pictures beside diffusers", f"""The same weights, batch and noise, {args.steps} steps of DDIM with eta {args.eta:g}; median (smallest to largest) over
        rounds in which the contestants take turns. Pictures per second and the last column, a contestant's time over that of ours in the same round, are in {CLOCKS[which]} time. Before timing all drew
        the same pictures. `benchmarks/sampling.py --help` says what the contestants do.""",
        ["", "wall, ms", "processor, ms", "pictures / s", "time / ours"], rows, said, clock=CLOCKS[which], results=data, steps=args.steps, eta=args.eta)


if __name__ == "__main__": main()
