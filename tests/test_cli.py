"""The commands on the smallest settings: what they write, that a stopped run goes on exactly, and that equal settings give equal runs.

The judge and the discriminators are trained for a few steps only; the notebooks have the real ones."""
import functools, json, re, subprocess, sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import ppo_ddpm
import ppo_ddpm.evaluate as evaluation
import ppo_ddpm.judge as judging
from ppo_ddpm.data import seeded
from ppo_ddpm.engine import checkpoints, commands, jobs
from ppo_ddpm.engine.options import load_config
from ppo_ddpm.engine.settings import describe, set_seed

SMOKE = ["--cfg", "smoke", "--finetune.num_epochs", "3", "--evaluate.every", "2", "--evaluate.full_steps", "6", "--train_reward.num_epochs", "4"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(jobs, "train_judge", functools.partial(judging.train_judge, n_steps=20))
        m.setattr(evaluation, "discriminator_auc", functools.partial(evaluation.discriminator_auc, n_steps=10))
        m.setattr(jobs, "Saver", functools.partial(checkpoints.Saver, pause=0))
        yield


def run(*argv): assert commands.main([str(a) for a in argv]) == 0
def metrics(out): return json.loads((out / "metrics.json").read_text())
def history(out): return [{k: v for k, v in r.items() if k not in ("seconds", "images/s", "left_s")} for r in metrics(out)["history"]]


def same(a, b):
    "Are the tensors of two files equal, bit for bit?"
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def events(out):
    "Tags and scalars of the event files of a folder."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    acc = EventAccumulator(str(out)); acc.Reload()
    return acc.Tags(), {tag: [(e.step, e.value) for e in acc.Scalars(tag)] for tag in acc.Tags()["scalars"]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    run("demo", *SMOKE, "--out", out)
    return out


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("finetune") / "whole"
    run("finetune", *SMOKE, "--out", out)
    return out


def test_demo_writes_everything(demo):
    names = {p.name.split(".tfevents")[0] for p in demo.iterdir()}
    assert names == {".lock", "config.yaml", "metrics.json", "before.png", "after.png", "curves.png", "samples.gif", "events.out", "policy.safetensors", "checkpoint.pt", "report.html"}
    m = metrics(demo)
    for row in "before", "after", "full_steps", "floor":
        assert m[row]["fd"] >= 0 and 0 <= m[row]["recall"] <= 1 and 0 <= m[row]["precision"] <= 1 and 0 <= m[row]["discriminator_auc"] <= 1
        assert m[row]["n"] == m["n"] == 64
    assert (m["seed"], m["steps"], len(m["history"])) == (0, 4, 3) and m["seconds"] > 0
    assert [r["epoch"] for r in m["history"] if "fd" in r] == [2, 3]
    assert load_config(demo / "config.yaml").finetune.num_epochs == 3
    for name in "before", "after", "curves": assert min(Image.open(demo / f"{name}.png").size) > 100
    assert (demo / "before.png").read_bytes() != (demo / "after.png").read_bytes()


def test_report_stands_alone(demo):
    page = (demo / "report.html").read_text()
    assert page.count('src="data:image/') == page.count("<img") == page.count("alt=") == 4 and page.count("data:image/gif") == 1
    assert "http" not in page and "real pictures (floor)" in page and "num_epochs: 3" in page
    assert f"{metrics(demo)['after']['fd']:.3f}" in page


def test_events_are_read_back(demo):
    tags, scalars = events(demo)
    assert {"reward", "fd", "kl", "clip_frac", "ratio_error", "grad_norm", "lr", "images/s"} <= set(scalars)
    assert [s for s, _ in scalars["reward"]] == [1, 2, 3] and [s for s, _ in scalars["fd"]] == [2, 3]
    assert scalars["reward"][2][1] == pytest.approx(metrics(demo)["history"][2]["reward"], rel=1e-4)
    assert "samples" in tags["images"] and any("config" in t for t in tags["tensors"])


def test_equal_settings_give_equal_runs(demo, finetuned, tmp_path):
    assert same(demo / "policy.safetensors", finetuned / "policy.safetensors")
    assert history(demo) == history(finetuned)
    run("finetune", *SMOKE, "--seed", 1, "--out", tmp_path / "other")
    assert not same(finetuned / "policy.safetensors", tmp_path / "other/policy.safetensors")


def test_set_seed_is_enough_to_repeat():
    def numbers():
        import random
        import numpy as np
        set_seed(3)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(.5))
        return random.random(), np.random.rand(), net(torch.ones(2, 4)).tolist()
    assert numbers() == numbers()


def stop_at(monkeypatch, key, value):
    "Ctrl-C when a record is to be logged."
    log = jobs.log_record
    def logged(writer, rec, prefix=""):
        if rec.get(key) == value and prefix == "": raise KeyboardInterrupt
        log(writer, rec, prefix)
    monkeypatch.setattr(jobs, "log_record", logged)


def test_finetune_stops_and_goes_on_exactly(finetuned, tmp_path, capsys):
    out = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as m:
        stop_at(m, "epoch", 3)
        assert commands.main(["finetune", *SMOKE, "--out", str(out)]) == 130
    assert f"go on with ppo-ddpm finetune --resume --out {out}" in capsys.readouterr().err
    assert not (out / "policy.safetensors").exists() and not list(out.glob(".*.tmp*"))
    assert torch.load(out / "checkpoint.pt", weights_only=True)["run"]["epoch"] == 2
    run("finetune", "--resume", "--out", out)                        # the settings are those of the folder
    assert same(out / "policy.safetensors", finetuned / "policy.safetensors")
    assert history(out) == history(finetuned)
    scalars = events(out)[1]
    assert [s for s, _ in scalars["reward"]] == [1, 2, 3] and [s for s, _ in scalars["reward_model/loss"]] == [1, 2, 3, 4]


SAVING = ["--compute.precision", "fp16", "--compute.max_batch", "16", "--compute.checkpointing", "true", "--finetune.lora_rank", "2", "--finetune.decisions", "2"]

def test_pictures_at_once_follow_free_memory(tmp_path, capsys):
    run("evaluate", "--cfg", "smoke", "--evaluate.full_steps", 4, "--compute.max_batch", "auto", "--out", tmp_path / "run")
    said = re.search(r"compute.max_batch: auto, so (\d+) pictures at once", capsys.readouterr().out)
    assert load_config(tmp_path / "run/config.yaml").compute.max_batch == int(said[1]) > 1


def test_a_run_that_saves_memory_stops_and_goes_on_exactly(finetuned, tmp_path):
    run("finetune", *SMOKE, *SAVING, "--out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as m:
        stop_at(m, "epoch", 3)
        assert commands.main(["finetune", *SMOKE, *SAVING, "--out", str(tmp_path / "stopped")]) == 130
    state = torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)
    assert state["step"]["scale"] > 0 and any("lora_A" in k for k in state["run"]["policy"])
    run("finetune", "--resume", "--out", tmp_path / "stopped")
    assert same(tmp_path / "whole/policy.safetensors", tmp_path / "stopped/policy.safetensors")
    assert history(tmp_path / "whole") == history(tmp_path / "stopped")
    assert all(r["ratio_error"] < 1e-4 for r in history(tmp_path / "whole"))
    plain, saved = load_file(finetuned / "policy.safetensors"), load_file(tmp_path / "whole/policy.safetensors")
    assert plain.keys() == saved.keys()                              # corrections are merged: any program reads it
    shipped = load_file(Path(ppo_ddpm.__file__).parent / "weights/digits.safetensors")
    assert not torch.equal(saved["conv_in.weight"], shipped["conv_in.weight"]) and torch.equal(saved["conv_in.bias"], shipped["conv_in.bias"])


def test_train_ddpm_stops_and_goes_on_exactly(tmp_path):
    args = ["--cfg", "smoke", "--evaluate.full_steps", "4", "--train_ddpm.num_steps", "15"]
    run("train-ddpm", *args, "--out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as m:
        stop_at(m, "step", 10)
        assert commands.main(["train-ddpm", *args, "--out", str(tmp_path / "stopped")]) == 130
    run("train-ddpm", "--resume", "--out", tmp_path / "stopped")
    assert same(tmp_path / "whole/ddpm.safetensors", tmp_path / "stopped/ddpm.safetensors")
    assert history(tmp_path / "whole") == history(tmp_path / "stopped")
    assert metrics(tmp_path / "whole")["rows"]["real pictures"]["fd"] > 0
    assert (tmp_path / "whole/samples.png").exists()


def test_reward_then_finetune_then_evaluate(tmp_path):
    run("train-reward", "--cfg", "smoke", "--out", tmp_path / "reward")
    assert {"accuracy", "auc"} <= metrics(tmp_path / "reward").keys()
    assert (tmp_path / "reward/most_wrong.png").exists()
    run("finetune", *SMOKE, "--finetune.num_epochs", 1, "--path.rm", tmp_path / "reward/reward.safetensors", "--finetune.save", "false", "--out", tmp_path / "ft")
    assert not (tmp_path / "ft/policy.safetensors").exists() and metrics(tmp_path / "ft")["reward_history"] == []
    run("train-reward", "--cfg", "smoke", "--overwrite", "--out", tmp_path / "reward")       # replaces the run, and no more
    run("evaluate", *SMOKE, "--out", tmp_path / "ev")
    m = metrics(tmp_path / "ev")
    assert all("fd" in m[k] and "discriminator_auc" in m[k] for k in ("few_steps", "full_steps", "floor"))


ORIGINAL = {
    "default": dict(seed=42, device="gpu", finetune=dict(lr="1e-6", num_epochs=10, ddim_steps=200, eta=.5, clip_eps=.2, episodes_per_epoch=10, grad_clip=1., microbatch=1, save=True),
                    train_reward=dict(num_img=3000, num_noise=500, batch_size=64, num_workers=2, lr="1e-4", label_smoothing=.05, num_epochs=10, save=True)),
    "smoke": dict(seed=42, device="cpu", finetune=dict(lr="1e-6", num_epochs=1, ddim_steps=1, eta=1., clip_eps=.2, episodes_per_epoch=2, grad_clip=1., microbatch=1, save=False),
                  train_reward=dict(num_img=16, num_noise=4, batch_size=4, num_workers=0, lr="1e-4", label_smoothing=.05, num_epochs=1, save=False)),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_settings_of_the_original(name, tmp_path, monkeypatch, capsys):
    "Its files with its keys, from folders of pictures to a fine-tuned model."
    monkeypatch.chdir(tmp_path)
    g = seeded(0, name)
    for folder, n in ("data/real", 210), ("data/fake", 20):
        Path(folder).mkdir(parents=True)
        for i, x in enumerate(torch.randint(256, (n, 9, 12, 3), generator=g, dtype=torch.uint8)): Image.fromarray(x.numpy()).save(f"{folder}/{i}.png")
    paths = dict(real_img="data/real", fake_img="data/fake", ddpm="ddpm.pth", rm="rm.pt")
    Path("x.yaml").write_text(yaml.safe_dump(ORIGINAL[name] | dict(path=paths)))
    small = ["--cfg", "x.yaml", "--device", "cpu", "--data.size", 8, "--model.channels", 8, 16, "--model.groups", 8, "--model.attn", 4, "--model.n_blocks", 1,
             "--train_ddpm.num_steps", 5, "--train_ddpm.batch_size", 8, "--evaluate.n", 40, "--evaluate.full_steps", 4,
             "--train_reward.num_epochs", 1, "--train_reward.n_models", 1, "--finetune.num_epochs", 1]
    steps = ["--finetune.ddim_steps", 5] if name == "default" else []
    run("train-ddpm", *small)
    run("train-reward", *small, *steps, "--train_reward.save", "true")
    assert Path("ddpm.pth").exists() and Path("rm.pt").exists()
    run("finetune", *small, *steps)
    said = capsys.readouterr().out
    assert "model: ddpm.pth" in said and "reward model: rm.pt" in said
    assert ("using 2 steps" in said) == (name == "smoke")
    assert Path("runs/finetune/policy.safetensors").exists() == (name == "default")


def test_the_model_in_use_is_said(capsys):
    for args, said in ([], "digits model of this package"), (["--model.channels", 16, 32], "UNTRAINED"):
        options = commands.parse([str(a) for a in ("evaluate", "--cfg", "smoke", *args)])
        jobs.load_model(options.cfg)
        assert said in capsys.readouterr().out


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as e: commands.main(["finetune", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    for key in describe(): assert f"--{key}" in said, key
    assert "The probability ratio is clipped to 1 +- this [0.2]" in said


def test_shell():
    "As a program: the usage, the version, and one sentence without a traceback."
    def shell(*argv): return subprocess.run([sys.executable, "-m", "ppo_ddpm", *argv], capture_output=True, text=True)
    asked = shell()
    assert asked.returncode == 0 and all(c in asked.stdout for c in commands.COMMANDS)
    wrong = shell("demo", "--finetune.lrr", "3")
    assert wrong.returncode == 2 and wrong.stderr == "ppo-ddpm: unknown setting 'finetune.lrr' in the command line; did you mean 'finetune.lr'?\n" and not wrong.stdout


def test_asking_costs_little():
    "Neither scikit-learn nor matplotlib nor TensorBoard is imported to print a help text."
    code = "import sys; from ppo_ddpm.engine.commands import main; main([]); main(['--version']); print([m for m in ('sklearn', 'matplotlib.pyplot', 'tensorboard', 'tensorflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
