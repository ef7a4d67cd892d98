"""The command `ppo-ddpm`: every setting is an option, every error is one sentence."""
import argparse
import difflib
import os
import shlex
import sys
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

from ppo_ddpm import __version__

COMMANDS = {
    "demo": "The whole path: draw, train the reward model, fine-tune, measure, report.",
    "train-ddpm": "Train a diffusion model from scratch.",
    "train-reward": "Train the reward model that tells real pictures from generated ones.",
    "finetune": "Fine-tune a diffusion model with PPO.",
    "evaluate": "Measure a model at few and at many steps, beside real pictures."}

USAGE = """usage: ppo-ddpm COMMAND [--cfg NAME_OR_PATH] [--out FOLDER] [--resume | --overwrite] [--any.setting value ...]

Reinforcement-learning fine-tuning of diffusion models.

{}

ppo-ddpm COMMAND --help explains every option. Start with: ppo-ddpm demo"""

class Parser(argparse.ArgumentParser):
    def error(self, message): raise ValueError(f"{message}; see {self.prog} --help")

MAY_CHANGE = {"device", "data.root", "data.download", "train_ddpm.num_steps", "finetune.num_epochs",
              "compute.compile", "compute.max_batch", "compute.checkpointing"}

def parse(
    argv:list, # The command first
):             # -> Namespace: command, cfg (Config), out, resume, overwrite, debug
    "What to do; ValueError or FileNotFoundError in one sentence."
    from ppo_ddpm.engine.options import add_options, load_config, read_options
    command, args = argv[0], argv[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {command}; {hint}")
    parser = Parser(prog=f"ppo-ddpm {command}", description=COMMANDS[command],
                    allow_abbrev=False, add_help=False)
    parser.add_argument("--cfg", help="cifar10, default, digits, faces, fashion, smoke, or a YAML file [digits]")
    parser.add_argument("--out", default=f"runs/{command}", help="folder of the run [%(default)s]")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    first = parser.parse_known_args(args)[0]
    out = Path(first.out).expanduser()
    stored = out / "config.yaml"
    if first.resume and not stored.is_file():
        raise FileNotFoundError(f"there is nothing to resume in {out}; leave out --resume")
    source = first.cfg or (stored if first.resume else "digits")
    parser.add_argument("-h", "--help", action="help", help="show this")
    add_options(parser, load_config(source))
    options, settings = read_options(parser, args)
    cfg = load_config(source, settings)
    if first.resume: check_same(load_config(stored), cfg, stored)
    if command in ("finetune", "demo") and cfg.finetune.ddim_steps == 1:
        print("note: a single step has no noise and so no decision to learn; using 2 steps", flush=True)
        cfg = replace(cfg, finetune=replace(cfg.finetune, ddim_steps=2))
    options.command, options.cfg, options.out = command, cfg, out
    return options

def check_same(old, new, path):
    "ValueError if a resumed run would go on with other settings."
    from ppo_ddpm.engine.settings import flat
    a, b = flat(asdict(old)), flat(asdict(new))
    for k in a:
        if a[k] != b[k] and k not in MAY_CHANGE:
            raise ValueError(f"a resumed run keeps its settings, but {k} is {a[k]} in {path} and "
                             f"{b[k]} here; leave it out, or start a new run in another folder")

def check_target(options):
    "FileExistsError if weights would be written over a file."
    cfg = options.cfg
    path = {"train-ddpm": cfg.path.ddpm, "train-reward": cfg.path.rm}.get(options.command)
    if path and Path(path).expanduser().exists() and not (options.resume or options.overwrite):
        raise FileExistsError(f"{path} exists, and {options.command} would replace it; "
                              "give another path, or --overwrite")

def run(options, accelerator=None):
    "Open the folder, load what is there, and do it."
    from ppo_ddpm.engine import jobs, tuning
    from ppo_ddpm.engine.checkpoints import load_checkpoint, run_folder
    do = {"demo": tuning.run_demo, "train-ddpm": jobs.run_train_ddpm, "train-reward": jobs.run_train_reward,
          "finetune": tuning.run_finetune, "evaluate": jobs.run_evaluate}
    command, out = options.command, options.out
    main = accelerator is None or accelerator.is_main_process
    check_target(options)
    folder = run_folder(out, options.resume, options.overwrite) if main else nullcontext()
    with folder:
        state = load_checkpoint(out / "checkpoint.pt", command) if options.resume and main else {}
        device = accelerator.device if accelerator else None
        with accelerator.local_main_process_first() if accelerator else nullcontext(): # one download for all
            job = jobs.Job(command, options.cfg, out, state, command == "train-ddpm", device, main)
        if not accelerator: do[command](job)
        elif main: tuning.run_finetune(job, accelerator)
        else: tuning.follow_only(job, accelerator)

def rank():
    "Which of several processes this is; None if it is alone."
    return int(os.environ.get("RANK") or 0) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else None

def join(options):
    "accelerate's `Accelerator`, where a launcher has started several processes."
    if rank() is None: return None
    if options.command != "finetune":
        raise ValueError(f"{options.command} runs in one process, and {os.environ['WORLD_SIZE']} were launched")
    import torch
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    cpu = options.cfg.device == "cpu"
    if gpus and not cpu and here > gpus:
        raise RuntimeError(f"{here} processes were launched on a machine with {gpus} GPUs; "
                           "launch one for each, or give --device cpu")
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import broadcast_object_list
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12)) # the others wait while process 0 measures
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[patience])
    [options.cfg] = broadcast_object_list([options.cfg])
    return accelerator

@contextmanager
def one_voice():
    "Notes in one line, and only from the first process; any name can be printed."
    show = lambda message, *_, **__: print("note:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"): stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.showwarning = show
        if rank(): os.environ["TQDM_DISABLE"] = "1"
        with redirect_stdout(nowhere) if rank() else nullcontext(): yield

def main(
    argv=None, # None: the words of the command line
)->int:        # 0 done, 2 refused or failed, 130 interrupted
    "The command `ppo-ddpm`."
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format("\n".join(f"  {name:13} {said}" for name, said in COMMANDS.items())))
        return 0
    if argv[0] == "--version":
        print(f"ppo-ddpm {__version__}")
        return 0
    options = None
    try:
        with one_voice():
            options = parse(argv)
            run(options, accelerator := join(options))
            if accelerator: accelerator.end_training()
    except KeyboardInterrupt:
        if options and (options.out / "checkpoint.pt").is_file() and not rank():
            again = f"ppo-ddpm {options.command} --resume --out {shlex.quote(str(options.out))}"
            print(f"\nppo-ddpm: stopped; go on with {again}", file=sys.stderr)
        return 130
    except BrokenPipeError: # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        if "--debug" in argv: raise
        said = " ".join(str(e).split()) or type(e).__name__
        if not rank(): print(f"ppo-ddpm: {said}", file=sys.stderr, flush=True)
        return 2
    return 0
