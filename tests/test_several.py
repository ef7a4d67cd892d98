"""Several processes: `accelerate launch` gives the learning curve of one process, one process writes, and checkpoints move between counts.

Started by the launcher, this file is the program that each process runs; all of them meet over gloo, on the CPU."""
import functools, json, os, re, shutil, socket, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ppo_ddpm.judge as judging
from ppo_ddpm.engine import checkpoints, commands, jobs, tuning

root = Path(__file__).resolve().parents[1]
SMOKE = ["finetune", "--cfg", "smoke", "--finetune.lr", "1e-3", "--finetune.lr_decay", "none", "--finetune.ema", "0", "--finetune.episodes_per_epoch", "15",
         "--evaluate.n", "40", "--train_reward.num_epochs", "1", "--evaluate.every", "2"]


def quick(patch):
    "The judge is not what is tested here."
    patch(jobs, "train_judge", functools.partial(judging.train_judge, n_steps=20))
    patch(jobs, "Saver", functools.partial(checkpoints.Saver, pause=0))


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return str(s.getsockname()[1])


def launch(n, *args, limit=300):
    "This file in `n` processes, or in one that starts them itself (0); the finished launcher with what all have said."
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(n), "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", free_port()]
    return subprocess.run([sys.executable, *(launcher if n else []), __file__, *map(str, args)], env=env, capture_output=True, text=True, timeout=limit)


def done(n, *args):
    p = launch(n, *args)
    assert p.returncode == 0, p.stdout + p.stderr
    return p


def alone(*argv):
    with pytest.MonkeyPatch.context() as m:
        quick(m.setattr)
        assert commands.main([str(a) for a in argv]) == 0


def off(a, b):
    "Largest difference between two lists of records, in what is learned from."
    assert [r["epoch"] for r in a] == [r["epoch"] for r in b]
    return max(abs(x[k] - y[k]) for x, y in zip(a, b) for k in ("reward", "reward_std", "loss", "kl"))


def history(out): return json.loads((out / "metrics.json").read_text())["history"]


def weights_off(a, b):
    a, b = (load_file(p / "policy.safetensors") for p in (a, b))
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Four rounds by one process; two rounds by two and by one; and those gone on with by one and by two."
    tmp = tmp_path_factory.mktemp("several")
    out = {name: tmp / name for name in ("whole", "two", "one", "two_one", "one_two")}
    alone(*SMOKE, "--finetune.num_epochs", 4, "--out", out["whole"])
    alone(*SMOKE, "--finetune.num_epochs", 2, "--out", out["one"])
    said = done(2, *SMOKE, "--finetune.num_epochs", 2, "--out", out["two"])
    for a, b in ("two", "two_one"), ("one", "one_two"): shutil.copytree(out[a], out[b])
    alone("finetune", "--resume", "--finetune.num_epochs", 4, "--out", out["two_one"])
    done(2, "finetune", "--resume", "--finetune.num_epochs", 4, "--out", out["one_two"])
    return out, said


def test_two_processes_learn_what_one_learns(runs):
    out, _ = runs
    assert off(history(out["two"]), history(out["one"])) < 1e-4
    assert weights_off(out["two"], out["one"]) < 1e-4


@pytest.mark.parametrize("name", ["two_one", "one_two"])
def test_a_checkpoint_moves_to_another_number_of_processes(runs, name):
    out, _ = runs
    assert off(history(out[name]), history(out["whole"])) < 1e-4
    assert weights_off(out[name], out["whole"]) < 1e-4
    assert weights_off(out["one"], out["whole"]) > 1e-3          # there was something to learn


def test_one_process_writes_and_speaks(runs):
    out, said = runs
    names = lambda folder: sorted(p.name.split(".tfevents")[0] for p in folder.iterdir())
    assert names(out["two"]) == names(out["one"])                # one event file among them
    assert json.loads((out["two"] / "metrics.json").read_text())["processes"] == 2
    assert said.stdout.count("weights: ") == said.stdout.count("data: ") == 1, said.stdout


@pytest.mark.parametrize("who, sentence", [("1", "only process 1 fails"), ("none", "is not empty")])
def test_a_fault_ends_all_with_one_sentence(tmp_path, who, sentence):
    (tmp_path / "run").mkdir(); (tmp_path / "run/x").touch()
    p = launch(2, "fault", who, *SMOKE, "--out", tmp_path / ("run" if who == "none" else "new"), limit=120)
    said = re.findall("ppo-ddpm: .*", p.stderr)                 # behind the bar of another process, maybe
    assert p.returncode != 0 and len(said) == 1 and sentence in said[0], p.stderr


def test_a_command_for_one_process_says_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert commands.main(["evaluate", "--cfg", "smoke"]) == 2
        assert ("evaluate runs in one process, and 2 were launched" in capsys.readouterr().err) == (rank == "0")


def test_accelerate_is_imported_only_where_it_is_needed():
    code = "import sys, ppo_ddpm.engine.tuning; sys.exit('accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def main(what, *args):
    "What each process does."
    quick(setattr)
    if what != "fault": return commands.main([what, *args])
    who, args = args[0], args[1:]
    def broken(*_): raise ValueError(f"only process {who} fails")
    if os.environ["RANK"] == who: tuning.refresh_reward = broken
    return commands.main(args)


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
