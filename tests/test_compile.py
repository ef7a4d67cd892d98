"Compiled networks: the same numbers, ratios that start at 1, and no compilation after the first round."
import copy, functools

import pytest
import torch

from ppo_ddpm.core import Compute, Finetune, TrainDDPM, seeded
from ppo_ddpm.data import Pictures
from ppo_ddpm.ddpm import Pretraining, train_ddpm
from ppo_ddpm.finetune import Finetuning, finetune
from ppo_ddpm.sampling import DDIM, sample
from ppo_ddpm.schedule import NoiseSchedule
from ppo_ddpm.unet import Engine, UNet

SCHEDULE = NoiseSchedule("cosine", 100)


def network():
    torch.manual_seed(0)
    net = UNet(channels=(8, 16))
    for p in net.parameters(): p.data += .05 * torch.randn(p.shape, generator=seeded(p.numel()))      # as if it had learned something
    return net


@pytest.fixture
def compiled(monkeypatch):
    "Counts what torch.compile compiles, forward and backward, without the wait for machine code."
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def rounds(compute, look=lambda run: None):
    "Fine-tune with sizes that divide nothing, a look at the average after every round, and a last minibatch that is smaller."
    run = Finetuning(network(), Finetune(num_epochs=3, episodes_per_epoch=11, microbatch=4), compute)
    return run, [(rec, look(run)) for rec in finetune(run, DDIM(SCHEDULE, 4), lambda x: x.mean((1, 2, 3)), (1, 8, 8))]


def test_fine_tuning_compiles_once(compiled):
    def look(run):
        sample(run.average, DDIM(SCHEDULE, 3), torch.randn(17, 1, 8, 8, generator=seeded(1)), seeded(2))
        return compiled.frame_count
    run, recs = rounds(Compute(compile=True), look)
    counts = [n for _, n in recs]
    assert counts[0] == counts[-1] <= 3, counts                 # at most one program for policy, reference and average each, from the first round on
    assert max(rec["ratio_error"] for rec, _ in recs) < 1e-4
    assert abs(recs[0][0]["kl"]) > 0                            # the policy moved, the reference did not
    plain, same = rounds(Compute())
    for (a, _), (b, _) in zip(recs, same): assert abs(a["reward"] - b["reward"]) < 1e-4 and abs(a["kl"] - b["kl"]) < 1e-3 * (1 + b["kl"])


def test_another_shape_would_be_noticed(compiled):
    "The count above can fail: without pieces of one size, every size of batch is compiled."
    run = torch.compile(network(), dynamic=False)
    for n in 3, 4: run(torch.zeros(n, 1, 8, 8), torch.zeros(n, dtype=torch.long))
    assert compiled.frame_count == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pretraining_compiles_once(compiled, precision):
    pictures = Pictures((torch.rand(60, 1, 8, 8, generator=seeded(0)) * 255).byte())
    def losses(compute): return [rec["loss"] for rec in train_ddpm(Pretraining(network(), TrainDDPM(num_steps=6, batch_size=10), compute), SCHEDULE, pictures, every=2)]
    got = losses(Compute(compile=True, max_batch=4, precision=precision))
    assert compiled.frame_count == 1
    assert torch.tensor(got).allclose(torch.tensor(losses(Compute())), rtol=1e-4 if precision == "fp32" else .05)


def test_machine_code():
    "The real compiler, on a network of two convolutions so that it does not take long; ratios start at 1 in bf16, too."
    class Small(torch.nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1)
        def forward(self, x, t): return self.b(torch.nn.functional.silu(self.a(x) + t.view(-1, 1, 1, 1) / 100))
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x, t = Small(), torch.randn(6, 1, 8, 8, generator=seeded(3)), torch.arange(6)
    with torch.no_grad(): assert torch.allclose(Engine(copy.deepcopy(net), Compute(compile=True), 4)(x, t), net(x, t), atol=1e-5)
    run = Finetuning(net, Finetune(num_epochs=2, episodes_per_epoch=8, microbatch=4), Compute(compile=True, precision="bf16"))
    recs = list(finetune(run, DDIM(SCHEDULE, 3), lambda x: x.mean((1, 2, 3)), (1, 8, 8)))
    assert max(r["ratio_error"] for r in recs) < 1e-4
