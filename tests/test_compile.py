"Compiled networks: ratios that start at 1, and one program for drawing and learning at every size."
import copy, functools

import pytest
import torch

from ppo_ddpm.data import seeded
from ppo_ddpm.engine.fast import Engine, PieceStep
from ppo_ddpm.engine.settings import Compute
from ppo_ddpm.finetune import Finetune, Finetuning, finetune
from ppo_ddpm.sampling import DDIM, sample
from ppo_ddpm.schedule import NoiseSchedule
from ppo_ddpm.unet import UNet

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


def rounds(compute, size, look=lambda average: None, episodes=11):
    "Fine-tune with sizes that divide nothing, a look at the average after every round, and a last minibatch that is smaller."
    net = network()
    reference = copy.deepcopy(net).requires_grad_(compute.compile)
    run = Finetuning(net, Finetune(num_epochs=3, episodes_per_epoch=episodes, minibatch=4), reference)
    average, run.policy, run.reference = (Engine(m, compute, size) for m in (run.ema.model, run.policy, reference))
    loop = finetune(run, DDIM(SCHEDULE, 4), lambda x: x.mean((1, 2, 3)), (1, 8, 8), step=PieceStep(compute, batch=run.policy.batch))
    return [(rec, look(average)) for rec in loop]


@pytest.mark.parametrize("size, episodes", [(8, 11), (12, 12), (6, 6)])      # pieces that are filled up, and pieces that are full as they come
def test_fine_tuning_compiles_once(compiled, size, episodes):
    def look(average):
        sample(average, DDIM(SCHEDULE, 3), torch.randn(17, 1, 8, 8, generator=seeded(1)), seeded(2))
        return compiled.frame_count
    found = rounds(Compute(compile=True), size, look, episodes)
    counts = [n for _, n in found]
    assert counts[0] == counts[-1] <= 3, counts                 # one program each for policy, reference and average, from the first round on
    assert max(rec["ratio_error"] for rec, _ in found) < 1e-4
    for (a, _), (b, _) in zip(found, rounds(Compute(), size, episodes=episodes)): assert abs(a["reward"] - b["reward"]) < 1e-4


def test_another_shape_would_be_noticed(compiled):
    "The count above can fail: without pieces of one size, every size of batch is compiled."
    run = torch.compile(network(), dynamic=False)
    for n in 3, 4: run(torch.zeros(n, 1, 8, 8), torch.zeros(n, dtype=torch.long))
    assert compiled.frame_count == 2


def test_machine_code():
    "The real compiler, on a network of two convolutions so that it does not take long; ratios start at 1 in bf16, too."
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1)
        def forward(self, x, t): return self.b(torch.nn.functional.silu(self.a(x) + t.view(-1, 1, 1, 1) / 100))
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x, t = Small(), torch.randn(6, 1, 8, 8, generator=seeded(3)), torch.arange(6)
    with torch.no_grad(): assert torch.allclose(Engine(copy.deepcopy(net), Compute(compile=True), 4)(x, t), net(x, t), atol=1e-5)
    compute = Compute(compile=True, precision="bf16")
    run = Finetuning(net, Finetune(num_epochs=2, episodes_per_epoch=8, minibatch=4))
    run.policy, run.reference = Engine(run.policy, compute, 8), Engine(run.reference.requires_grad_(True), compute, 8)
    loop = finetune(run, DDIM(SCHEDULE, 3), lambda x: x.mean((1, 2, 3)), (1, 8, 8), step=PieceStep(compute, batch=8))
    assert max(rec["ratio_error"] for rec in loop) < 1e-4
