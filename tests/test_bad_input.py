"""What goes wrong in ordinary use, and what malice may add: each gives one sentence and leaves everything on the disk as it was.

Two tables, each row made of what is called, what is raised, and words that the message must have: calls from Python, and commands (exit code 2)."""
import json, os, pickle, re, struct, subprocess, sys, zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import ppo_ddpm.cli as cli
import ppo_ddpm.core as core
import ppo_ddpm.evaluate as ev
from ppo_ddpm.core import Finetune, atomic_write, load_config, run_folder, save_config, save_grid, seeded, set_seed, to_grid
from ppo_ddpm.data import Pictures, load_pictures, minibatches, quantize, split
from ppo_ddpm.ddpm import model_for
from ppo_ddpm.finetune import Finetuning, finetune
from ppo_ddpm.ppo import control_variate
from ppo_ddpm.reward import RealFake, RewardModel, RewardNet, file_size, train_classifier
from ppo_ddpm.sampling import DDIM, ddim_timesteps, rollout
from ppo_ddpm.schedule import NoiseSchedule, cosine_abar, linear_abar
from ppo_ddpm.unet import UNet, load_unet, load_weights, read_config, save_weights


class Boom:
    "A pickle that creates a file when it is executed."
    def __reduce__(self): return os.system, ("touch executed",)


def safetensors(header, data=b""):
    "A file by hand: the length of the header, the header, the data."
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def png(width, height):
    "A picture that says how large it is, and holds next to nothing."
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with everything that can be wrong."
    here = tmp_path_factory.mktemp("bad")
    for name in "empty", "texts", "used", "run/finetune", "mixed", "huge", "zero", "torn", "few": (here / name).mkdir(parents=True)
    (here / "texts/a.txt").write_text("no picture"); (here / "texts/b.png").write_text("neither")
    (here / "used/thesis.txt").write_text("precious")
    # pictures
    Image.effect_noise((64, 64), 50).save(here / "few/one.png")
    (here / "huge/bomb.png").write_bytes(png(60_000, 60_000)); (here / "zero/nothing.png").write_bytes(b"")
    (here / "torn/half.png").write_bytes((here / "few/one.png").read_bytes()[:900])
    # settings
    for name, text in dict(key="finetune: {episode_per_epoch: 3}", type="finetune: {num_epochs: many}", broken="seed: [1", empty="", section="finetune: 3",
                           eta="finetune: {eta: 1.5}", steps="schedule: {T: 10}\nfinetune: {ddim_steps: 11}", list="- seed", nul="\0\0\0", deep="[" * 3000, loop="seed: &a [*a]",
                           boom="!!python/object/apply:os.system ['touch executed']", much="schedule: {T: 1e15}", nan="finetune: {lr: .nan}", inf="finetune: {lr: .inf}",
                           bool="train_ddpm: {num_steps: true}", wide="data: {size: 1000000000}", long="schedule: {T: 1000000000000000}").items(): (here / f"{name}.yaml").write_text(text)
    # weights
    net, torn = UNet(channels=(16, 32)), {k: v.clone() for k, v in UNet(channels=(16, 32)).state_dict().items()}
    save_weights(net, here / "other.safetensors"); save_weights(net, here / "other.pth")
    save_weights(RewardModel((1, 8, 8), n_models=1), here / "one.safetensors")
    torch.save({k: v.long() for k, v in torn.items()}, here / "whole.pth")
    torch.save({k: v * torch.nan for k, v in torn.items()}, here / "nan.pth")
    torch.save({k: v[None] for k, v in torn.items()}, here / "shape.pth")
    torch.save([1, 2], here / "list.pth"); torch.save({"a": "text"}, here / "text.pth")
    for name in "cut.safetensors", "other.pth": (here / f"half.{name[-3:]}" if name == "other.pth" else here / name).write_bytes((here / f"other.{name.split('.')[1]}").read_bytes()[:5000])
    for name in "zero.safetensors", "zero.pth": (here / name).write_bytes(b"")
    (here / "boom.pth").write_bytes(pickle.dumps(Boom())); torch.save({"a": Boom()}, here / "zip.pth")
    (here / "long.safetensors").write_bytes(struct.pack("<Q", 10**15) + b"{}")
    (here / "vast.safetensors").write_bytes(safetensors({"conv_in.bias": dict(dtype="F32", shape=[25 * 10**13], data_offsets=[0, 10**15])}))
    (here / "deep.safetensors").write_bytes(safetensors({"__metadata__": {"config": json.dumps(dict(n_blocks=10**9))}}))
    (here / "strange.safetensors").write_bytes(safetensors({"__metadata__": {"config": json.dumps(dict(colour="red"))}}))
    # judges
    judge = ev.Judge(ev.FeatureNet(), True, 1., "digits")
    ev.save_judge(judge, here / "judge.pt")
    (here / "zero.pt").write_bytes(b"")
    torch.save(dict(config=dict(judge.net.config, width=10**6), weights={}, labelled=True, accuracy=1., name="x"), here / "vast.pt")
    torch.save(dict(config=judge.net.config, weights={k: v * torch.nan if v.is_floating_point() else v for k, v in judge.net.state_dict().items()}, labelled=True, accuracy=1., name="x"), here / "nan.pt")
    # runs
    (here / "file").write_text("x")
    def run(name, checkpoint=None):
        run_folder(here / name)
        save_config(load_config("smoke"), here / name / "config.yaml")
        if isinstance(checkpoint, bytes): (here / name / "checkpoint.pt").write_bytes(checkpoint)
        elif checkpoint is not None: torch.save(checkpoint, here / name / "checkpoint.pt")
    run("finished"); (here / "finished/metrics.json").write_text("{}")
    run_folder(here / "unborn")
    run("begun"); (here / "begun/config.yaml").write_text("seed: 0\ndevice: cpu")
    run("cut", b"PK"); run("nothing", b""); run("exploding", pickle.dumps(Boom())); run("a list", [1]); run("other", dict(command="demo")); run("odd", dict(command="finetune", history=[{"epoch": "one"}]))
    run("poisoned", dict(command="finetune", run=dict(policy=dict(w=torch.tensor([1., torch.nan])))))
    run("foreign", dict(command="finetune", run=dict(epoch=1, policy=net.state_dict(), ema=net.state_dict(), opt={})))
    run("keyless", dict(command="finetune", run=dict(epoch=1))); run("shapeless", dict(command="finetune", pictures=dict(fake=torch.zeros(3, 3, 4, 4))))
    return here


def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*")) if not p.name.endswith(".pyc")}


x, T = torch.zeros(40, 1, 8, 8), torch.tensor
net = UNet(channels=(16, 32))
schedule = NoiseSchedule("cosine", 100)
pictures = Pictures(torch.zeros(40, 1, 8, 8, dtype=torch.uint8))
splits = split(pictures)
judge = ev.Judge(ev.FeatureNet().eval(), True, 1., "digits")
features = torch.randn(40, 8, generator=seeded(0))
limits = core.Finetune

CALLS = [
    # random numbers, devices, files
    ("seeded()", TypeError, "needs a key and got none"),
    ("seeded(0, .5)", TypeError, "made of integers and strings, got 0.5"),
    ("set_seed(-1)", ValueError, "must lie in [0, 2**32), got -1"),
    ("set_seed('1')", TypeError, "seed must be a whole number, got '1'"),
    ("core.pick_device('tpu')", ValueError, "expected auto, cpu, gpu"),
    ("atomic_write('empty').__enter__()", IsADirectoryError, "a folder has that name"),
    ("atomic_write('file/x').__enter__()", OSError, "cannot write file/x (not a directory)"),
    ("core.check_writable('/proc/x')", OSError, "cannot write /proc/x"),
    ("save_grid(x, 'file/x.png')", OSError, "cannot write file/x.png"),
    ("save_weights(net, 'file/x.pth')", OSError, "cannot write file/x.pth"),
    ("save_config(load_config('smoke'), '/proc/x.yaml')", OSError, "cannot write /proc/x.yaml"),
    ("save_weights(net, 'n' * 300 + '.pth')", OSError, "(file name too long)"),
    ("run_folder('used')", FileExistsError, "is not empty; continue the run with --resume"),
    ("run_folder('used', overwrite=True)", FileExistsError, "empties only the folders of runs"),
    ("to_grid(x[0])", ValueError, "one picture becomes a batch"),
    ("to_grid(x.byte())", TypeError, "expected floats in [-1, 1]"),
    ("to_grid(x / 0)", ValueError, "40 of 40 pictures hold NaN"),
    ("core.Board().update(3)", TypeError, "at least the key 'epoch', got 3"),
    # settings
    ("load_config('digit')", FileNotFoundError, "did you mean 'digits'?"),
    ("load_config('empty')", IsADirectoryError, "is a folder, not a configuration"),
    ("load_config('empty.yaml')", ValueError, "is empty; write at least one line"),
    ("load_config('list.yaml')", TypeError, "must be a mapping"),
    ("load_config('nul.yaml')", ValueError, "is not valid YAML"),
    ("load_config('deep.yaml')", ValueError, "is not valid YAML"),
    ("load_config('loop.yaml')", TypeError, "seed in loop.yaml must be a whole number"),
    ("load_config('boom.yaml')", ValueError, "could not determine a constructor"),
    ("load_config('much.yaml')", TypeError, "schedule.T in much.yaml must be a whole number"),
    ("load_config('long.yaml')", ValueError, "schedule.T must lie in"),
    ("load_config('wide.yaml')", ValueError, "data.size must lie in"),
    ("load_config('nan.yaml')", ValueError, "finetune.lr must lie in (0, inf), got nan"),
    ("load_config('inf.yaml')", ValueError, "finetune.lr must lie in (0, inf), got inf"),
    ("load_config('bool.yaml')", TypeError, "must be a whole number, got True"),
    ("load_config('smoke', {'finetune.lrr': 1})", ValueError, "did you mean 'finetune.lr'?"),
    ("Finetune(num_epochs=2.5)", TypeError, "finetune.num_epochs must be a whole number, got 2.5"),
    ("Finetune(lr_decay='cosine')", TypeError, "finetune.lr_decay must be one of linear, none, got 'cosine'"),
    ("Finetune(ratio_tolerance=-1)", ValueError, "finetune.ratio_tolerance must lie in [0, inf]"),
    ("core.Data(channels=4)", ValueError, "1 (grey) or 3 (RGB)"),
    ("core.Model(channels=())", ValueError, "is empty; give at least one width"),
    ("core.Config(seed='3')", TypeError, "seed must be a whole number, got '3'"),
    # pictures
    ("Pictures(x)", TypeError, "uint8 tensor of shape (N, C, H, W), got torch.float32"),
    ("Pictures(x.byte() + 9, levels=8)", ValueError, "must hold values 0..7, got 9"),
    ("Pictures(x.byte(), torch.zeros(3))", ValueError, "give one per picture"),
    ("quantize(x, 1)", ValueError, "at least 2 grey levels"),
    ("load_pictures(None)", TypeError, "give its name"),
    ("load_pictures('digits', size='8')", ValueError, "whole number of pixels, at least 1, got '8'"),
    ("load_pictures('huge')", FileNotFoundError, "bomb.png (more than 89 million pixels)"),
    ("load_pictures('zero')", FileNotFoundError, "nothing.png (not a picture that Pillow reads)"),
    ("load_pictures('torn')", FileNotFoundError, "half.png (image file is truncated"),
    ("split(pictures[:6])", ValueError, "too few for three splits"),
    ("split(pictures, fractions=(.5, .5, .5))", ValueError, "sum to 1"),
    ("minibatches(0, 4, seeded(0))", ValueError, "at least 1 picture"),
    # schedule, network, sampler
    ("linear_abar(0)", ValueError, "at least 1 noise step"),
    ("linear_abar(2.5)", TypeError, "must be a whole number, got 2.5"),
    ("cosine_abar(10, truncate=2)", ValueError, "truncate must lie in (0, 1], got 2"),
    ("NoiseSchedule('cosin')", ValueError, "did you mean 'cosine'?"),
    ("NoiseSchedule(T([.1, .9]))", ValueError, "abar must fall at every step"),
    ("schedule.add_noise(x, T(100), x)", ValueError, "t must lie in 0..99, got 100"),
    ("schedule.add_noise(x, T(1), x[:3])", ValueError, "must have the pictures' shape"),
    ("UNet(size=7)", ValueError, "cannot be halved"),
    ("UNet(attn=(3,))", ValueError, "choose from 8, 4"),
    ("UNet(n_blocks=10**9)", ValueError, "n_blocks must be"),
    ("net(x[..., :4], 0)", ValueError, "x must have shape (B, 1, 8, 8)"),
    ("net(x.long(), 0)", TypeError, "x must be floats"),
    ("net(x, 'now')", TypeError, "t must be a number or a tensor of times"),
    ("ddim_timesteps(10, 11)", ValueError, "allows 1 to 10 sampling steps, got 11"),
    ("DDIM(schedule, 4, eta=2)", ValueError, "eta must lie in [0, 1], got 2"),
    ("rollout(net, DDIM(schedule, 4, eta=0), x)", ValueError, "no density to learn from"),
    # weights
    ("save_weights(net, 'x.bin')", ValueError, "saved as .safetensors, .pth or .pt"),
    ("load_weights(net, 'nowhere.pth')", FileNotFoundError, "check the name"),
    ("load_weights(net, 'empty')", FileNotFoundError, "this is a folder"),
    ("load_weights(net, 'zero.pth')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'zero.safetensors')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'half.pth')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'cut.safetensors')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'long.safetensors')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'vast.safetensors')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'boom.pth')", ValueError, "boom.pth"),
    ("load_weights(net, 'zip.pth')", ValueError, "could run code, so it was not read"),
    ("load_weights(net, 'list.pth')", ValueError, "no plain state dict"),
    ("load_weights(net, 'text.pth')", ValueError, "no plain state dict"),
    ("load_weights(net, 'nan.pth')", ValueError, "holds NaN or infinity"),
    ("load_weights(net, 'shape.pth')", ValueError, "of another shape"),
    ("load_weights(net, 'whole.pth')", ValueError, "of another type"),
    ("load_weights(net, 'one.safetensors')", ValueError, "does not fit this UNet"),
    ("read_config('other.pth')", ValueError, "does not say what network"),
    ("load_unet('one.safetensors')", ValueError, "another kind of network than UNet"),
    ("load_unet('strange.safetensors')", ValueError, "another kind of network than UNet"),
    ("load_unet('deep.safetensors')", ValueError, "n_blocks must be"),
    ("model_for(load_config('smoke', {'path.ddpm': 'nowhere.pth'}))", FileNotFoundError, "no weights file nowhere.pth"),
    # rewards and PPO
    ("RewardNet(7)", ValueError, "8, 16, 32, ... pixels a side, got 7"),
    ("RealFake(x, x[:, :, :4], core.TrainReward())", ValueError, "make them the same"),
    ("RealFake(x[:5], x, core.TrainReward())", ValueError, "at least 10 pictures of each kind, got 5 real"),
    ("file_size(x, 'GIF')", ValueError, "must be PNG or JPEG"),
    ("train_classifier(pictures)", ValueError, "has no labels"),
    ("control_variate(x[:, 0, 0, 0], x[:3, 0, 0])", ValueError, "one row per decision"),
    # judges and distances
    ("ev.FeatureNet(4)", ValueError, "at least 8 pixels"),
    ("ev.train_judge(pictures[:9])", ValueError, "expected at least 40"),
    ("ev.load_judge('nowhere.pt')", FileNotFoundError, "no judge at nowhere.pt"),
    ("ev.load_judge('zero.pt')", ValueError, "holds no judge"),
    ("ev.load_judge('boom.pth')", ValueError, "holds no judge"),
    ("ev.load_judge('list.pth')", ValueError, "holds no judge"),
    ("ev.load_judge('vast.pt')", ValueError, "holds no judge"),
    ("ev.load_judge('nan.pt')", ValueError, "holds NaN or infinity"),
    ("ev.frechet_distance(features, features[:8])", ValueError, "cannot fill a covariance"),
    ("ev.frechet_distance(features, 'f')", TypeError, "must be a tensor (N, D), got str"),
    ("ev.kernel_distance(features, features / 0)", ValueError, "hold NaN or infinity"),
    ("ev.precision_recall(features, features, k=0)", ValueError, "k must be at least 1"),
    ("ev.discriminator_auc(x, x[:0], x, x)", ValueError, "not empty"),
    ("ev.evaluate(judge, x, splits, 'train')", ValueError, "'test' or 'judge'"),
    ("ev.evaluate(judge, x / 0, splits)", ValueError, "holds NaN or infinity in 40 of 40 pictures"),
    ("ev.class_histogram(judge, x[..., :4])", ValueError, "expected (1, 8, 8)"),
    ("ev.total_variation(T([1.]), T([.5, .5]))", ValueError, "must have one shape"),
    ("ev.floor(judge, splits, 5000)", ValueError, "the size of the train split, got 5000"),
]

gpu = [pytest.param(f"evaluate --device {d}", "torch sees none here; use device auto or cpu", id=f"device {d}", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"))
       for d in ("gpu", "cuda:1")]

COMMANDS = [
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
    ("demo --cfg digit", "no configuration digit: it is neither a file nor one of cifar10, default, digits, faces, fashion, smoke; did you mean 'digits'?"),
    ("demo --cfg missing.yaml", "no configuration missing.yaml"),
    ("demo --cfg key.yaml", "unknown key 'finetune.episode_per_epoch' in key.yaml; did you mean 'finetune.episodes_per_epoch'?"),
    ("demo --cfg type.yaml", "finetune.num_epochs in type.yaml must be a whole number, got 'many'"),
    ("demo --cfg section.yaml", "finetune in section.yaml must be a mapping"),
    ("demo --cfg broken.yaml", "broken.yaml is not valid YAML"),
    ("demo --cfg empty.yaml", "empty.yaml is empty"),
    ("demo --cfg empty", "empty is a folder"),
    ("demo --cfg eta.yaml", "finetune.eta must lie in (0, 1], got 1.5"),
    ("finetune --finetune.eta 0", "a step without noise has no density"),
    ("finetune --finetune.decisions 4", "finetune.ddim_steps = 4 has 3"),
    ("finetune --finetune.clip_x0 0", "finetune.clip_x0 must lie in (0, inf), got 0"),
    ("finetune --finetune.lora_rank 0", "finetune.lora_rank must lie in [1, inf), got 0"),
    ("finetune --compute.precision fp8", "fp8"),
    ("finetune --compute.max_batch 0", "compute.max_batch must lie in [1, inf), got 0"),
    ("train-ddpm --compute.max_batch most", "most"),
    ("finetune --finetune.max_batch 3", "unknown option --finetune.max_batch; did you mean --compute.max_batch?"),
    ("finetune --finetune.eta -.5", "finetune.eta must lie in (0, 1], got -0.5"),
    ("demo --cfg steps.yaml", "finetune.ddim_steps = 11 is more than schedule.T = 10"),
    ("evaluate --evaluate.full_steps 1001", "evaluate.full_steps = 1001 is more than schedule.T = 1000"),
    ("evaluate --evaluate.n 32", "evaluate.n must be above 32"),
    ("demo --cfg boom.yaml", "is not valid YAML: could not determine a constructor"),
    ("demo --cfg nul.yaml", "is not valid YAML"),
    # devices
    *gpu,
    ("evaluate --device tpu", "unknown device 'tpu'; expected auto, cpu"),
    # pictures
    ("train-ddpm --path.real_img nowhere", "no folder nowhere, and no known set of that name"),
    ("train-ddpm --path.real_img digit", "did you mean 'digits'?"),
    ("train-ddpm --path.real_img empty", "there is no picture in the folder empty"),
    ("train-ddpm --path.real_img texts", "none of the 2 files in texts could be read as a picture"),
    ("train-ddpm --path.real_img file", "file is a file, not a folder"),
    ("train-ddpm --path.real_img huge", "bomb.png (more than 89 million pixels)"),
    ("train-ddpm --path.real_img few", "1 pictures are too few for three splits"),
    ("train-reward --path.fake_img empty", "there is no picture in the folder empty"),
    ("finetune --path.fake_img nowhere", "no folder nowhere"),
    ("train-ddpm --path.real_img CIFAR10 --data.root empty --data.download false", "CIFAR10 is not in"),
    ("finetune --data.size 7", "size 7 cannot be halved"),
    # weights
    ("evaluate --path.ddpm nowhere.pth", "there is no weights file nowhere.pth"),
    ("evaluate --path.ddpm other.safetensors", "conv_in.bias (16 in the file, 24 in the network)"),
    ("evaluate --path.ddpm cut.safetensors", "cut.safetensors is no weights file or is cut short"),
    ("evaluate --path.ddpm boom.pth", "boom.pth"),
    ("evaluate --path.ddpm zip.pth", "could run code, so it was not read"),
    ("evaluate --path.ddpm zero.pth", "zero.pth is no weights file or is cut short"),
    ("evaluate --path.ddpm long.safetensors", "long.safetensors is no weights file"),
    ("evaluate --path.ddpm nan.pth", "nan.pth"),
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
    ("finetune --out unborn --resume", "there is nothing to resume in unborn, which has no config.yaml"),
    ("finetune --out nothing --resume", "nothing/checkpoint.pt is no checkpoint or is cut short"),
    ("finetune --out exploding --resume", "exploding/checkpoint.pt is no checkpoint or is cut short"),
    (["finetune", "--out", "a list", "--resume"], "a list/checkpoint.pt is no checkpoint or is cut short"),
    ("finetune --out odd --resume", "odd/checkpoint.pt is no checkpoint or is cut short"),
    ("finetune --out poisoned --resume", "holds NaN or infinity in run.policy.w"),
    ("finetune --out foreign --resume", "'run' is of another run or broken"),
    ("finetune --out keyless --resume", "'run' is of another run or broken"),
    ("finetune --out shapeless --resume", "'pictures' is of another run or broken"),
    ("finetune --out file/run", "cannot write"),
    ("train-ddpm --out /proc/run", "cannot write /proc/run"),
    ("train-ddpm --path.ddpm file/x.pth", "cannot write"),
]

@pytest.mark.parametrize("argv, said", COMMANDS)
def test_refused(argv, said, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    monkeypatch.setattr(cli, "train_judge", lambda *a, **k: type("J", (), dict(accuracy=1.))())
    monkeypatch.setattr("fastprogress.fastprogress.NO_BAR", True)     # a slow machine would print lines
    monkeypatch.setattr(cli, "_marks", lambda *a: pytest.fail("the run began"))
    before, argv = contents(here), argv.split() if isinstance(argv, str) else argv
    if "--cfg" not in argv and "--device" not in argv: argv += ["--device", "cpu"]
    if "--cfg" not in argv and "--resume" not in argv: argv += ["--cfg", "smoke"]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("ppo-ddpm: ") and err.count("\n") == 1, err
    assert said in err and "--debug" not in err and "Traceback" not in err, err
    assert contents(here) == before


@pytest.mark.parametrize("call, error, said", CALLS, ids=[c[0] for c in CALLS])
def test_calls(call, error, said, here, monkeypatch):
    monkeypatch.chdir(here)
    before, weights = contents(here), [p.clone() for p in net.parameters()]
    with pytest.raises(error) as e: eval(call)
    assert said in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 700, str(e.value)
    assert contents(here) == before and all(map(torch.equal, weights, net.parameters()))


def test_enough_rows(): assert len(CALLS) >= 60 and len(COMMANDS) >= 60


def test_names_with_spaces_and_umlauts(here, monkeypatch):
    "What is right works, whatever it is called."
    monkeypatch.chdir(here)
    odd = Path("Läufe, 第一 ü/a b"); (odd / "Bilder ✓").mkdir(parents=True)
    for i in range(3): Image.effect_noise((9, 9), 50).save(odd / "Bilder ✓" / f"Bild {i} é.png")
    assert len(load_pictures(odd / "Bilder ✓")) == 3
    save_config(load_config("smoke"), odd / "läuft.yaml")
    assert cli.parse(["finetune", "--cfg", str(odd / "läuft.yaml"), "--out", str(odd / "neu")]).cfg == load_config("smoke")
    for name in "gewichte ü.safetensors", "gewichte ü.pth": load_weights(net, save_weights(net, odd / name))
    ev.save_judge(judge, odd / "Richter ✓.pt"); assert ev.load_judge(odd / "Richter ✓.pt").name == "digits"
    save_grid(x, odd / "Gitter ✓.png")


def test_little_memory_was_needed():
    "Files that declare 10**15 bytes, or 60,000 x 60,000 pixels, were refused before memory was asked for; torch itself takes about half of this."
    resource = pytest.importorskip("resource")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) < 1.5e9


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
