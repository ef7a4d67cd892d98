"""What the benchmarks share: their options, networks and schedulers, fair turns, the check that contestants agree, and pages of results
that say with which machine, versions and commit they were made.
"""
import argparse, datetime, importlib.metadata, json, os, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import torch

folder = Path(__file__).resolve().parent
sys.path.insert(0, str(folder.parent))   # this checkout, installed or not

from ppo_ddpm.engine.checkpoints import atomic_write
from ppo_ddpm.engine.hub import to_diffusers
from ppo_ddpm.engine.settings import pick_device
from ppo_ddpm.schedule import NoiseSchedule
from ppo_ddpm.unet import UNet

# networks like those of the configurations and of public checkpoints, small enough for a CPU
NETS = {"8x8 grey": dict(size=8, in_channels=1, channels=(24, 48), attn=(4,), groups=8),
        "32x32 RGB": dict(size=32, in_channels=3, channels=(64, 128, 128), attn=(16,), groups=32),
        "64x64 RGB": dict(size=64, in_channels=3, channels=(64, 128, 128, 128), attn=(16,), groups=32)}
TINY = dict(size=8, in_channels=1, channels=(8, 16), attn=(4,), groups=4)


# --- options ---------------------------------------------------------------------------------------------------------------
def options(doc, rounds=None, device="cpu"):
    "The options that all scripts have."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device, help=f"cpu, gpu, cuda:1, ... (default {device})")
    parser.add_argument("--threads", type=int, help="threads of torch (default: as torch decides)")
    parser.add_argument("--quick", action="store_true", help="a tiny version: does the script run? Its numbers mean nothing (writes to --out, default runs/quick)")
    parser.add_argument("--out", type=Path, help="folder of results (default benchmarks/results)")
    if rounds: parser.add_argument("--rounds", type=int, help=f"times that each contestant runs, at least 5 (default {rounds}; with --quick 2)")
    parser.set_defaults(default_rounds=rounds)
    return parser


def begin(parser, argv=None):
    "The arguments, checked and put into effect."
    args = parser.parse_args(argv)
    args.out = args.out or (Path("runs/quick") if args.quick else folder / "results")
    if args.default_rounds:
        if (args.rounds or 5) < 5 and not args.quick: parser.error(f"--rounds must be at least 5, got {args.rounds}")
        args.rounds = args.rounds or (2 if args.quick else args.default_rounds)
    if args.threads: torch.set_num_threads(args.threads)
    try: args.device = str(pick_device(args.device))
    except (ValueError, RuntimeError) as e: parser.error(str(e))
    return args


# --- contestants -----------------------------------------------------------------------------------------------------------
def our_unet(net, device="cpu"):
    "A network with random weights whose output is of the size of noise, as that of a trained one."
    torch.manual_seed(0)
    unet = UNet(**net).eval()
    with torch.no_grad():
        x = torch.randn(8, unet.config["in_channels"], unet.config["size"], unet.config["size"])
        for p in unet.conv_out.parameters(): p /= unet(x, 500).std()
    return unet.to(device)


def theirs(unet, schedule):
    "The same network, weights and schedule as diffusers' `UNet2DModel` and `DDIMScheduler`."
    from diffusers import DDIMScheduler, UNet2DModel
    with tempfile.TemporaryDirectory() as tmp:
        where = to_diffusers(unet, schedule, Path(tmp) / "pipe")
        net = UNet2DModel.from_pretrained(where / "unet", low_cpu_mem_usage=False)
        return net.eval().to(next(unet.parameters()).device), DDIMScheduler.from_pretrained(where / "scheduler")


def n_params(net): return sum(p.numel() for p in net.parameters())


def digits_schedule(): return NoiseSchedule("cosine", 1000)


def apart(a, b):
    "How far b is from a, relative to the size of a."
    return ((b - a).norm() / a.norm()).item()


def agree(what, values, tolerance):
    "Contestants must give what the first of {name: tensor} gives; returns the largest difference, or ends the program with a sentence."
    first, *others = values
    far = {name: apart(values[first], values[name]) for name in others}
    if bad := [f"{name} by {v:.1e}" for name, v in far.items() if not v <= tolerance]:
        sys.exit(f"the contestants do not compute the same {what}: {', '.join(bad)} from {first}, more than {tolerance:.0e}; nothing was timed")
    return max(far.values())


def flops(unet, backward=False):
    "Floating-point operations for one picture, multiplication and addition counted apart."
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    c, device = unet.config, next(unet.parameters()).device
    x, counter = torch.zeros(1, c["in_channels"], c["size"], c["size"], device=device), FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):       # attention as plain products, which can be counted
        y = unet(x, 0)
        if backward: y.sum().backward()
    unet.zero_grad()
    return counter.get_total_flops()


# --- time ------------------------------------------------------------------------------------------------------------------
def clock(f, device="cpu"):
    "(wall seconds, processor seconds) of a call."
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    sync(); wall, cpu = time.perf_counter(), time.process_time()
    f()
    sync(); return time.perf_counter() - wall, time.process_time() - cpu


def turns(contestants, rounds, device="cpu", warm=1, before=lambda: None):
    """{name: [(wall, processor seconds)]} of {name: function}: in each round every contestant once, to and fro. The first `warm` rounds, and
    what `before` does before each turn, do not count."""
    times = {name: [] for name in contestants}
    for i in range(rounds + warm):
        for name in list(contestants)[::1 if i % 2 else -1]:
            before()
            times[name].append(clock(contestants[name], device))
    return {name: v[warm:] for name, v in times.items()}


def matmul_rate(n, device, dtype=torch.float32, rounds=20):
    "Operations per second of a product of two n x n matrices: the best of some."
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = turns({"product": lambda: a @ b}, rounds, device, warm=3)["product"]
    return 2 * n**3 / min(t[main_clock(device)] for t in times)


def main_clock(device): return 1 if torch.device(device).type == "cpu" and torch.get_num_threads() == 1 else 0
CLOCKS = "wall", "processor"


def spread(values):
    "Median, smallest and largest."
    return [statistics.median(values), min(values), max(values)]


def ratios(a, b, which):
    "Of two contestants in the same rounds."
    return spread([x[which] / y[which] for x, y in zip(a, b)])


def shown(v, factor=1., digits=2): return f"{factor * v[0]:.{digits}f} ({factor * v[1]:.{digits}f} to {factor * v[2]:.{digits}f})"


# --- pages -----------------------------------------------------------------------------------------------------------------
def git(*args):
    "What git says, or nothing where there is no git."
    try: return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError): return ""


def commit():
    "The commit, with a plus if package or benchmarks differ from it."
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "--", "../ppo_ddpm", "*.py") else "")


def cpu():
    "The processor's name."
    try: return next(line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def machine(device="cpu"):
    "{name: what a result was made with}"
    where = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    others = {"diffusers": importlib.metadata.version("diffusers")} if "diffusers" in sys.modules else {}
    return dict(hardware=where, cores=cores, threads=torch.get_num_threads(), torch=torch.__version__, **others, python=platform.python_version(),
                commit=commit(), date=datetime.date.today().isoformat())


def said(facts): return ", ".join(f"{k} {v}" for k, v in facts.items())


def markdown(header, rows):
    "A table; the first column is text, the others are numbers."
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def goal(text, value, reached): return f"{text}. Measured: {value}, {'reached' if reached else 'NOT reached'}."


def report(args, name, title, intro, header, rows, goals=(), **data):
    """Print the table and keep it in NAME.json and NAME.md. A run takes the place of an earlier one with the same hardware, threads and
    options, and stands beside those of others."""
    run = dict(machine=machine(args.device), device=args.device, quick=args.quick, options={k: v for k, v in vars(args).items() if k in ("precision", "compile", "cfg")},
               header=header, rows=rows, goals=list(goals), **data)
    key = lambda r: (r["machine"]["hardware"], r["machine"]["threads"], r["quick"], r["options"])
    path = args.out / f"{name}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    stored = [r for r in stored if key(r) != key(run)] + [run]
    def section(r):
        made = f"Made by `python benchmarks/{name}.py{' --quick' * r['quick']}`: {said(r['machine'] | {k: v for k, v in r['options'].items() if v})}."
        return "\n\n".join([made, markdown(r["header"], r["rows"]), *(["\n".join(f"- {g}" for g in r["goals"])] if r["goals"] else [])])
    print(section(run), flush=True)
    with atomic_write(path) as tmp: tmp.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    with atomic_write(args.out / f"{name}.md") as tmp: tmp.write_text("\n\n".join([f"# {title}", " ".join(intro.split()), *map(section, stored)]) + "\n", encoding="utf-8")
    return run
