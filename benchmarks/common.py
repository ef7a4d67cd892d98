"What a result needs to be believed: the machine, the versions, the commit and the day."
import datetime, os, platform, subprocess, sys
from pathlib import Path

import torch

folder = Path(__file__).resolve().parent
sys.path.insert(0, str(folder.parent))   # this checkout, installed or not


def git(*args):
    "What git says, or nothing where there is no git."
    try: return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError): return ""


def commit():
    "The commit, with a plus if the package differs from it."
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "--", "../ppo_ddpm") else "")


def cpu():
    "The processor's name."
    try: return next(line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def machine(device="cpu"):
    "{name: what a result was made with}"
    where = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(hardware=where, cores=cores, threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version(),
                commit=commit(), date=datetime.date.today().isoformat())


def said(facts): return ", ".join(f"{k} {v}" for k, v in facts.items())


def markdown(header, rows):
    "A table; the first column is text, the others are numbers."
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
