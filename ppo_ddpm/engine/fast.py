"""Half precision, compilation, pieces that fit into memory, and low-rank corrections, around the same loops."""
import copy
import math

import psutil
import torch
from torch import Tensor, nn

from ppo_ddpm.engine.settings import Compute

HALF = dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16)

class Engine:
    "A network as a policy that runs fast: `engine(x, t) -> eps`, float32 whatever goes on inside."
    def __init__(self,
        model:nn.Module,   # `model(x, t) -> eps`, on its device
        compute=Compute(),
        size:int=None,     # Pictures in every piece, where one program must run on one shape
    ):
        self.model, self.size, self.low = model, size, HALF[compute.precision]
        self.most = compute.max_batch
        gpu = next(model.parameters()).device.type != "cpu"
        self.exact = compute.compile or gpu or self.low is not None # else rounding depends on the shape
        self.run = torch.compile(model, dynamic=False) if compute.compile else model

    def __getattr__(self, name): return getattr(self.model, name) # parameters, state_dict, ...

    @property
    def batch(self): # Most pictures in the network at once; None: no limit
        return self.size if self.exact and self.size else self.most

    def __call__(self, x, t): # (B, ...), (B,) -> shape of x
        "The network's output, piece by piece."
        n = self.batch or len(x)
        return torch.cat([self.piece(*p) for p in zip(x.split(n), t.split(n))])

    def piece(self, x, t):
        n, grad = len(x), torch.is_grad_enabled()
        if self.exact and self.size and n < self.size: # fill it up, so that the shape is always the same
            i = torch.arange(self.size, device=x.device) % n
            x, t = x[i], t[i]
        half = torch.autocast(x.device.type, self.low, enabled=self.low is not None)
        with torch.set_grad_enabled(grad or self.exact), half: eps = self.run(x, t)
        return (eps if grad else eps.detach())[:n].float()

def piece_size(
    n_steps:int,    # Network passes of an episode when drawing
    n_episodes:int, # Episodes of a round
    n_pairs:int,    # Pairs that a round learns from
    minibatch:int,  # Pairs per optimiser step
    most=None,      # Largest piece; None: the larger of episodes and minibatch
)->int:             # Pictures in a piece
    "The size of pieces that wastes the fewest passes."
    most = min(most or math.inf, max(n_episodes, minibatch))
    step = 8 if most >= 32 else 1 # as kernels like it
    filled = lambda n, size: math.ceil(n / size) * size
    def work(size): # learning is a forward, two backward and a reference pass
        drawn, learned = filled(n_episodes, size), filled(minibatch, size) * n_pairs / minibatch
        return n_steps * drawn + 4 * learned
    return min(range(most - most % step, max(1, most // 4) - 1, -step), key=work)

class PieceStep:
    "`gradient_step` in pieces and with a scaled loss; gradients do not depend on the pieces."
    def __init__(self,
        compute=Compute(),
        device="cpu",
        batch=None,        # Most items at once; None: all
        scale=2.**8,       # First factor of the loss in fp16
    ):
        self.batch = batch
        kind = torch.device(device).type
        self.scaler = torch.amp.GradScaler(kind, init_scale=scale, enabled=compute.precision == "fp16")

    def state_dict(self): return self.scaler.state_dict()
    def load_state_dict(self, state): self.scaler.load_state_dict(state) if state else None

    def sums(self, model, rows_of, batch): # -> (S,), gradients in place
        "Rows of a batch, summed, and the gradient of their mean loss."
        total = 0
        for i in batch.split(self.batch or len(batch)):
            rows = rows_of(i)
            self.scaler.scale(rows[:, 0].sum() / len(batch)).backward()
            total = total + rows.detach().sum(0)
        return total

    def __call__(self, model, opt, rows_of, batch, max_norm=1.)->Tensor: # As `gradient_step`
        opt.zero_grad()
        total = self.sums(model, rows_of, batch)
        self.scaler.unscale_(opt)
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        self.scaler.step(opt)
        self.scaler.update()
        if self.scaler.is_enabled(): norm = norm.where(norm.isfinite(), 0) # the step was left out
        return torch.cat([total / len(batch), norm[None]])

def recompute_blocks(model:nn.Module): # A `UNet`; changed in place
    "Keep only what goes in and out of blocks for the backward pass ([Chen et al. 2016](https://arxiv.org/abs/1604.06174))."
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from ppo_ddpm.layers import DownBlock, MidBlock, UpBlock
    blocks = (DownBlock, MidBlock, UpBlock)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, blocks))

def kept_bytes(
    model,    # `model(x, t) -> eps`
    x:Tensor, # Pictures, shape (B, C, H, W)
    t:Tensor, # Times, shape (B,)
)->int:
    "What a forward pass keeps for its backward pass, besides the weights."
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    def keep(v):
        kept[v.untyped_storage().data_ptr()] = v # held on to, so that no address is used twice
        return v
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v): model(x, t)
    return sum(v.untyped_storage().nbytes() for at, v in kept.items() if at not in own)

def fitting_batch(
    model:nn.Module, # On its device
    shape:tuple,     # Of one picture, (C, H, W)
    precision="fp32",
    share=0.6,       # How much of the free memory may be used
)->int:              # A power of two
    "How many pictures fit into memory with a backward pass to come."
    device = next(model.parameters()).device
    gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if gpu else psutil.virtual_memory().available
    engine = Engine(model, Compute(precision=precision))
    def need(n): # bytes
        x, t = torch.zeros(n, *shape, device=device), torch.zeros(n, dtype=torch.long, device=device)
        return kept_bytes(engine, x, t)
    each = (need(4) - need(2)) / 2
    return 2 ** max(0, int(math.log2(max(1, share * free / each))))

def add_lora(
    policy:nn.Module, # Every linear layer and convolution gets a correction; all else is frozen
    rank:int,
):
    "Low-rank corrections, zero at first ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)), in place."
    try: from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("finetune.lora_rank needs peft; pip install 'ppo_ddpm[lora]'") from None
    layers = [n for n, m in policy.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), policy)

def merge_lora(
    policy:nn.Module, # With corrections, or without
)->nn.Module:         # A copy of the plain network, with the corrections in its layers
    "What is to be saved."
    plain = copy.deepcopy(policy)
    for name, m in list(plain.named_modules()):
        if not hasattr(m, "lora_A"): continue
        m.merge()
        plain.set_submodule(name, m.get_base_layer())
    return plain
