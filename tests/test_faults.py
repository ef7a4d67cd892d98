"""Faults that were found once, each as what a person does and what must come of it.

Those of pictures are in test_pictures.py, of public checkpoints in test_interop.py, of bad input in test_bad_input.py, of
devices in test_device.py, of compiled networks in test_compile.py."""
import functools
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ppo_ddpm
import ppo_ddpm.evaluate as evaluation
import ppo_ddpm.judge as judging
from ppo_ddpm.data import seeded
from ppo_ddpm.ddpm import pretrained
from ppo_ddpm.engine import commands, jobs
from ppo_ddpm.engine.checkpoints import clear_run, run_folder
from ppo_ddpm.engine.hub import open_pretrained, read_scheduler, to_diffusers
from ppo_ddpm.engine.jobs import load_model
from ppo_ddpm.engine.options import load_config
from ppo_ddpm.engine.settings import set_seed
from ppo_ddpm.engine.weights import build_unet, load_unet, save_weights
from ppo_ddpm.finetune import Finetune, Finetuning, finetune
from ppo_ddpm.ppo import whiten
from ppo_ddpm.sampling import DDIM, ddim_timesteps, sample
from ppo_ddpm.schedule import NoiseSchedule
from ppo_ddpm.unet import UNet

ink = lambda x0: x0.mean((1, 2, 3))


@pytest.fixture
def quick(monkeypatch, tmp_path):
    "An empty folder, a judge and discriminators that are trained for a moment, and no bars."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "train_judge", functools.partial(judging.train_judge, n_steps=20))
    monkeypatch.setattr(evaluation, "discriminator_auc", lambda *args: 0.5)
    monkeypatch.setattr(jobs, "bar", lambda items, *args, **kwargs: Bar(items))
    return tmp_path


class Bar:
    "A bar that nobody sees."
    def __init__(self, items): self.items = items
    def __iter__(self): return iter(self.items)
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def set_postfix(self, *args, **kwargs): pass


def shell(command, cwd, **env):
    env = os.environ | dict(PYTHONPATH=str(Path(ppo_ddpm.__file__).parents[1]), TQDM_DISABLE="1") | env
    command = command.replace("ppo-ddpm", f"{shlex.quote(sys.executable)} -m ppo_ddpm")
    return subprocess.run([shutil.which("bash"), "-c", command], cwd=cwd, capture_output=True, text=True, env=env)


# --- the sampler -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spacing, K, power", [
    ("leading", 4, 1.25), ("linspace", 4, 1.25), ("trailing", 20, 2.), ("trailing", 100, 1.25), ("trailing", 4, 3.)])
def test_a_bent_grid_stays_inside_the_schedule(spacing, K, power):
    "t = -1 would be the noisiest level, and the pictures NaN."
    t = ddim_timesteps(1000, K, spacing, power)
    assert 0 <= t.min() and t.max() < 1000 and len(t.unique()) == K
    model, schedule = pretrained()
    if K > 4: return
    x0 = sample(model, DDIM(schedule, K, 1., spacing, power), torch.randn(4, 1, 8, 8, generator=seeded(0)), seeded(1))
    assert x0.isfinite().all()


# --- what a file of weights says -----------------------------------------------------------------------------------------------
x, t = torch.randn(4, 1, 8, 8, generator=seeded(2)), torch.tensor([10, 300, 600, 999])


def other_network(**variant):
    torch.manual_seed(0)
    net = build_unet(UNet(channels=(24, 48)).config | variant)
    for p in net.parameters(): p.data += 0.05 * torch.randn(p.shape, generator=seeded(p.numel()))
    return net


@pytest.mark.parametrize("variant", [dict(head_dim=8), dict(groups=4)])
def test_a_network_that_the_settings_contradict_is_refused(variant, tmp_path):
    path = save_weights(other_network(**variant), tmp_path / "w.safetensors", NoiseSchedule("cosine", 1000))
    with pytest.raises(ValueError, match=f"was made with model.{[*variant][0]} = "):
        load_model(load_config("smoke", {"path.ddpm": str(path)}))


def test_a_schedule_that_the_settings_contradict_is_refused(tmp_path):
    path = save_weights(other_network(), tmp_path / "w.safetensors", NoiseSchedule("linear", 1000))
    with pytest.raises(ValueError, match="schedule.kind = linear"):
        load_model(load_config("smoke", {"path.ddpm": str(path)}))


def test_what_no_setting_says_comes_from_the_file(tmp_path, capsys):
    net = other_network(pad_all=True, flip_sin_to_cos=True, freq_shift=0, eps=1e-5)
    path = save_weights(net, tmp_path / "w.safetensors", NoiseSchedule("cosine", 1000))
    model, schedule, _ = load_model(load_config("smoke", {"path.ddpm": str(path)}))
    with torch.no_grad(): assert torch.equal(model(x, t), net(x, t))
    assert schedule.kind == "cosine"


def test_a_policy_of_a_public_checkpoint_says_its_noise(tmp_path, capsys):
    "Not that of the settings, which it has never met."
    net, linear = other_network(head_dim=8, freq_shift=0), NoiseSchedule("linear", 1000)
    folder = to_diffusers(net, linear, tmp_path / "checkpoint")
    model, schedule, cfg = load_model(load_config("smoke", {"path.ddpm": str(folder)}))
    path = save_weights(model, tmp_path / "policy.safetensors", schedule)
    again, its, _ = load_unet(path)
    with torch.no_grad(): assert torch.equal(again(x, t), net(x, t))
    assert its.kind == "linear" and cfg.model.head_dim == 8


def test_a_file_out_of_a_public_folder_is_refused(tmp_path):
    "Its network is described beside it."
    to_diffusers(other_network(freq_shift=0), NoiseSchedule(), tmp_path / "checkpoint")
    inside, alone = tmp_path / "checkpoint/unet/diffusion_pytorch_model.safetensors", tmp_path / "alone.safetensors"
    save_file(load_file(inside), alone)
    with pytest.raises(ValueError, match="does not say what network"):
        load_model(load_config("smoke", {"path.ddpm": str(alone)}))


def test_bookkeeping_of_an_average_is_ignored(tmp_path):
    "diffusers writes it beside the network's settings in unet_ema."
    folder = to_diffusers(other_network(), NoiseSchedule(), tmp_path / "checkpoint") / "unet"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(decay=.9999, power=.667, optimization_step=7, inv_gamma=1.)))
    with torch.no_grad(): assert torch.equal(open_pretrained(folder)[0](x, t), other_network()(x, t))


def test_what_an_old_scheduler_says_of_epsilon(tmp_path):
    def ask(predicts):
        settings = dict(_class_name="DDPMScheduler", predict_epsilon=predicts)
        (tmp_path / "scheduler_config.json").write_text(json.dumps(settings))
        return read_scheduler(tmp_path)
    assert ask(True)["beta_schedule"] == "linear"
    with pytest.raises(ValueError, match="predict_epsilon = False"): ask(False)


# --- folders of runs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [dict(resume=True), dict(overwrite=True)])
def test_a_folder_belongs_to_one_run(how, tmp_path):
    with run_folder(tmp_path / "run") as folder:
        (folder / "config.yaml").write_text("seed: 0")
        with pytest.raises(FileExistsError, match="another process runs in"):
            with run_folder(tmp_path / "run", **how): pass
    with run_folder(tmp_path / "run", **how): pass


def test_overwrite_leaves_what_is_not_its_own(tmp_path):
    mine = tmp_path / "runs/good/policy.safetensors", tmp_path / "runs/notes.md"
    mine[0].parent.mkdir(parents=True)
    for file in mine: file.write_text("a night's work")
    (tmp_path / "runs/config.yaml").write_text("seed: 0")
    with run_folder(tmp_path / "runs", overwrite=True) as folder: clear_run(folder)
    assert all(file.read_text() == "a night's work" for file in mine) and not (tmp_path / "runs/config.yaml").exists()


def test_overwrite_is_for_runs(quick, capsys):
    "A project has a README.md too."
    Path("README.md").write_text("mine")
    assert commands.main(["finetune", "--cfg", "smoke", "--out", ".", "--overwrite"]) == 2
    assert "--overwrite replaces runs" in capsys.readouterr().err and Path("README.md").read_text() == "mine"


def test_a_tilde_is_home(quick, monkeypatch, capsys):
    home = quick / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    shutil.copy(resources.files("ppo_ddpm") / "weights/digits.safetensors", home / "w.safetensors")
    options = ["--path.ddpm=~/w.safetensors", "--path.rm=~/rm.safetensors", "--out=~/runs/x"]
    assert commands.main(["train-reward", "--cfg", "smoke", *options]) == 0, capsys.readouterr().err
    assert {p.name for p in quick.iterdir()} == {"home"}
    assert {p.name for p in home.iterdir()} == {"w.safetensors", "rm.safetensors", "runs"}


@pytest.mark.parametrize("argv", [
    ["train-ddpm", "--finetune.power", "1.25", "--evaluate.full_steps", "500"],
    ["train-reward", "--finetune.power", "1.25", "--finetune.ddim_steps", "500"]])
def test_a_sampler_that_cannot_be_is_refused_before_the_work(argv, quick, capsys):
    assert commands.main([*argv, "--cfg", "smoke", "--out", "run"]) == 2
    assert "do not fit on T = 1000" in capsys.readouterr().err and not any(quick.iterdir())


def test_the_command_in_the_report_can_be_pasted(quick, capsys):
    out = quick / "my run"
    assert commands.main(["demo", "--cfg", "smoke", "--finetune.num_epochs", "1", "--out", str(out)]) == 0
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert str(out / "config.yaml") in shlex.split(re.search(r"ppo-ddpm demo [^\n<]*", page)[0])


def test_one_word_is_a_list_of_one():
    options = commands.parse(["train-ddpm", "--cfg", "smoke", "--model.channels", "32", "--model.attn", "8"])
    assert (options.cfg.model.channels, options.cfg.model.attn) == ((32,), (8,))


# --- shells --------------------------------------------------------------------------------------------------------------------
REWARD = "ppo-ddpm train-reward --cfg smoke"


def test_usage_into_a_closed_pipe(tmp_path):
    done = shell("ppo-ddpm | true", tmp_path)
    assert done.returncode == 0 and not done.stderr


def test_an_empty_world_size(tmp_path):
    done = shell(f"{REWARD} --out a", tmp_path, WORLD_SIZE="", RANK="")
    assert done.returncode == 0, done.stderr


def test_names_that_stdout_cannot_write(tmp_path):
    folder = tmp_path / "写真"
    folder.mkdir()
    for i in range(100): Image.effect_noise((8, 8), 50).save(folder / f"{i}.png")
    done = shell(f"{REWARD} --path.real_img 写真 --data.size 8 --out a", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


def test_what_is_printed_into_a_closed_pipe_does_not_end_a_run(tmp_path):
    done = shell(f"{REWARD} --out a | head -1; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "a/reward.safetensors").exists()


def test_a_machine_without_a_compiler(tmp_path):
    "The sentence says which setting does without."
    env = dict(CXX="/nonexistent/g++", PATH="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    command = "exec ppo-ddpm finetune --cfg smoke --finetune.num_epochs 1 --compute.compile true --out a"
    done = shell(command, tmp_path, **env)
    assert done.returncode == 2
    assert done.stderr == "ppo-ddpm: torch.compile found no compiler; install one, or give --compute.compile false\n"
    assert not (tmp_path / "a").exists()


# --- numbers -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("episodes, size", [(1, 1.), (2, 1.), (16, 1e30)])
def test_few_episodes_and_huge_rewards(episodes, size):
    model, schedule = pretrained()
    run = Finetuning(model, Finetune(num_epochs=1, episodes_per_epoch=episodes, minibatch=8))
    [rec] = finetune(run, DDIM(schedule, 4), lambda x0: size * ink(x0), (1, 8, 8))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("constant", [.1, 12.34, 100.1, 1000.1, -2.7e4])
@pytest.mark.parametrize("n", [16, 64, 256])
def test_a_constant_reward_teaches_nothing(constant, n):
    assert not whiten(torch.full((n,), constant)).any()


def test_attention_repeats():
    "Fast kernels of attention have gradients that do not, and only warn."
    set_seed(0)
    cuda = torch.backends.cuda
    assert not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())
    assert cuda.math_sdp_enabled() and torch.are_deterministic_algorithms_enabled()
