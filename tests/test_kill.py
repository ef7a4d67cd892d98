"""A run that is killed, stopped, misled by NaN or out of disk goes on as if nothing had happened, bit for bit.

Real processes are killed at moments that a fixed seed chooses, some of them inside the writing of a checkpoint. PPO_DDPM_KILLS=20 asks for more than the
four of CI; `pytest -n 0 -s` prints the moments."""
import copy, functools, json, math, os, random, shutil, signal, subprocess, sys, time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import ppo_ddpm.judge as judging
from ppo_ddpm.data import Pictures, seeded
from ppo_ddpm.ddpm import Pretraining, TrainDDPM, train_ddpm
from ppo_ddpm.engine import checkpoints, commands, jobs
from ppo_ddpm.engine.board import save_grid
from ppo_ddpm.engine.checkpoints import not_finite, whole_rounds
from ppo_ddpm.engine.weights import save_weights
from ppo_ddpm.finetune import Finetune, Finetuning, finetune
from ppo_ddpm.realfake import RealFake, TrainReward
from ppo_ddpm.reward import RewardTraining, refresh_reward, train_reward
from ppo_ddpm.sampling import DDIM
from ppo_ddpm.schedule import NoiseSchedule
from ppo_ddpm.unet import UNet

KILLS = int(os.environ.get("PPO_DDPM_KILLS", 4))
TIMES = ("seconds", "images/s", "left_s")                                           # differ from run to run
ORDER = ["finetune", "train-ddpm", "finetune", "train-reward"]                                   # whose turn it is to be killed
WEIGHTS = {"finetune": "policy", "train-ddpm": "ddpm", "train-reward": "reward"}
# the command as the shell runs it, but with a judge that is trained for a moment only and a checkpoint after every round
PROGRAM = """
import sys
from functools import partial
from ppo_ddpm.engine import checkpoints, commands, jobs
jobs.Saver = partial(checkpoints.Saver, pause=0)
jobs.train_judge = partial(jobs.train_judge, n_steps=20)
sys.exit(commands.main())
"""


@pytest.fixture(scope="module", autouse=True)
def quick():
    "The same in this process."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(jobs, "train_judge", functools.partial(judging.train_judge, n_steps=20))
        m.setattr(jobs, "Saver", functools.partial(checkpoints.Saver, pause=0))
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    "A few pictures and a tiny network: a round takes a moment, so that the time goes into what is tested."
    here, rounds = tmp_path_factory.mktemp("kill"), 6 + 2 * KILLS
    x = (torch.rand(200, 8, 8, generator=seeded(0, "pictures")) * 255).byte()
    for i in range(200):
        (here / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i].numpy()).save(here / "pictures" / "ab"[i % 2] / f"{i}.png")
    cfg = dict(device="cpu", path=dict(real_img=str(here / "pictures")), model=dict(channels=[8, 16]), train_ddpm=dict(num_steps=5 * rounds, batch_size=8),
               train_reward=dict(num_img=64, num_noise=8, num_corrupt=16, batch_size=16, num_epochs=rounds if KILLS > 4 else 8, n_models=1),
               finetune=dict(num_epochs=rounds, episodes_per_epoch=8, minibatch=4, refresh_steps=2), evaluate=dict(n=40, full_steps=4, every=4))
    (here / "x.yaml").write_text(yaml.safe_dump(cfg))
    return here / "x.yaml"


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    "Folders of runs that nothing disturbed, made when asked for."
    made = {}
    def get(command):
        if command not in made:
            made[command] = tmp_path_factory.mktemp("whole") / command
            assert commands.main(go_on(command, settings, made[command])) == 0
        return made[command]
    return get


def metrics(out):
    "All numbers but those that are times."
    def timeless(v): return {k: timeless(x) for k, x in v.items() if k not in TIMES} if isinstance(v, dict) else [timeless(x) for x in v] if isinstance(v, list) else v
    return timeless(json.loads((out / "metrics.json").read_text()))


def curves(out):
    "Steps and values of each scalar as TensorBoard reads them, and the tags of the texts."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    acc = EventAccumulator(str(out)); acc.Reload()
    return {tag: [(e.step, e.value if tag not in TIMES else 0) for e in acc.Scalars(tag)] for tag in acc.Tags()["scalars"]}, {t: len(acc.Tensors(t)) for t in acc.Tags()["tensors"]}


def assert_same(a, b, command):
    "Are two runs the same run?"
    x, y = (load_file(o / f"{WEIGHTS[command]}.safetensors") for o in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert metrics(a) == metrics(b)
    assert curves(a) == curves(b)
    assert not [p for p in (*a.iterdir(), *b.iterdir()) if ".tmp" in p.name]


FIRST = 4                                                                                        # checkpoints of the reward model before fine-tuning begins

def go_on(command, settings, out):
    "Arguments that start a run, or go on with it."
    if (out / "config.yaml").exists(): return [command, "--resume", "--out", str(out)]
    return [command, "--cfg", str(settings), "--out", str(out), *(["--train_reward.num_epochs", str(FIRST)] if command == "finetune" else []), *(["--overwrite"] if out.exists() else [])]


def start(argv):
    "A run that hears Ctrl-C even where the tests themselves were started by `nohup pytest &`, which ignores it."
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=hear)


def wait_for_checkpoints(process, out, n):
    "Until `n - 1` new checkpoints are seen, and then the temporary file of another."
    def version(): return [p.stat().st_mtime_ns for p in out.glob("checkpoint.pt")]
    old, seen, left = version(), [], set(out.glob(".checkpoint.*.tmp.pt"))
    while process.poll() is None and len(seen) < n - 1:
        if (now := version()) and now != old and now not in seen: seen.append(now)
        time.sleep(.001)
    while process.poll() is None and not set(out.glob(".checkpoint.*.tmp.pt")) - left: time.sleep(.0005)


def kill(argv, out, when, rng, first=0):
    "Start a run and kill it, not before its `first` checkpoints are written; returns what happened, in words."
    old, n, pause = set(out.glob(".checkpoint.*.tmp.pt")), first + rng.randrange(1, 4), rng.random()
    process = start(argv)
    if when == "while it starts": time.sleep(6 * pause)
    else:
        wait_for_checkpoints(process, out, n)
        if when == "between checkpoints": time.sleep(.1 * pause)
    process.kill()
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, f"it ended before it was killed: {said}"
    inside = bool(set(out.glob(".checkpoint.*.tmp.pt")) - old)
    return f"{when}, {n} checkpoints, pause {pause:.2f}: " + ("inside the writing of a checkpoint" if inside else "elsewhere")


@pytest.mark.parametrize("command", WEIGHTS)
def test_killed(command, settings, whole, tmp_path):
    rng, out, what = random.Random(f"kills of {command}"), tmp_path / "a run", Counter()
    whens = ["inside a checkpoint", "between checkpoints", "while it starts", "inside a checkpoint"]
    for i in range(KILLS):
        if ORDER[i % 4] != command: continue
        happened = kill(go_on(command, settings, out), out, whens[i] if i < 4 else rng.choice(whens), rng, FIRST * (command == "finetune" and not out.exists()))
        what[happened.split(": ")[1]] += 1
        at = torch.load(out / "checkpoint.pt", weights_only=True) if (out / "checkpoint.pt").exists() else {}     # whole, whenever it was
        print(f"kill {i + 1} of {KILLS}, {command}: {happened}; {len(at.get('history', []))} + {len(at.get('reward_history', []))} records are safe")
    assert commands.main(go_on(command, settings, out)) == 0
    print(f"{command}: {dict(what)}")
    assert_same(whole(command), out, command)


def test_ctrl_c_finishes_the_round_and_saves(settings, whole, tmp_path):
    out = tmp_path / "a run"
    process = start(go_on("finetune", settings, out))
    while process.poll() is None and not (out / "before.png").exists(): time.sleep(.001)
    wait_for_checkpoints(process, out, FIRST + 2)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert "stopping at the end of this round" in said and f"go on with ppo-ddpm finetune --resume --out '{out}'" in said and "Traceback" not in said
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    scalars, _ = curves(out)
    done = state["run"]["epoch"] if "run" in state else 0
    assert [s for s, _ in scalars.get("reward", [])] == list(range(1, done + 1))            # nothing that was logged is lost
    assert commands.main(go_on("finetune", settings, out)) == 0
    assert_same(whole("finetune"), out, "finetune")


# --- the loops in Python -----------------------------------------------------------------------------------------------------
PICTURES = Pictures((torch.rand(60, 1, 8, 8, generator=seeded(0)) * 255).byte())


def loop_of(name):
    "A loop, the states it changes, and the optimiser whose step can be disturbed."
    torch.manual_seed(0)
    net, schedule = UNet(channels=(8, 16)), NoiseSchedule("cosine", 100)
    paid = RewardTraining((1, 8, 8), 256, TrainReward(num_epochs=4, batch_size=8, n_models=1))
    data = RealFake(PICTURES.unit(), PICTURES.unit().flip(0) / 2, paid.cfg)
    if name == "train_ddpm":
        run = Pretraining(net, TrainDDPM(num_steps=8, batch_size=4))
        return lambda: whole_rounds(train_ddpm(run, schedule, PICTURES, every=2), run), [run], run.opt
    if name == "train_reward": return lambda: whole_rounds(train_reward(paid, data), paid), [paid], paid.opt
    run = Finetuning(net, Finetune(num_epochs=4, episodes_per_epoch=8, minibatch=4))
    refresh = lambda x0: refresh_reward(paid, data, x0, 2)
    loop = lambda: whole_rounds(finetune(run, DDIM(schedule, 3), lambda x: paid.model(x), (1, 8, 8), refresh), run, paid, data)
    return loop, [run, paid, data], run.opt if name == "finetune" else paid.opt


def equal(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


LOOPS = ["train_ddpm", "train_reward", "finetune", "refresh_reward"]                      # the last: disturbed while fine-tuning refreshes its reward

@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_is_interrupted_goes_on(name, monkeypatch):
    "KeyboardInterrupt in the loop's body, and in the middle of an update: the states are those of the last finished round, and going on is exact."
    loop, states, opt = loop_of(name)
    after = [copy.deepcopy([s.state_dict() for s in states])] + [copy.deepcopy([s.state_dict() for s in states]) for _ in loop()]
    loop, states, opt = loop_of(name)
    def now(): return [s.state_dict() for s in states]
    with pytest.raises(KeyboardInterrupt):
        for i, _ in enumerate(loop(), 1):
            if i == 2: raise KeyboardInterrupt
    assert equal(now(), after[2])
    step, left = opt.step, [2]
    def disturbed():
        step(); left[0] -= 1
        if not left[0]: raise KeyboardInterrupt                                  # the weights have moved, their average has not
    opt.step = disturbed
    with pytest.raises(KeyboardInterrupt):
        for _ in loop(): pass
    assert equal(now(), after[2])
    for _ in loop(): pass
    assert equal(now(), after[4])


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("at", ["first", "last"])
def test_nan_is_refused(name, at):
    "Weights that become NaN in the first optimiser step of the third round, or in its last one, after which nothing measures a loss."
    loop, states, opt = loop_of(name)
    rounds, step = loop(), opt.step
    for _ in range(2): next(rounds)
    good, n = copy.deepcopy([s.state_dict() for s in states]), dict(train_reward=math.ceil(54 / 4)).get(name, 2)
    left = [1 if at == "first" else n]
    def poisoned():
        step(); left[0] -= 1
        if not left[0]:
            with torch.no_grad(): opt.param_groups[0]["params"][0][0] = math.nan
    opt.step = poisoned
    with pytest.raises(FloatingPointError) as e: next(rounds)
    assert "round 3 of this run was taken back" in str(e.value) and "lower the learning rate" in str(e.value) and "\n" not in str(e.value)
    assert equal([s.state_dict() for s in states], good) and not_finite(good) is None


@pytest.mark.parametrize("command, option", [("train-ddpm", "--train_ddpm.lr"), ("train-reward", "--train_reward.lr"), ("finetune", "--finetune.lr")])
def test_no_file_holds_nan(command, option, settings, tmp_path, capsys):
    out = tmp_path / "wild"
    assert commands.main([command, "--cfg", str(settings), option, "1e30", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("ppo-ddpm: round") and "was taken back" in err and "lower" in err, err
    assert not list(out.glob("*.safetensors"))
    if (out / "checkpoint.pt").exists(): assert not_finite(torch.load(out / "checkpoint.pt", weights_only=True)) is None


def test_a_policy_that_does_not_repeat_itself():
    "Stops before its first update counts, and says why; a switch goes on."
    class Restless(torch.nn.Module):
        def __init__(self): super().__init__(); self.net = torch.nn.Conv2d(1, 1, 1)
        def forward(self, x, t): return self.net(x) + .01 * torch.randn_like(x)
    torch.manual_seed(0)
    run = Finetuning(Restless(), Finetune(num_epochs=1, episodes_per_epoch=8, minibatch=4))
    def loop(**k): return list(whole_rounds(finetune(run, DDIM(NoiseSchedule("cosine"), 3), lambda x: x.mean((1, 2, 3)), (1, 8, 8)), run, **k))
    before = copy.deepcopy(run.state_dict())
    with pytest.raises(RuntimeError, match="ratios were off 1 by .* the policy does not repeat itself.* or raise finetune.ratio_tolerance"): loop(tolerance=.01)
    assert equal(run.state_dict(), before)
    assert len(loop()) == 1


# --- the disk ----------------------------------------------------------------------------------------------------------------
@contextmanager
def files_up_to(n_bytes):
    "No file may become larger; a write that goes on fails as on a full disk."
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))                  # Python ignores the signal that comes with it
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.png"])
def test_a_full_disk_leaves_the_old_file(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"old")
    write = {".png": lambda: save_grid(torch.rand(64, 1, 8, 8) * 2 - 1, path, scale=8)}
    with files_up_to(1000), pytest.raises(OSError) as e: write.get(path.suffix, lambda: save_weights(UNet(channels=(8, 16)), path))()
    assert str(e.value).startswith(f"cannot write {path} (") and "what was there is unchanged" in str(e.value)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_full_disk_leaves_the_last_checkpoint(settings, whole, tmp_path, capsys):
    "A resumed run that may not write a checkpoint says so; with room again it goes on."
    out = tmp_path / "full"
    args, n = go_on("finetune", settings, out), [0]
    with pytest.MonkeyPatch.context() as m:
        def log(writer, rec, prefix=""):
            n[0] += prefix == ""
            if n[0] == 3: raise KeyboardInterrupt
            return real(writer, rec, prefix)
        real = jobs.log_record
        m.setattr(jobs, "log_record", log)
        assert commands.main(args) == 130
    old = (out / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); " + PROGRAM
    done = subprocess.run([sys.executable, "-c", limited, *go_on("finetune", settings, out)], capture_output=True, text=True)
    assert done.returncode == 2 and f"ppo-ddpm: cannot write {out}/checkpoint.pt (" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (out / "checkpoint.pt").read_bytes() == old and not list(out.glob(".*.tmp*"))
    assert commands.main(go_on("finetune", settings, out)) == 0
    assert_same(whole("finetune"), out, "finetune")


@pytest.fixture
def tiny_disk(tmp_path):
    disk = tmp_path / "disk"; disk.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True).returncode: pytest.skip("this test may not mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small(settings, tiny_disk, capsys):
    assert commands.main(["train-ddpm", "--cfg", str(settings), "--out", str(tiny_disk / "run")]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("ppo-ddpm: cannot write") and "no space left" in err and "Traceback" not in err, err
    assert not (tiny_disk / "run/checkpoint.pt").exists() and not list((tiny_disk / "run").glob(".*.tmp*"))
