"""What goes wrong in ordinary use: each gives one sentence and exit code 2, and leaves everything on the disk as it was.

The table calls the command with real files; below it are the cases that only a caller in Python can make."""
import os, pickle, re, subprocess, sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ppo_ddpm.cli as cli
from ppo_ddpm.core import Finetune, run_folder
from ppo_ddpm.data import load_pictures
from ppo_ddpm.finetune import Finetuning, finetune
from ppo_ddpm.reward import RewardModel
from ppo_ddpm.sampling import DDIM
from ppo_ddpm.schedule import NoiseSchedule
from ppo_ddpm.unet import UNet, save_weights


class Boom:
    "A pickle that creates a file when it is executed."
    def __reduce__(self): return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with everything that can be wrong."
    here = tmp_path_factory.mktemp("bad")
    for name in "empty", "texts", "used", "run/finetune", "mixed": (here / name).mkdir(parents=True)
    (here / "texts/a.txt").write_text("no picture"); (here / "texts/b.png").write_text("neither")
    (here / "used/thesis.txt").write_text("precious")
    for name, text in dict(key="finetune: {episode_per_epoch: 3}", type="finetune: {num_epochs: many}", broken="seed: [1", empty="", section="finetune: 3",
                           eta="finetune: {eta: 1.5}", steps="schedule: {T: 10}\nfinetune: {ddim_steps: 11}").items(): (here / f"{name}.yaml").write_text(text)
    save_weights(UNet(channels=(16, 32)), here / "other.safetensors")
    save_weights(RewardModel((1, 8, 8), n_models=1), here / "one.safetensors")
    (here / "cut.safetensors").write_bytes((here / "other.safetensors").read_bytes()[:5000])
    (here / "boom.pth").write_bytes(pickle.dumps(Boom()))
    (here / "file").write_text("x")
    run_folder(here / "finished"); (here / "finished/metrics.json").write_text("{}")
    run_folder(here / "cut"); (here / "cut/checkpoint.pt").write_bytes(b"PK")
    run_folder(here / "other"); torch.save(dict(command="demo"), here / "other/checkpoint.pt")
    run_folder(here / "begun"); (here / "begun/config.yaml").write_text("seed: 0\ndevice: cpu")
    return here


def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*")) if not p.name.endswith(".pyc")}


gpu = [pytest.param(f"evaluate --device {d}", "torch sees none here; use device auto or cpu", id=f"device {d}", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"))
       for d in ("gpu", "cuda:1")]

@pytest.mark.parametrize("argv, said", [
    # the command and its options
    ("fintune", "unknown command fintune; did you mean finetune?"),
    ("demo --finetun.lr 1", "unknown option --finetun.lr; did you mean --finetune.lr?"),
    ("demo --zzz", "unknown option --zzz; see ppo-ddpm demo --help"),
    ("demo --finetune.lr fast", "--finetune.lr"),
    ("demo --finetune.num_epochs 2.5", "--finetune.num_epochs"),
    ("demo --finetune.save maybe", "--finetune.save"),
    ("demo --schedule.kind cosin", "cosin"),
    ("demo smoke", "smoke"),
    ("demo --cfg", "--cfg: expected one argument"),
    ("demo --seed -1", "seed must lie in [0, 4294967295], got -1"),
    # settings
    ("demo --cfg digit", "no configuration digit: it is neither a file nor one of default, digits, smoke; did you mean 'digits'?"),
    ("demo --cfg missing.yaml", "no configuration missing.yaml"),
    ("demo --cfg key.yaml", "unknown key 'finetune.episode_per_epoch' in key.yaml; did you mean 'finetune.episodes_per_epoch'?"),
    ("demo --cfg type.yaml", "finetune.num_epochs in type.yaml must be a whole number, got 'many'"),
    ("demo --cfg section.yaml", "finetune in section.yaml must be a mapping"),
    ("demo --cfg broken.yaml", "broken.yaml is not valid YAML"),
    ("demo --cfg empty.yaml", "empty.yaml is empty"),
    ("demo --cfg empty", "empty is a folder"),
    ("demo --cfg eta.yaml", "finetune.eta must lie in (0, 1], got 1.5"),
    ("finetune --finetune.eta 0", "a step without noise has no density"),
    ("finetune --finetune.eta -.5", "finetune.eta must lie in (0, 1], got -0.5"),
    ("demo --cfg steps.yaml", "finetune.ddim_steps = 11 is more than schedule.T = 10"),
    ("evaluate --evaluate.full_steps 1001", "evaluate.full_steps = 1001 is more than schedule.T = 1000"),
    ("evaluate --evaluate.n 32", "evaluate.n must be above 32"),
    # devices
    *gpu,
    ("evaluate --device tpu", "unknown device 'tpu'; expected auto, cpu"),
    # pictures
    ("train-ddpm --path.real_img nowhere", "no folder nowhere, and no known set of that name"),
    ("train-ddpm --path.real_img digit", "did you mean 'digits'?"),
    ("train-ddpm --path.real_img empty", "there is no picture in the folder empty"),
    ("train-ddpm --path.real_img texts", "none of the 2 files in texts could be read as a picture"),
    ("train-ddpm --path.real_img file", "file is a file, not a folder"),
    ("train-reward --path.fake_img empty", "there is no picture in the folder empty"),
    ("finetune --path.fake_img nowhere", "no folder nowhere"),
    ("train-ddpm --path.real_img CIFAR10 --data.root empty --data.download false", "CIFAR10 is not in"),
    ("finetune --data.size 7", "size 7 cannot be halved"),
    # weights
    ("evaluate --path.ddpm nowhere.pth", "there is no weights file nowhere.pth"),
    ("evaluate --path.ddpm other.safetensors", "conv_in.bias (16 in the file, 24 in the network)"),
    ("evaluate --path.ddpm cut.safetensors", "cut.safetensors is no weights file or is cut short"),
    ("evaluate --path.ddpm boom.pth", "boom.pth"),
    ("finetune --path.rm nowhere.pt", "there is no weights file nowhere.pt"),
    ("finetune --path.rm one.safetensors", "nets.1."),
    ("train-ddpm --path.ddpm other.safetensors", "other.safetensors exists, and train-ddpm would replace it"),
    ("train-reward --path.rm one.safetensors", "one.safetensors exists, and train-reward would replace it"),
    # run folders
    ("finetune --out finished", "continue the run with --resume, replace it with --overwrite, or choose another folder"),
    ("finetune --out used", "the run folder used is not empty"),
    ("finetune --out used --overwrite", "--overwrite empties only the folders of runs"),
    ("finetune --out file", "the run folder file is a file"),
    ("finetune --out nowhere --resume", "there is nothing to resume in nowhere"),
    ("finetune --out finished --resume --overwrite", "give one of them"),
    ("finetune --out cut --resume", "checkpoint.pt is no checkpoint or is cut short"),
    ("finetune --out other --resume", "is no checkpoint of finetune"),
    ("finetune --out begun --resume --finetune.lr 1", "but finetune.lr is 0.0001 in begun/config.yaml and 1.0 here"),
])
def test_refused(argv, said, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    monkeypatch.setattr(cli, "train_judge", lambda *a, **k: type("J", (), dict(accuracy=1.))())
    monkeypatch.setattr("fastprogress.fastprogress.NO_BAR", True)     # a slow machine would print lines
    monkeypatch.setattr(cli, "_marks", lambda *a: pytest.fail("the run began"))
    before, argv = contents(here), argv.split()
    if "--cfg" not in argv and "--device" not in argv: argv += ["--device", "cpu"]
    if "--cfg" not in argv and "--resume" not in argv: argv += ["--cfg", "smoke"]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("ppo-ddpm: ") and err.count("\n") == 1, err
    assert said in err and "--debug" not in err and "Traceback" not in err, err
    assert contents(here) == before


def test_shown_with_debug(capsys):
    with pytest.raises(FileNotFoundError): cli.main(["demo", "--cfg", "digit", "--debug"])


def test_in_a_shell(here):
    "The exit code, one line on stderr, nothing on stdout."
    done = subprocess.run([sys.executable, "-m", "ppo_ddpm", "demo", "--cfg", "type.yaml"], cwd=here, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(Path(cli.__file__).parents[1])))
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"ppo-ddpm: finetune\.num_epochs in type\.yaml must be a whole number, got 'many'; correct its value\n", done.stderr), done.stderr


def test_pictures_of_mixed_size_and_mode_are_brought_together(here):
    for i, (mode, size) in enumerate([("L", (9, 8)), ("RGB", (20, 31)), ("RGBA", (8, 8)), ("P", (40, 10)), ("1", (16, 16)), ("I;16", (12, 12))]): Image.new(mode, size).save(here / f"mixed/{i}.png")
    (here / "mixed/notes.txt").write_text("no picture")
    with pytest.warns(UserWarning, match="skipped 1 of 7 files in .*notes.txt"): pictures = load_pictures(here / "mixed", size=8, channels=3)
    assert pictures.x.shape == (6, 3, 8, 8)


def test_warnings_are_one_line(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    monkeypatch.setitem(cli.COMMANDS, "evaluate", (lambda job: cli.warnings.warn("skipped 1 of 7\nfiles"), ""))
    assert cli.main(["evaluate"]) == 0
    assert capsys.readouterr().err == "note: skipped 1 of 7 files\n"


@pytest.mark.parametrize("reward, error, said", [
    (lambda x: x, ValueError, "returned shape (8, 1, 8, 8), expected one number per picture, (8,)"),
    (lambda x: x.mean(), ValueError, "returned shape (), expected one number per picture"),
    (lambda x: torch.full((len(x),), torch.nan), ValueError, "returned 8 values of 8 that are NaN or infinite"),
    (lambda x: [1.] * len(x), TypeError, "returned list, expected a tensor"),
])
def test_rewards_that_cannot_be_used(reward, error, said):
    torch.manual_seed(0)
    net = UNet(channels=(8, 16))
    before = [p.clone() for p in net.parameters()]
    run = Finetuning(net, Finetune(num_epochs=1, episodes_per_epoch=8, microbatch=8))
    with pytest.raises(error) as e: list(finetune(run, DDIM(NoiseSchedule("cosine"), 4), reward, (1, 8, 8)))
    assert said in str(e.value) and "\n" not in str(e.value)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters())) and run.epoch == 0
    with pytest.raises(ValueError, match="no density"): list(finetune(run, DDIM(NoiseSchedule("cosine"), 4, eta=0), lambda x: x.mean((1, 2, 3)), (1, 8, 8)))


def test_pickles_are_not_executed(here): assert not (here / "executed").exists()
