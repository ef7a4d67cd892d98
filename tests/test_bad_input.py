"""What goes wrong in ordinary use, and what malice may add: each gives one sentence and leaves everything on the disk as it was.

Two tables, each row made of what is called, what is raised, and words that the message must have: calls from Python, and commands (exit code 2)."""
import json, os, pickle, re, struct, subprocess, sys, zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

import ppo_ddpm.engine.settings as settings
from ppo_ddpm.data import Pictures, digits, quantize, seeded, split, to_grid
from ppo_ddpm.ddpm import TrainDDPM
from ppo_ddpm.engine import commands, jobs
from ppo_ddpm.engine.board import Board, save_gif, save_grid
from ppo_ddpm.engine.checkpoints import atomic_write, load_checkpoint, run_folder
from ppo_ddpm.engine.hub import from_diffusers, open_pretrained, sampler_from_diffusers
from ppo_ddpm.engine.options import load_config, save_config
from ppo_ddpm.engine.pictures import load_pictures
from ppo_ddpm.engine.settings import Compute, Config, make_config, pick_device, set_seed
from ppo_ddpm.engine.weights import load_unet, load_weights, save_weights
from ppo_ddpm.evaluate import evaluate, floor, frechet_distance
from ppo_ddpm.finetune import Finetune, Finetuning, finetune, watcher
from ppo_ddpm.judge import FeatureNet, Judge, train_judge
from ppo_ddpm.ppo import PPO
from ppo_ddpm.realfake import RealFake, TrainReward
from ppo_ddpm.reward import RewardModel, RewardNet, checked
from ppo_ddpm.sampling import DDIM, ddim_timesteps, rollout
from ppo_ddpm.schedule import NoiseSchedule, add_noise
from ppo_ddpm.unet import UNet


class Boom:
    "A pickle that creates a file when it is executed."
    def __reduce__(self): return os.system, ("touch executed",)


def safetensors(header, data=b""):
    "A file by hand: the length of the header, the header, the data."
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def png(width, height):
    "A picture that says how large it is, and holds next to nothing."
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


SETTINGS = dict(
    key="finetune: {episode_per_epoch: 3}", type="finetune: {num_epochs: many}", broken="seed: [1", empty="",
    section="finetune: 3", eta="finetune: {eta: 1.5}", steps="schedule: {T: 10}\nfinetune: {ddim_steps: 11}",
    list="- seed", nul="\0\0\0", deep="[" * 3000, loop="seed: &a [*a]", twice="finetune: {lr: 1}\nfinetune: {kl: 1}",
    boom="!!python/object/apply:os.system ['touch executed']", much="schedule: {T: 1e15}", nan="finetune: {lr: .nan}",
    wide="data: {size: 1000000000}", long="schedule: {T: 1000000000000000}", host="compute: {host: true}")


def write_pictures(here):
    Image.effect_noise((64, 64), 50).save(here / "few/one.png")
    for i in range(100): Image.effect_noise((8, 8), 50).save(here / f"hundred/{i}.png")
    (here / "huge/bomb.png").write_bytes(png(60_000, 60_000))
    (here / "zero/nothing.png").write_bytes(b"")
    (here / "torn/half.png").write_bytes((here / "few/one.png").read_bytes()[:900])
    (here / "texts/a.txt").write_text("no picture")
    (here / "texts/b.png").write_text("neither")


def write_weights(here):
    net, cosine = UNet(channels=(16, 32)), NoiseSchedule("cosine", 1000)
    state = net.state_dict()
    for name in "other.safetensors", "other.pth": save_weights(net, here / name)
    save_weights(UNet(), here / "linear.safetensors", NoiseSchedule("linear", 1000))
    save_weights(UNet(head_dim=8), here / "heads.safetensors", cosine)
    save_weights(RewardModel((1, 8, 8), n_models=1), here / "one.safetensors")
    save_weights(RewardModel((1, 8, 8), alpha=0.3), here / "alpha.safetensors")
    torch.save({k: v * torch.nan for k, v in state.items()}, here / "nan.pth")
    torch.save({k: v[None] for k, v in state.items()}, here / "shape.pth")
    torch.save([1, 2], here / "list.pth")
    torch.save({"a": "text"}, here / "text.pth")
    torch.save({"a": Boom()}, here / "zip.pth")
    (here / "boom.pth").write_bytes(pickle.dumps(Boom()))
    (here / "page.pth").write_text("<!DOCTYPE html><html></html>")
    (here / "half.pth").write_bytes((here / "other.pth").read_bytes()[:5000])
    (here / "cut.safetensors").write_bytes((here / "other.safetensors").read_bytes()[:5000])
    for name in "zero.safetensors", "zero.pth": (here / name).write_bytes(b"")
    tensor = dict(dtype="F32", shape=[25 * 10**13], data_offsets=[0, 10**15])
    (here / "vast.safetensors").write_bytes(safetensors({"conv_in.bias": tensor}))
    (here / "long.safetensors").write_bytes(struct.pack("<Q", 10**15) + b"{}")
    strange = {"__metadata__": {"config": json.dumps(dict(colour="red"))}}
    (here / "strange.safetensors").write_bytes(safetensors(strange))


def write_runs(here):
    def run(name, checkpoint=None):
        (here / name).mkdir()
        save_config(load_config("smoke"), here / name / "config.yaml")
        if isinstance(checkpoint, dict): checkpoint = dict(version=2, command="finetune", data=data) | checkpoint
        if isinstance(checkpoint, bytes): (here / name / "checkpoint.pt").write_bytes(checkpoint)
        elif checkpoint is not None: torch.save(checkpoint, here / name / "checkpoint.pt")
    data, state = jobs.fingerprint(digits()), UNet(channels=(16, 32)).state_dict()
    run("finished")
    (here / "finished/metrics.json").write_text("{}")
    run("begun")
    (here / "begun/config.yaml").write_text("seed: 0\ndevice: cpu")
    run("cut", b"PK")
    run("nothing", b"")
    run("exploding", pickle.dumps(Boom(), 2))
    run("a list", [1])
    run("older", dict(version=1))
    run("other", dict(command="demo"))
    run("elsewhere", dict(data="0123"))
    run("dataless", dict(data=None))
    run("poisoned", dict(run=dict(policy=dict(w=torch.tensor([1., torch.nan])))))
    run("foreign", dict(run=dict(epoch=1, policy=state, ema=dict(model=state, n=1), opt={})))
    run("keyless", dict(run=dict(epoch=1)))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with everything that can be wrong."
    here = tmp_path_factory.mktemp("bad")
    for name in "empty", "texts", "used", "mixed", "huge", "zero", "torn", "few", "hundred": (here / name).mkdir()
    (here / "used/thesis.txt").write_text("precious")
    (here / "used/README.md").write_text("precious too")
    (here / "file").write_text("x")
    (here / "unborn").mkdir()
    (here / "unborn/.lock").touch()
    for name, text in SETTINGS.items(): (here / f"{name}.yaml").write_text(text)
    write_pictures(here)
    write_weights(here)
    write_runs(here)
    return here


def contents(folder):
    "{name: bytes} of all files, but for the locks of run folders and compiled code."
    files = [p for p in sorted(folder.rglob("*")) if p.name != ".lock" and p.suffix != ".pyc"]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in files}


x, T = torch.zeros(40, 1, 8, 8), torch.tensor
net = UNet(channels=(16, 32))
schedule = NoiseSchedule("cosine", 100)
pictures = Pictures(torch.zeros(40, 1, 8, 8, dtype=torch.uint8))
many = split(Pictures(torch.zeros(400, 1, 8, 8, dtype=torch.uint8)))
judge = Judge(FeatureNet().eval(), True, 1.)
features = torch.randn(40, 8, generator=seeded(0))

CALLS = [
    # random numbers, devices, files
    ("seeded(0, .5)", TypeError, "'float' object cannot be interpreted as an integer"),
    ("set_seed(-1)", ValueError, "between 0 and 2**32 - 1"),
    ("pick_device('tpu')", ValueError, "expected auto, cpu, gpu"),
    ("pick_device('cuda:x')", ValueError, "expected auto, cpu, gpu"),
    ("atomic_write('empty').__enter__()", IsADirectoryError, "a folder has that name"),
    ("atomic_write('file/x').__enter__()", OSError, "cannot write file/x (file exists)"),
    ("save_grid(x, 'file/x.png')", OSError, "cannot write file/x.png"),
    ("save_gif([], 'x.gif')", ValueError, "expected at least one"),
    ("save_weights(net, 'file/x.pth')", OSError, "cannot write file/x.pth"),
    ("save_weights(net, 'n' * 300 + '.pth')", OSError, "File name too long"),
    ("run_folder('used').__enter__()", FileExistsError, "used is not empty; use --resume, --overwrite"),
    ("run_folder('file').__enter__()", FileExistsError, "file is a file"),
    ("run_folder('nowhere', resume=True).__enter__()", FileNotFoundError, "nothing to resume in nowhere"),
    ("run_folder('used', True, True).__enter__()", ValueError, "give one of them"),
    ("run_folder('file/run').__enter__()", OSError, "cannot write into file/run"),
    ("load_checkpoint('cut/checkpoint.pt', 'finetune')", ValueError, "no checkpoint or is cut short"),
    ("load_checkpoint('poisoned/checkpoint.pt', 'finetune')", ValueError, "holds NaN or infinity in run.policy.w"),
    ("to_grid(x[0])", ValueError, "expected pictures of shape (B, 1 or 3, H, W), got (1, 8, 8)"),
    # settings
    ("load_config('digit')", FileNotFoundError, "give a YAML file or one of cifar10, default, digits"),
    ("load_config('empty')", FileNotFoundError, "no configuration empty"),
    ("load_config('empty.yaml')", ValueError, "holds no settings; write lines such as"),
    ("load_config('list.yaml')", ValueError, "holds no settings"),
    ("load_config('nul.yaml')", ValueError, "is not valid YAML"),
    ("load_config('deep.yaml')", ValueError, "is not valid YAML"),
    ("load_config('twice.yaml')", ValueError, "finetune is written twice"),
    ("load_config('boom.yaml')", ValueError, "could not determine a constructor"),
    ("load_config('loop.yaml')", ValueError, "seed in loop.yaml"),
    ("load_config('smoke', {'finetune.lrr': 1})", ValueError, "did you mean 'finetune.lr'?"),
    ("load_config('smoke', {'finetune': {'lr': 'fast'}})", ValueError, "finetune.lr in smoke"),
    ("make_config({'compute.hosts': True})", ValueError, "unknown setting 'compute.hosts'"),
    ("settings.Finetune(num_epochs=2.5)", ValidationError, "num_epochs"),
    ("settings.Finetune(num_epoch=2)", ValidationError, "num_epoch"),
    ("settings.Finetune(ratio_tolerance=-1)", ValidationError, "ratio_tolerance"),
    ("settings.Data(channels=4)", ValidationError, "Input should be 1 or 3"),
    ("Compute(precision='fp8')", ValidationError, "'fp32', 'bf16' or 'fp16'"),
    ("Config(seed='x')", ValidationError, "valid integer"),
    ("Config(data=settings.Data(size=7))", ValidationError, "size 7 cannot be halved"),
    ("Finetune(lr_decay='cosine')", ValidationError, "'linear' or 'none'"),
    ("PPO(clip_eps=0)", ValidationError, "greater than 0"),
    ("TrainReward(batch_size=1)", ValidationError, "greater than or equal to 2"),
    ("TrainDDPM(ema=1)", ValidationError, "less than 1"),
    # pictures
    ("Pictures(x)", TypeError, "must be uint8 of shape (N, C, H, W), got torch.float32"),
    ("Pictures(x[0].byte())", TypeError, "of shape (1, 8, 8)"),
    ("load_pictures(None)", TypeError, "give its name"),
    ("load_pictures('digits', size='8')", ValueError, "whole number of pixels, at least 1, got '8'"),
    ("load_pictures('digits', channels=4)", ValueError, "1 (grey) or 3 (RGB), got 4"),
    ("load_pictures('hundred', value_range=(1, 0))", ValueError, "black < white, got (1, 0)"),
    ("load_pictures('huge')", FileNotFoundError, "bomb.png (more than 89 million pixels)"),
    ("load_pictures('zero')", FileNotFoundError, "nothing.png (not a picture that Pillow reads)"),
    ("load_pictures('torn')", FileNotFoundError, "half.png (image file is truncated"),
    ("split(pictures[:6])", ValueError, "too few for three splits"),
    # schedule, network, sampler
    ("NoiseSchedule('cosin')", KeyError, "cosin"),
    ("NoiseSchedule(T([.1, .9]))", ValueError, "abar must fall from below 1 to above 0 at every step"),
    ("NoiseSchedule([1., .9])", ValueError, "abar must fall from below 1"),
    ("add_noise(schedule, x, 100, x)", IndexError, "index 100 is out of bounds"),
    ("UNet(size=7)", ValueError, "cannot be halved"),
    ("UNet(attn=(3,))", ValueError, "the levels have sizes 8, 4"),
    ("UNet(channels=(20, 40))", ValueError, "must be divisible by num_groups"),
    ("ddim_timesteps(10, 11)", ValueError, "11 steps (trailing, power 1.0) do not fit on T = 10"),
    ("ddim_timesteps(1000, 900, power=2.)", ValueError, "without visiting one twice"),
    ("ddim_timesteps(10, 3, 'even')", KeyError, "even"),
    ("DDIM(schedule, 4, eta=2)", ValueError, "eta must lie in [0, 1], got 2"),
    ("rollout(net, DDIM(schedule, 4, eta=0), x)", ValueError, "no density to learn from"),
    ("rollout(net, DDIM(schedule, 1), x)", ValueError, "at least 2 steps"),
    # weights
    ("save_weights(net, 'x.bin')", ValueError, "saved as .safetensors, .pth or .pt"),
    ("load_weights(net, 'nowhere.pth')", FileNotFoundError, "there is no weights file nowhere.pth"),
    ("load_weights(net, 'empty')", FileNotFoundError, "there is no weights file empty"),
    ("load_weights(net, 'zero.pth')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'zero.safetensors')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'half.pth')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'cut.safetensors')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'long.safetensors')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'vast.safetensors')", ValueError, "is no weights file or is cut short"),
    ("load_weights(net, 'boom.pth')", ValueError, "boom.pth"),
    ("load_weights(net, 'page.pth')", ValueError, "page.pth is no weights file"),
    ("load_weights(net, 'zip.pth')", ValueError, "could run code, so it was not read"),
    ("load_weights(net, 'list.pth')", ValueError, "no plain state dict"),
    ("load_weights(net, 'text.pth')", ValueError, "no plain state dict"),
    ("load_weights(net, 'nan.pth')", ValueError, "holds NaN or infinity"),
    ("load_weights(net, 'shape.pth')", ValueError, "(1, 16, 1, 3, 3) in the file, (16, 1, 3, 3) in the network"),
    ("load_weights(net, 'one.safetensors')", ValueError, "does not fit this UNet"),
    ("load_unet('other.pth')", ValueError, "does not say what network"),
    ("load_unet('one.safetensors')", ValueError, "does not say what network"),
    ("load_unet('strange.safetensors')", ValueError, "does not say what network"),
    ("open_pretrained('empty')", FileNotFoundError, "give the folder of a checkpoint"),
    ("from_diffusers('used')", FileNotFoundError, "used/config.json is missing"),
    ("sampler_from_diffusers('used', 4)", FileNotFoundError, "no scheduler_config.json in used"),
    # rewards
    ("RewardNet(7)", ValueError, "8, 16, 32, ... pixels a side, got 7"),
    ("RealFake(x[:5], x, TrainReward())", ValueError, "at least 10 pictures of each kind, got 5 real"),
    ("checked(lambda x0: 3., x)", TypeError, "returned float, expected a tensor"),
    # judges and distances
    ("FeatureNet(4)", ValueError, "at least 8 pixels"),
    ("train_judge(pictures[:9])", ValueError, "has 9 pictures, expected at least 40"),
    ("judge.features(x[..., :4])", ValueError, "pictures of shape (1, 8, 8), got (1, 8, 4)"),
    ("frechet_distance(features, features[:8])", ValueError, "cannot fill a covariance of 8 features; draw more"),
    ("evaluate(judge, x[:20], many)", ValueError, "20 pictures cannot fill a covariance"),
    ("evaluate(judge, x, many, 'train')", KeyError, "train"),
    ("floor(judge, many, 5000)", ValueError, "the train split has 200 pictures"),
    ("watcher(judge, many, DDIM(schedule, 4), n=20)(net)", ValueError, "cannot fill a covariance"),
]

here_is_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
gpu = [pytest.param(f"evaluate --device {d}", "torch sees 0 CUDA devices; use auto or cpu", marks=here_is_a_gpu)
       for d in ("gpu", "cuda:1")]

COMMANDS = [
    # the command and its options
    ("fintune", "unknown command fintune; did you mean finetune?"),
    ("demo --finetun.lr 1", "unknown setting 'finetun.lr' in the command line; did you mean 'finetune.lr'?"),
    ("demo --zzz", "unknown setting 'zzz' in the command line; ppo-ddpm finetune --help lists them"),
    ("demo --finetune.lr fast", "finetune.lr"),
    ("demo --finetune.lr", "--finetune.lr: expected at least one argument"),
    ("demo --finetune.lr=", "finetune.lr"),
    ("demo --finetune.lr 1e-4 1e-5", "finetune.lr"),
    ("demo --finetune.num_epochs 2.5", "finetune.num_epochs"),
    ("demo --finetune.num-epochs x", "finetune.num_epochs"),
    ("demo --finetune.save maybe", "finetune.save"),
    ("demo --schedule.kind cosin", "'linear' or 'cosine', got 'cosin'"),
    ("demo smoke", "unknown setting 'smoke'"),
    ("demo --cfg", "--cfg: expected one argument; see ppo-ddpm demo --help"),
    ("demo --resum", "unknown setting 'resum'"),
    ("demo --seed -1", "greater than or equal to 0, got -1"),
    ("demo --seed 4294967296", "seed"),
    # settings
    ("demo --cfg digit", "no configuration digit: give a YAML file or one of cifar10, default, digits, faces, fashion, smoke"),
    ("demo --cfg missing.yaml", "no configuration missing.yaml"),
    ("demo --cfg key.yaml", "unknown setting 'finetune.episode_per_epoch' in key.yaml; did you mean 'finetune.episodes_per_epoch'?"),
    ("demo --cfg type.yaml", "finetune.num_epochs in type.yaml: input should be a valid integer, unable to parse string as an integer, got 'many'"),
    ("demo --cfg section.yaml", "unknown setting 'finetune' in section.yaml"),
    ("demo --cfg host.yaml", "unknown setting 'compute.host' in host.yaml"),
    ("demo --cfg broken.yaml", "broken.yaml is not valid YAML"),
    ("demo --cfg twice.yaml", "twice.yaml is not valid YAML: finetune is written twice"),
    ("demo --cfg empty.yaml", "empty.yaml holds no settings"),
    ("demo --cfg empty", "no configuration empty"),
    ("demo --cfg eta.yaml", "finetune.eta in eta.yaml: input should be less than or equal to 1, got 1.5"),
    ("demo --cfg steps.yaml", "11 steps (trailing, power 1.0) do not fit on T = 10"),
    ("demo --cfg much.yaml", "schedule.T in much.yaml"),
    ("demo --cfg long.yaml", "less than or equal to 1000000"),
    ("demo --cfg wide.yaml", "data.size in wide.yaml"),
    ("demo --cfg nan.yaml", "finetune.lr in nan.yaml: input should be greater than 0, got nan"),
    ("demo --cfg boom.yaml", "is not valid YAML: could not determine a constructor"),
    ("demo --cfg nul.yaml", "is not valid YAML"),
    ("finetune --finetune.eta 0", "finetune.eta"),
    ("finetune --finetune.eta -.5", "finetune.eta"),
    ("finetune --finetune.power 9", "finetune.power"),
    ("finetune --finetune.decisions 4", "finetune.decisions = 4, but 4 steps have one decision less"),
    ("finetune --finetune.clip_x0 0", "finetune.clip_x0"),
    ("finetune --finetune.lora_rank 0", "finetune.lora_rank"),
    ("finetune --finetune.minibatch 0", "finetune.minibatch"),
    ("finetune --finetune.microbatch 8", "did you mean 'finetune.minibatch'?"),
    ("finetune --finetune.kl -1", "finetune.kl"),
    ("finetune --compute.precision fp8", "'fp32', 'bf16' or 'fp16', got 'fp8'"),
    ("finetune --compute.max_batch 0", "compute.max_batch"),
    ("train-ddpm --compute.max_batch most", "compute.max_batch"),
    ("train-ddpm --evaluate.full_steps 500 --finetune.power 1.25", "500 steps (trailing, power 1.25) do not fit on T = 1000"),
    ("evaluate --evaluate.full_steps 1001", "do not fit on T = 1000"),
    ("evaluate --evaluate.n 32", "evaluate.n"),
    ("finetune --data.size 7", "size 7 cannot be halved"),
    ("finetune --data.size 16", "attention is asked for at size 4"),
    ("finetune --data.channels 2", "data.channels"),
    ("finetune --data.value_range 1", "data.value_range"),
    ("finetune --model.groups 7", "must be divisible by num_groups (7)"),
    # devices
    *gpu,
    ("evaluate --device tpu", "unknown device 'tpu'; expected auto, cpu"),
    # pictures
    ("train-ddpm --path.real_img nowhere", "nowhere is not a folder; give a folder of pictures, or one of digits, FashionMNIST"),
    ("train-ddpm --path.real_img empty", "there is no picture in empty"),
    ("train-ddpm --path.real_img texts", "skipped 2 of 2 files in texts: a.txt (not a picture that Pillow reads)"),
    ("train-ddpm --path.real_img file", "file is not a folder"),
    ("train-ddpm --path.real_img huge", "bomb.png (more than 89 million pixels)"),
    ("train-ddpm --path.real_img few", "1 pictures are too few for three splits"),
    ("finetune --path.real_img hundred", "the judge split of hundred has 25 pictures, expected at least 40; take more pictures"),
    ("train-reward --path.fake_img empty", "there is no picture in empty"),
    ("finetune --path.fake_img nowhere", "nowhere is not a folder"),
    ("finetune --path.fake_img few", "at least 10 pictures of each kind, got"),
    ("finetune --path.real_img hundred --data.value_range 1 0", "black < white"),
    ("train-ddpm --path.real_img CIFAR10 --data.root empty --data.download false", "CIFAR10 is not in"),
    # weights
    ("evaluate --path.ddpm nowhere.pth", "there is no weights file nowhere.pth"),
    ("evaluate --path.ddpm other.safetensors", "other.safetensors was made with model.channels = (16, 32), and the settings say (24, 48)"),
    ("evaluate --path.ddpm linear.safetensors", "was made with schedule.kind = linear (T = 1000), and the settings say cosine (T = 1000)"),
    ("evaluate --path.ddpm heads.safetensors", "was made with model.head_dim = 8"),
    ("evaluate --path.ddpm other.pth", "does not fit this UNet"),
    ("evaluate --path.ddpm cut.safetensors", "cut.safetensors is no weights file or is cut short"),
    ("evaluate --path.ddpm boom.pth", "boom.pth"),
    ("evaluate --path.ddpm zip.pth", "could run code, so it was not read"),
    ("evaluate --path.ddpm page.pth", "page.pth is no weights file"),
    ("evaluate --path.ddpm zero.pth", "zero.pth is no weights file or is cut short"),
    ("evaluate --path.ddpm long.safetensors", "long.safetensors is no weights file"),
    ("evaluate --path.ddpm nan.pth", "nan.pth"),
    ("evaluate --path.ddpm one.safetensors", "does not say what network"),
    ("evaluate --path.ddpm empty", "empty/config.json is missing"),
    ("finetune --path.rm nowhere.pt", "there is no weights file nowhere.pt"),
    ("finetune --path.rm one.safetensors", "nets.1."),
    ("finetune --path.rm alpha.safetensors", "alpha.safetensors was made with train_reward.alpha = 0.3"),
    ("train-ddpm --path.ddpm other.safetensors", "other.safetensors exists, and train-ddpm would replace it"),
    ("train-reward --path.rm one.safetensors", "one.safetensors exists, and train-reward would replace it"),
    ("train-ddpm --path.ddpm x.bin", "saved as .safetensors, .pth or .pt, got x.bin"),
    ("train-ddpm --path.ddpm file/x.pth", "could not write file/x.pth"),
    # run folders
    ("finetune --out finished", "finished is not empty; use --resume, --overwrite or another folder"),
    ("finetune --out used", "used is not empty"),
    ("finetune --out used --overwrite", "--overwrite replaces runs, and used is none"),
    ("finetune --out file", "file is a file; choose another folder"),
    ("finetune --out file/run", "cannot write into file/run"),
    ("train-ddpm --out /proc/run", "cannot write into /proc/run"),
    ("finetune --out nowhere --resume", "there is nothing to resume in nowhere"),
    ("finetune --out unborn --resume", "there is nothing to resume in unborn"),
    ("finetune --out finished --resume --overwrite", "give one of them"),
    ("finetune --out begun --resume --finetune.lr 1", "finetune.lr is 0.0001 in begun/config.yaml and 1.0 here"),
    ("finetune --out finished --resume --cfg digits", "a resumed run keeps its settings"),
    ("finetune --out cut --resume", "checkpoint.pt is no checkpoint or is cut short"),
    ("finetune --out nothing --resume", "nothing/checkpoint.pt is no checkpoint or is cut short"),
    ("finetune --out exploding --resume", "exploding/checkpoint.pt is no checkpoint or is cut short"),
    (["finetune", "--out", "a list", "--resume"], "a list/checkpoint.pt was written by another version"),
    ("finetune --out older --resume", "older/checkpoint.pt was written by another version"),
    ("finetune --out other --resume", "is a checkpoint of demo, not of finetune"),
    ("finetune --out elsewhere --resume", "the pictures in digits are not those that this run began with"),
    ("finetune --out dataless --resume", "are not those that this run began with"),
    ("finetune --out poisoned --resume", "holds NaN or infinity in run.policy.w"),
    ("finetune --out foreign --resume", "'run' is of another run"),
    ("finetune --out keyless --resume", "'run' is of another run"),
]


def no_judge(pictures, *args, **kwargs):
    "As refused as a real one, and at once."
    return train_judge(pictures) if len(pictures) < 40 else judge


@pytest.mark.parametrize("argv, said", COMMANDS)
def test_refused(argv, said, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    monkeypatch.setattr(jobs, "train_judge", no_judge)
    monkeypatch.setattr(jobs, "bar", lambda items, *args, **kwargs: items)
    monkeypatch.setattr(jobs, "save_config", lambda *args: pytest.fail("the run began"))
    before, argv = contents(here), argv.split() if isinstance(argv, str) else argv
    if "--device" not in argv: argv += ["--device", "cpu"]
    if "--out" not in argv: argv += ["--out", "new"]
    if "--cfg" not in argv and "--resume" not in argv: argv += ["--cfg", "smoke"]
    assert commands.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("ppo-ddpm: ") and err.count("\n") == 1, err
    assert said in err and "Traceback" not in err, err
    assert contents(here) == before


@pytest.mark.parametrize("call, error, said", CALLS, ids=[c[0] for c in CALLS])
def test_calls(call, error, said, here, monkeypatch):
    monkeypatch.chdir(here)
    before, weights = contents(here), [p.clone() for p in net.parameters()]
    with pytest.raises(error) as e: eval(call)
    text = str(e.value)
    assert said in text and len(text) < 700, text
    assert "\n" not in text or error is ValidationError, text # pydantic writes a few lines
    assert contents(here) == before and all(map(torch.equal, weights, net.parameters()))


def test_enough_rows(): assert len(CALLS) >= 60 and len(COMMANDS) >= 60


def test_names_with_spaces_and_umlauts(here, monkeypatch):
    "What is right works, whatever it is called."
    monkeypatch.chdir(here)
    odd = Path("Läufe, 第一 ü/a b")
    (odd / "Bilder ✓").mkdir(parents=True)
    for i in range(3): Image.effect_noise((9, 9), 50).save(odd / "Bilder ✓" / f"Bild {i} é.png")
    assert len(load_pictures(odd / "Bilder ✓")) == 3
    save_config(load_config("smoke"), odd / "läuft.yaml")
    options = commands.parse(["finetune", "--cfg", str(odd / "läuft.yaml"), "--out", str(odd / "neu")])
    assert options.cfg == load_config("smoke") and options.out == odd / "neu"
    for name in "gewichte ü.safetensors", "gewichte ü.pth": load_weights(net, save_weights(net, odd / name))
    save_grid(x, odd / "Gitter ✓.png")


def test_little_memory_was_needed():
    "Files that declare 10**15 bytes, or 60,000 x 60,000 pixels, were refused before memory was asked for; torch itself takes about half of this."
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < 1.5e9


def test_shown_with_debug():
    with pytest.raises(FileNotFoundError): commands.main(["demo", "--cfg", "digit", "--debug"])


def test_in_a_shell(here):
    "The exit code, one line on stderr, nothing on stdout."
    env = os.environ | dict(PYTHONPATH=str(Path(commands.__file__).parents[2]))
    command = [sys.executable, "-m", "ppo_ddpm", "demo", "--cfg", "type.yaml"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"ppo-ddpm: finetune\.num_epochs in type\.yaml: [^\n]*, got 'many'\n", done.stderr), done.stderr


def test_pictures_of_mixed_size_and_mode_are_brought_together(here):
    modes = [("L", (9, 8)), ("RGB", (20, 31)), ("RGBA", (8, 8)), ("P", (40, 10)), ("1", (16, 16)), ("I;16", (12, 12))]
    for i, (mode, size) in enumerate(modes): Image.new(mode, size).save(here / f"mixed/{i}.png")
    (here / "mixed/notes.txt").write_text("no picture")
    with pytest.warns(UserWarning) as said: pictures = load_pictures(here / "mixed", size=8, channels=3)
    assert any(re.match("skipped 1 of 7 files in .*notes.txt", str(w.message)) for w in said)
    assert pictures.x.shape == (6, 3, 8, 8)


def test_warnings_are_one_line(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    monkeypatch.setattr(commands, "run", lambda *args: commands.warnings.warn("skipped 1 of 7\nfiles"))
    assert commands.main(["evaluate", "--cfg", "smoke"]) == 0
    assert capsys.readouterr().err == "note: skipped 1 of 7 files\n"


@pytest.mark.parametrize("reward, error, said", [
    (lambda x: x, ValueError, "returned shape (8, 1, 8, 8), expected one number per picture, (8,)"),
    (lambda x: x.mean(), ValueError, "returned shape (), expected one number per picture"),
    (lambda x: torch.full((len(x),), torch.nan), ValueError, "returned NaN or infinity for 8 of 8 pictures"),
    (lambda x: [1.] * len(x), TypeError, "returned list, expected a tensor"),
])
def test_rewards_that_cannot_be_used(reward, error, said):
    torch.manual_seed(0)
    net, ink, cosine = UNet(channels=(8, 16)), lambda x: x.mean((1, 2, 3)), NoiseSchedule("cosine")
    before = [p.clone() for p in net.parameters()]
    run = Finetuning(net, Finetune(num_epochs=1, episodes_per_epoch=8, minibatch=8))
    with pytest.raises(error) as e: list(finetune(run, DDIM(cosine, 4), reward, (1, 8, 8)))
    assert said in str(e.value) and "\n" not in str(e.value)
    assert all(map(torch.equal, before, net.parameters())) and run.epoch == 0
    with pytest.raises(ValueError, match="no density"): list(finetune(run, DDIM(cosine, 4, eta=0), ink, (1, 8, 8)))


def test_pickles_are_not_executed(here): assert not (here / "executed").exists()
