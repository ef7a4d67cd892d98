"""Several processes, one learning curve: each does its share of the work, and all take the same steps."""
import torch

from ppo_ddpm.engine.fast import PieceStep

def share(
    n:int,       # Items to deal out
    accelerator, # accelerate's `Accelerator`
)->slice:        # The part of this process; may be empty
    "Deal items out to processes, in order."
    here, of = accelerator.process_index, accelerator.num_processes
    return slice(n * here // of, n * (here + 1) // of)

class Shared:
    "A policy whose batches are drawn by all processes together, and learned from by each alone."
    def __init__(self, policy, accelerator): self.policy, self.accelerator = policy, accelerator
    def __getattr__(self, name): return getattr(self.policy, name)

    def __call__(self, x, t):
        if torch.is_grad_enabled(): return self.policy(x, t)
        out, mine = torch.zeros_like(x), share(len(x), self.accelerator)
        if len(x[mine]): out[mine] = self.policy(x[mine], t[mine])
        return self.accelerator.reduce(out, "sum") # zeros where the others are at work

class SharedStep(PieceStep):
    "An optimiser step on a batch that is dealt out to processes."
    def __init__(self, accelerator, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator = accelerator

    def sums(self, model, rows_of, batch):
        mine = batch[share(len(batch), self.accelerator)]
        weight = 1 / len(batch) if len(mine) else 0. # no item: take one, and count it for nothing
        total = 0
        for i in (mine if len(mine) else batch[:1]).split(self.batch or len(batch)):
            rows = rows_of(i)
            self.scaler.scale(rows[:, 0].sum() * weight).backward()
            total = total + rows.detach().sum(0) * bool(weight)
        params = [p for p in model.parameters() if p.requires_grad]
        joint = torch.cat([*(p.grad.flatten() for p in params), total])
        joint = self.accelerator.reduce(joint, "sum")
        *grads, total = joint.split([*(p.numel() for p in params), len(total)])
        for p, grad in zip(params, grads): p.grad.copy_(grad.view_as(p))
        return total

def same_reward(reward, accelerator):
    "A reward for which the answer of process 0 counts."
    from accelerate.utils import broadcast
    return lambda x0: broadcast(reward(x0).contiguous())

def agree(accelerator, *parts): # Have `state_dict` and `load_state_dict`; changed in place
    "Give every process what process 0 has."
    from accelerate.utils import broadcast_object_list, send_to_device
    states = broadcast_object_list([send_to_device(p.state_dict(), "cpu") for p in parts])
    if not accelerator.is_main_process:
        for part, state in zip(parts, states): part.load_state_dict(state)
