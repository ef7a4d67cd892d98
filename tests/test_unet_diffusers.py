"Our UNet against diffusers' UNet2DModel: same names, same numbers, both ways, with random weights and no downloads."
import random

import pytest
import torch
from diffusers import UNet2DModel

from ppo_ddpm.engine.weights import build_unet
from ppo_ddpm.unet import UNet

# the networks of google/ddpm-cifar10-32 and google/ddpm-celebahq-256 with fewer channels (and, for the faces, pixels)
PUBLIC = {
    "cifar10-32": dict(size=32, in_channels=3, channels=(32, 64, 64, 64), n_blocks=2, attn=(16,), groups=32),
    "celebahq-256": dict(size=64, in_channels=3, channels=(32, 32, 64, 64, 96, 96), n_blocks=2, attn=(4,), groups=32),
}


def drawn(seed):
    "A configuration drawn at random."
    r = random.Random(seed)
    n = r.randint(1, 4)
    size = 2 ** (n - 1) * r.choice([2, 3, 4])
    there = [size // 2**i for i in range(n)]
    some = lambda: tuple(v for v in there if r.random() < 0.5)
    return dict(size=size, in_channels=r.choice([1, 3]), channels=tuple(r.choice([16, 32, 48]) for _ in range(n)), n_blocks=r.randint(1, 3),
                attn=some(), attn_up=some(), head_dim=r.choice([None, 8, 16]), groups=r.choice([4, 8, 16]), eps=r.choice([1e-6, 1e-5]),
                flip_sin_to_cos=r.random() < 0.5, freq_shift=r.choice([0, 1]))


def theirs(c):
    "The UNet2DModel that has the configuration of one of our networks."
    c = dict(eps=1e-6, flip_sin_to_cos=False, freq_shift=1) | c
    there = [c["size"] // 2**i for i in range(len(c["channels"]))]
    return UNet2DModel(
        sample_size=c["size"], in_channels=c["in_channels"], out_channels=c["in_channels"], block_out_channels=c["channels"],
        layers_per_block=c["n_blocks"], norm_num_groups=c["groups"], norm_eps=c["eps"], downsample_padding=0, attention_head_dim=c["head_dim"],
        down_block_types=[("Attn" if r in c["attn"] else "") + "DownBlock2D" for r in there],
        up_block_types=[("Attn" if r in c["attn_up"] else "") + "UpBlock2D" for r in there[::-1]],
        flip_sin_to_cos=c["flip_sin_to_cos"], freq_shift=c["freq_shift"])


@pytest.mark.parametrize("args", [*PUBLIC.values(), *map(drawn, range(6))], ids=[*PUBLIC, *map(str, range(6))])
def test_same_network(args):
    torch.manual_seed(0)
    ours = build_unet(args)
    ref = theirs(ours.config)
    ours.load_state_dict(ref.state_dict())  # strict: no name may be missing or left over
    ref.load_state_dict(ours.state_dict())
    x = torch.randn(3, args["in_channels"], args["size"], args["size"])
    for t in (torch.tensor([0, 123, 999]), torch.tensor(500), 7):
        with torch.no_grad(): a, b = ref(x, t).sample, ours(x, t)
        assert (a - b).norm() / a.norm() < 1e-5


def test_same_gradients():
    torch.manual_seed(0)
    ours = UNet(size=16, channels=(16, 32), attn=(8,), head_dim=8)
    ref = theirs(ours.config)
    ref.load_state_dict(ours.state_dict())
    x, t = torch.randn(4, 1, 16, 16), torch.tensor([0, 10, 500, 999])
    for y in (ours(x, t), ref(x, t).sample): y.square().mean().backward()
    grads = dict(ref.named_parameters())
    total = torch.stack([p.grad.norm() for p in ours.parameters()]).norm()
    for name, p in ours.named_parameters(): assert (p.grad - grads[name].grad).norm() < 1e-5 * total, name


@pytest.mark.parametrize("wrong, least", [({"flip_sin_to_cos": True}, 0.01), ({"freq_shift": 0}, 0.01), ({"head_dim": 8}, 1e-3)])
def test_details_matter(wrong, least):
    "The comparison would notice a wrong detail: these differ although every tensor fits."
    torch.manual_seed(0)
    ours = UNet(**PUBLIC["cifar10-32"])
    ref = theirs(ours.config | wrong)
    ref.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): a, b = ref(x, 500).sample, ours(x, 500)
    assert (a - b).norm() / a.norm() > least


def test_half_precision():
    "Times keep their precision when the network loses its own."
    torch.manual_seed(0)
    ours = UNet().eval()
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        full = ours(x, t)
        half = ours.bfloat16()(x.bfloat16(), t)
    assert half.dtype == torch.bfloat16 and (half - full).norm() / full.norm() < 0.03
