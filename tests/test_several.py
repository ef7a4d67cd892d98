"""Several processes: `accelerate launch` gives the learning curve of one process, one process writes, and checkpoints move between counts.

Started by the launcher, this file is the program that each process runs; all of them meet over gloo, on the CPU."""
import functools, json, os, re, shutil, socket, subprocess, sys, tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ppo_ddpm.judge as judging
from ppo_ddpm.engine import checkpoints, commands, jobs, tuning
from ppo_ddpm.engine.fast import PieceStep
from ppo_ddpm.engine.processes import Shared, SharedStep, agree, same_reward
from ppo_ddpm.finetune import Finetune, Finetuning, finetune
from ppo_ddpm.sampling import DDIM
from ppo_ddpm.schedule import NoiseSchedule

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
    "This file in `n` processes; the finished launcher with what all have said."
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(n), "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", free_port(), __file__, *map(str, args)]
    with tempfile.TemporaryDirectory() as tmp:                  # the launcher leaves a folder there
        return subprocess.run(command, env=env | dict(TMPDIR=tmp), capture_output=True, text=True, timeout=limit)


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


class Points(torch.nn.Module):
    "A policy of points in the plane."
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2))
    def forward(self, x, t): return self.net(torch.cat([x, t[:, None] / 1000], 1))


def points(accelerator=None):
    "Fine-tune a policy of points, with a reward of the whole batch that is refreshed, and minibatches down to a single pair."
    torch.manual_seed(accelerator.process_index if accelerator else 0)          # process 0's weights must count
    run = Finetuning(Points(), Finetune(lr=1e-3, num_epochs=4, episodes_per_epoch=11, minibatch=2, decisions=1, kl=.3))
    step, goal = PieceStep(batch=3), torch.zeros(2)
    def refresh(x0): goal.copy_(.5 * goal - .1 * x0.mean(0))
    reward = lambda x0: -(x0 - x0.mean(0) - goal).norm(dim=1)
    if accelerator:
        agree(accelerator, run)
        run.reference.load_state_dict(run.policy.state_dict())
        reward, step = same_reward(reward, accelerator), SharedStep(accelerator, batch=3)
        run.policy = Shared(run.policy, accelerator)
    loop = finetune(run, DDIM(NoiseSchedule("cosine"), 4), reward, (2,), refresh, 5, step)
    curve = [{k: v for k, v in rec.items() if k != "rewards"} for rec in loop]
    return dict(curve=curve, goal=goal, weights=torch.cat([p.detach().flatten() for m in (run.policy, run.ema.model) for p in m.parameters()]))


def test_three_processes_agree_where_work_cannot_be_dealt_out_evenly(tmp_path):
    done(3, "points", tmp_path)
    one, (a, *others) = points(), [torch.load(tmp_path / f"{i}.pt") for i in range(3)]
    assert off(a["curve"], one["curve"]) < 1e-4
    assert (a["weights"] - one["weights"]).abs().max() < 1e-4
    for b in others: assert b["curve"] == a["curve"] and torch.equal(b["weights"], a["weights"]) and torch.equal(b["goal"], a["goal"])


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


def save_points(folder):
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    torch.save(points(accelerator), f"{folder}/{accelerator.process_index}.pt")
    accelerator.end_training()


def main(what, *args):
    "What each process does."
    quick(setattr)
    if what == "points": return save_points(*args)
    if what != "fault": return commands.main([what, *args])
    who, args = args[0], args[1:]
    def broken(*_): raise ValueError(f"only process {who} fails")
    if os.environ["RANK"] == who: tuning.refresh_reward = broken
    return commands.main(args)


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
