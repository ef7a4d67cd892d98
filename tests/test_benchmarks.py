"""The benchmarks run, keep what they print, and refuse contestants that do not compute the same thing. Numbers are not judged here."""
import json, subprocess, sys
from pathlib import Path

import pytest
import torch

folder = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(folder))

import common, epoch_cost, roofline
from ppo_ddpm.engine.settings import Compute
from ppo_ddpm.sampling import DDIM


def table(text):
    "The cells of the tables of a page, row by row."
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|") and "---" not in line]


@pytest.mark.parametrize("script", ["epoch_cost", "sampling", "growth", "epoch_overhead", "roofline", "free_solvers"])
def test_quick(script, tmp_path):
    options = ["--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, str(folder / f"{script}.py"), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (kept,), page = json.loads((tmp_path / f"{script}.json").read_text()), (tmp_path / f"{script}.md").read_text()
    assert kept["quick"] and {"hardware", "threads", "torch", "python", "commit", "date"} <= set(kept["machine"])
    assert table(page) == table(done.stdout) == [kept["header"], *[list(map(str, row)) for row in kept["rows"]]]
    for m in kept.get("memory", []): assert m["bytes"] > 0
    timed = [r for r in kept["results"] if "wall" in r]
    assert timed or script == "free_solvers"
    for r in timed: assert len(r["wall"]) == len(r["cpu"]) >= 2 and min(r["wall"]) > 0


def test_seeds_quick(tmp_path):
    "One seed and its control; a second call finds them stored, and only writes the tables."
    command = [sys.executable, str(folder / "digits_seeds.py"), "--quick", "--seeds", "0", "--control", "0", "--threads", "1", "--out", str(tmp_path)]
    done = [subprocess.run(command, capture_output=True, text=True, timeout=500) for _ in range(2)]
    assert done[0].returncode == done[1].returncode == 0, done[0].stderr[-2000:] + done[1].stderr[-2000:]
    main, control = json.loads((tmp_path / "digits_seeds.json").read_text())
    assert (main["kind"], control["kind"]) == ("main", "control") and main["before"]["fd"] == control["before"]["fd"]
    assert {"before", "after", "full_steps", "floor", "again", "history", "marks"} <= set(main) and main["again"][-1][0] == main["last_epoch"]
    assert done[1].stdout.count("stored already") == 2 and "| goal | measured | reached |" in done[1].stdout


def test_a_run_replaces_its_like_and_stands_beside_others(tmp_path, capsys):
    args = common.begin(common.options("x", rounds=5), ["--out", str(tmp_path)])
    for value in 1, 2: common.report(args, "x", "X", "About.", ["", "n"], [["a", value]])
    args.device, args.precision = "cpu", "bf16"
    common.report(args, "x", "X", "About.", ["", "n"], [["a", 3]], goals=[common.goal("at least 2", "3", True)])
    assert [r["rows"][0][1] for r in json.loads((tmp_path / "x.json").read_text())] == [2, 3]
    page = (tmp_path / "x.md").read_text()
    assert page.count("Made by `python benchmarks/x.py`") == 2 and "- at least 2. Measured: 3, reached." in page


def test_what_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"): common.begin(common.options("x", rounds=5), ["--rounds", "3"])
    assert "--rounds must be at least 5, got 3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"): epoch_cost.main(["--help"])
    assert "python benchmarks/epoch_cost.py --device gpu" in capsys.readouterr().out
    if torch.cuda.is_available(): return
    with pytest.raises(SystemExit, match="2"): roofline.main([])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "found no CUDA device" in err


class OtherPictures(epoch_cost.Flat):
    def rollout(self, noise): return super().rollout(noise) * 1.001


class OtherLoss(epoch_cost.Flat):
    def learn(self, advantage): return super().learn(advantage * 1.1)


class OtherGradient(epoch_cost.Flat):
    "Takes a step that is a twentieth too short."
    def learn(self, advantage):
        before = [p.detach().clone() for p in self.net.parameters()]
        loss = super().learn(advantage)
        with torch.no_grad():
            for p, b in zip(self.net.parameters(), before): p.lerp_(b, .05)
        return loss


@pytest.mark.parametrize("wrong, what", [(OtherPictures, "pictures"), (OtherLoss, "loss|gradient"), (OtherGradient, "gradient"), (None, None)])
def test_a_planted_contestant_is_found(wrong, what):
    ddim, net = DDIM(common.digits_schedule(), 3), common.TINY
    build = lambda kind: lambda: kind(common.our_unet(net), ddim, 4, Compute())
    makers = {"original": build(epoch_cost.Original), "ours": build(wrong or epoch_cost.Flat)}
    if wrong is None: assert max(epoch_cost.check(makers, 4, (1, 8, 8), ddim, "cpu").values()) < 1e-2
    else:
        with pytest.raises(SystemExit, match=f"do not compute the same ({what}): ours by .* from original"): epoch_cost.check(makers, 4, (1, 8, 8), ddim, "cpu")
