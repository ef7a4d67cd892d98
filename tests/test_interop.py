"""To and from diffusers, with the real package, offline, with random weights: networks, folders, schedules, sampler steps and whole trajectories.

tests/test_unet_diffusers.py compares the bare networks; here everything goes through folders."""
import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch.distributions import Normal

from ppo_ddpm.data import seeded
from ppo_ddpm.ddpm import pretrained
from ppo_ddpm.engine import hub
from ppo_ddpm.engine.hub import (
    from_diffusers, from_pretrained, hub_folder, noise_schedule, open_pretrained, push_to_hub, read_scheduler,
    sampler_from_diffusers, save_pretrained, to_diffusers)
from ppo_ddpm.engine.weights import build_unet, load_unet, save_weights
from ppo_ddpm.ppo import ppo_update
from ppo_ddpm.sampling import DDIM, denoise, log_prob, log_ratio, mean_shift, rollout, sample
from ppo_ddpm.schedule import NoiseSchedule, at
from ppo_ddpm.unet import UNet
from test_unet_diffusers import drawn, theirs

FIGURES = os.environ.get("INTEROP_FIGURES")       # a file: write the largest differences there

OLD = dict(norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None)   # common to Google's checkpoints
PUBLIC = {
    "cifar10-32": dict(sample_size=32, block_out_channels=(128, 256, 256, 256), down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), **OLD),
    "celebahq-256": dict(sample_size=256, block_out_channels=(128, 128, 256, 256, 512, 512), down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
                         up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4), **OLD)}


def note(name, value):
    if FIGURES:
        with open(FIGURES, "a") as f: print(f"{name}: {value:.1e}", file=f)
    return value


class PointPolicy(torch.nn.Module):
    "A small network for points in the plane: no convolution hides a difference."
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU(), torch.nn.Linear(96, 2))

    def forward(self, x, t):
        u = (t / 1000)[:, None]
        return self.net(torch.cat([x, u, x.norm(dim=1, keepdim=True), (6 * u).sin(), (6 * u).cos(), (20 * u).sin(), (20 * u).cos()], 1))


def apart(a, b): return ((a - b).norm() / a.norm()).item()


def same(net, ref, name, batch=2):
    "Ours and theirs agree on outputs, and their state dicts load strictly both ways."
    net.load_state_dict(ref.state_dict()); ref.load_state_dict(net.state_dict())
    c = net.config
    x, t = torch.randn(batch, c["in_channels"], c["size"], c["size"], generator=seeded("x")), torch.tensor([0, 999][:batch])
    with torch.no_grad(): assert note(f"network {name}", apart(ref(x, t).sample, net(x, t))) < 1e-5


def tiny(**other):
    torch.manual_seed(0)
    return UNet2DModel(**dict(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")) | other).eval()


# --- networks --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PUBLIC)
def test_public_configurations(name, tmp_path):
    torch.manual_seed(0)
    ref = UNet2DModel(**PUBLIC[name]).eval()
    ref.save_pretrained(tmp_path)
    net = from_diffusers(tmp_path)[0]
    assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == dict([("cifar10-32", (35_746_307, 328)), ("celebahq-256", (113_673_219, 450))])[name]
    same(net, ref, name, batch=1 if name == "celebahq-256" else 2)


@pytest.mark.parametrize("seed", range(10, 16))
@pytest.mark.parametrize("padding", [0, 1])
def test_drawn_configurations(seed, padding, tmp_path):
    torch.manual_seed(seed)
    ours = build_unet(drawn(seed) | dict(pad_all=bool(padding)))
    ref = UNet2DModel(**{k: v for k, v in theirs(ours.config).config.items() if k[0] != "_"} | dict(downsample_padding=padding)).eval()
    ref.save_pretrained(tmp_path/"theirs")
    net = from_diffusers(tmp_path/"theirs")[0]
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in net.config.items()} == ours.config
    same(net, ref, f"drawn {seed}, padding {padding}")
    to_diffusers(net, NoiseSchedule(), tmp_path/"ours")
    again = UNet2DModel.from_pretrained(tmp_path/"ours", subfolder="unet")
    same(net, again, f"drawn {seed}, padding {padding}, written by us")


def test_what_old_files_do_not_say(tmp_path):
    "Google's files are of diffusers 0.0.4: settings that came later have the values that they had then."
    ref = tiny()
    ref.save_pretrained(tmp_path)
    config = json.loads((tmp_path/"config.json").read_text())
    later = ["dropout", "mid_block_type", "downsample_type", "upsample_type", "attn_norm_num_groups", "resnet_time_scale_shift", "add_attention",
             "class_embed_type", "num_class_embeds", "num_train_timesteps", "time_embedding_dim"]
    for k in later: del config[k]
    (tmp_path/"config.json").write_text(json.dumps(config | dict(sample_size=[8, 8])))
    same(from_diffusers(tmp_path)[0], ref, "an old file")


def test_settings_that_change_nothing(tmp_path):
    "The bookkeeping of an EMA, the settings of other samplers, a word of 2022: none of them is a reason to refuse."
    ref = tiny(block_out_channels=(8, 16))
    EMAModel(ref.parameters(), decay=.9999, use_ema_warmup=True, model_cls=UNet2DModel, model_config=ref.config).save_pretrained(tmp_path/"unet_ema")
    assert "inv_gamma" in (tmp_path/"unet_ema/config.json").read_text()
    same(from_diffusers(tmp_path/"unet_ema")[0], ref, "unet_ema")
    old = dict(_class_name="DDPMScheduler", _diffusers_version="0.8.0", variance_type="fixed_small", trained_betas=None, predict_epsilon=True, skip_prk_steps=True)
    (tmp_path/"scheduler_config.json").write_text(json.dumps(old))
    assert repr(noise_schedule(read_scheduler(tmp_path))) == repr(NoiseSchedule())


def test_old_names_and_kinds_of_files(tmp_path):
    "query/key/value/proj_attn, a pickle of tensors, and several files with an index, all the same network."
    ref = tiny()
    sd, old = ref.state_dict(), dict(to_q="query", to_k="key", to_v="value")
    renamed = {}
    for k, v in sd.items():
        for new, name in old.items(): k = k.replace(f".{new}.", f".{name}.")
        renamed[k.replace(".to_out.0.", ".proj_attn.")] = v
    assert sum(".query." in k for k in renamed) == 8
    ref.save_config(tmp_path)
    torch.save(renamed, tmp_path/"diffusion_pytorch_model.bin")
    same(from_diffusers(tmp_path)[0], ref, "old names, .bin")
    ref.save_pretrained(tmp_path/"several", max_shard_size="10KB")
    assert len(list((tmp_path/"several").glob("*.safetensors"))) > 2
    same(from_diffusers(tmp_path/"several")[0], ref, "several files")
    torch.save({k: torch.zeros_like(v) for k, v in sd.items()}, tmp_path/"several/diffusion_pytorch_model.bin")
    same(from_diffusers(tmp_path/"several")[0], ref, ".safetensors before .bin")


def test_pieces_are_those_of_the_folder(tmp_path):
    "An index that leads out of the folder leads nowhere: the names of the files count."
    tiny().save_config(tmp_path/"in")
    save_file(tiny().state_dict(), tmp_path/"outside.safetensors")
    (tmp_path/"in/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(dict(weight_map={"conv_in.weight": "../outside.safetensors"})))
    with pytest.raises(FileNotFoundError, match="there is no .*diffusion_pytorch_model.safetensors"): from_diffusers(tmp_path/"in")


def test_a_pickle_runs_nothing(tmp_path):
    class Trap:
        def __reduce__(self): return Path.touch, (tmp_path/"trapped",)
    tiny().save_config(tmp_path)
    torch.save({"conv_in.weight": Trap()}, tmp_path/"diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="could run code"): from_diffusers(tmp_path)
    assert not (tmp_path/"trapped").exists()


@pytest.mark.parametrize("other, said", [
    (dict(down_block_types=["DownBlock2D", "ResnetDownsampleBlock2D"]), "down_block_types = .*ResnetDownsampleBlock2D"),
    (dict(up_block_types=["AttnUpBlock2D", "SkipUpBlock2D"]), "up_block_types = .*SkipUpBlock2D"),
    (dict(center_input_sample=True), "center_input_sample = True"), (dict(time_embedding_type="fourier"), "time_embedding_type = fourier"),
    (dict(act_fn="gelu"), "act_fn = gelu"), (dict(resnet_time_scale_shift="scale_shift"), "resnet_time_scale_shift = scale_shift"),
    (dict(num_class_embeds=10), "num_class_embeds = 10"), (dict(class_embed_type="timestep"), "class_embed_type = timestep"),
    (dict(out_channels=2), "out_channels = 2"), (dict(mid_block_type=None), "mid_block_type = None"), (dict(add_attention=False), "add_attention = False"),
    (dict(mid_block_scale_factor=2), "mid_block_scale_factor = 2"), (dict(downsample_type="resnet"), "downsample_type = resnet"),
    (dict(attn_norm_num_groups=2), "attn_norm_num_groups = 2"), (dict(time_embedding_dim=16), "time_embedding_dim = 16"),
    (dict(_class_name="UNet2DConditionModel"), "_class_name = UNet2DConditionModel"),
    (dict(sample_size=None), "sample_size = None"), (dict(sample_size=[8, 16]), "sample_size = "),
])
def test_what_is_not_supported_is_named(other, said, tmp_path):
    ref = tiny()
    ref.save_pretrained(tmp_path)
    config = json.loads((tmp_path/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(config | other))
    with pytest.raises(ValueError, match=said) as e: from_diffusers(tmp_path)
    assert "\n" not in str(e.value)


def test_without_a_network(tmp_path):
    "A name that is no folder is a model of the Hub; without a connection one sentence says so."
    code = "from ppo_ddpm.engine.hub import open_pretrained\ntry: open_pretrained('google/ddpm-cifar10-32')\nexcept OSError as e: print(e)"
    env = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip()
    assert said.startswith("google/ddpm-cifar10-32 is no folder here, and was not found on the Hugging Face Hub either") and "\n" not in said
    for wrong in "../no/where", tmp_path/"no", "/no/where":
        with pytest.raises(FileNotFoundError, match="is no folder"): hub_folder(wrong)


# --- our folders, and pipelines --------------------------------------------------------------------------------------------
def test_a_file_instead_of_a_folder(tmp_path):
    "Weights of diffusers do not say their network: with the network of some settings they might fit and be another one."
    tiny().save_pretrained(tmp_path)
    file = tmp_path/"diffusion_pytorch_model.safetensors"
    with pytest.raises(FileNotFoundError, match="is no folder"): open_pretrained(file)
    with pytest.raises(ValueError, match="does not say what network"): load_unet(file)
    with pytest.raises(FileNotFoundError, match="give the folder of a checkpoint"): open_pretrained(tmp_path.parent)


def test_save_pretrained(tmp_path):
    net, schedule = UNet(16, 3, (16, 32), attn=(8,), head_dim=8, groups=4), NoiseSchedule("cosine", 50)
    facts = dict(data="a test", seed=3, steps=7, limits="Of no use.", numbers={"distance, 4 steps": 1.41})
    save_pretrained(net, schedule, tmp_path/"a", **facts)
    assert sorted(p.name for p in (tmp_path/"a").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (tmp_path/"a/README.md").read_text()
    n = sum(p.numel() for p in net.parameters())
    for said in ("library_name: ppo_ddpm", "Data: a test", "seed: 3", "steps: 7", "| distance, 4 steps | 1.41 |", "Of no use.", f"{n:,} parameters", "cosine, T=50"):
        assert said in card
    again, its = from_pretrained(tmp_path/"a")
    assert repr(its) == repr(schedule) and not again.training
    assert all(v.equal(net.state_dict()[k]) for k, v in again.state_dict().items())
    assert load_unet(tmp_path/"a/model.safetensors")[2]["seed"] == "3"     # facts lie beside the weights
    with pytest.raises(FileNotFoundError, match="no weights file"): from_pretrained(tmp_path)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in again.parameters() if p.ndim == 4)


def test_a_table_and_a_variant_travel(tmp_path):
    "What a fine-tuned public checkpoint records is what ran: its table of noise, and its network in every small thing."
    ref = tiny()
    DDPMPipeline(ref, DDPMScheduler(beta_schedule="scaled_linear")).save_pretrained(tmp_path/"public")
    net, schedule = from_diffusers(tmp_path/"public")
    save_pretrained(net, schedule, tmp_path/"ours")
    to_diffusers(net, schedule, tmp_path/"theirs")
    save_weights(net, tmp_path/"policy.safetensors", schedule)
    for read in open_pretrained(tmp_path/"ours"), open_pretrained(tmp_path/"theirs"), load_unet(tmp_path/"policy.safetensors"):
        same(read[0], ref, "a variant")
        assert torch.allclose(read[1].abar64, schedule.abar64, rtol=1e-9, atol=0)


def test_folders_of_before(tmp_path):
    "Until now the file said its network, and not always its noise."
    net, _ = pretrained()
    config = net.config | dict(eps=1e-6, flip_sin_to_cos=False, freq_shift=1, pad_all=False)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path/"model.safetensors", dict(config=json.dumps(config), format="pt", seed="0"))
    (tmp_path/"config.json").write_text(json.dumps(config))
    again, its, clips = open_pretrained(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad(): assert again(x, 10).equal(net(x, 10))
    assert its is None and not clips


def test_does_its_own_sampler_clip(tmp_path):
    for clip in True, False:
        DDPMPipeline(tiny(), DDPMScheduler(clip_sample=clip)).save_pretrained(tmp_path)
        assert open_pretrained(tmp_path)[2] is clip


def test_push_to_hub(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **kw: calls.append((repo_id, kw)))
    monkeypatch.setattr(hub, "upload_folder", lambda **kw: calls.append(kw))
    push_to_hub(tmp_path, "me/digits", token="t", commit_message="first")
    assert calls == [("me/digits", dict(token="t", exist_ok=True)), dict(folder_path=tmp_path, repo_id="me/digits", token="t", commit_message="first")]


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    "Settings first, then the weights; nothing else is fetched, and .bin only where there is no .safetensors."
    tiny().save_pretrained(tmp_path, safe_serialization=False)
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path))
    same(from_diffusers("google/ddpm")[0], tiny(), "a name")
    name = "diffusion_pytorch_model"
    assert asked == [["*.json"], *(("*.json", name + end, f"{name}-*{end}") for end in (".safetensors", ".bin"))]


def test_pipelines_open_what_we_write_and_we_what_they_write(tmp_path):
    net = UNet(8, 1, (8, 16), groups=4).eval()
    schedule = NoiseSchedule("cosine", 100)
    to_diffusers(net, schedule, tmp_path/"ours")
    pipe = DDIMPipeline.from_pretrained(tmp_path/"ours")
    assert type(DDPMPipeline.from_pretrained(tmp_path/"ours").scheduler) is DDPMScheduler
    same(net, pipe.unet, "from a pipeline")
    assert note("schedule, cosine through trained_betas", (pipe.scheduler.alphas_cumprod - schedule.abar).abs().max().item()) < 1e-6
    pipe.save_pretrained(tmp_path/"theirs")
    pipe.unet.save_pretrained(tmp_path/"flat")                        # as Google's lie: network and scheduler in one folder
    pipe.scheduler.save_pretrained(tmp_path/"flat")
    for place in "ours", "theirs", "flat", "theirs/unet":             # the last: the scheduler beside the network
        read, found, clips = open_pretrained(tmp_path/place)
        assert not clips and torch.allclose(found.abar64, schedule.abar64, rtol=1e-9)
        same(read, pipe.unet, place)


def test_the_command_takes_folders(tmp_path):
    from ppo_ddpm.engine.jobs import load_model
    from ppo_ddpm.engine.options import load_config
    net, schedule = pretrained()
    to_diffusers(net, schedule, tmp_path/"theirs")
    save_pretrained(net, schedule, tmp_path/"ours")
    to_diffusers(UNet(16, 3, attn=(8,)), schedule, tmp_path/"other")
    x = torch.randn(2, 1, 8, 8)
    of = lambda name: load_model(load_config("digits", {"path.ddpm": str(tmp_path/name)}))
    for name in "theirs", "ours":
        model, its, _ = of(name)
        with torch.no_grad(): assert torch.allclose(model(x, 10), net(x, 10), atol=1e-6)
        assert torch.allclose(its.abar, schedule.abar, rtol=1e-6)
    with pytest.raises(ValueError, match="data.size"): of("other")


# --- schedules and steps ---------------------------------------------------------------------------------------------------
BETAS = {"linear": {}, "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012), "squaredcos_cap_v2": dict(beta_schedule="squaredcos_cap_v2"),
         "trained": dict(trained_betas=torch.linspace(1e-3, .05, 100).tolist(), num_train_timesteps=100)}


def scheduler(folder, **settings):
    ref = DDIMScheduler(**settings)
    ref.save_pretrained(folder)
    return ref


@pytest.mark.parametrize("name", BETAS)
def test_schedules(name, tmp_path):
    ref = scheduler(tmp_path, **BETAS[name])
    a = noise_schedule(read_scheduler(tmp_path)).abar64
    exact = (1 - ref.betas.double()).cumprod(0)                        # theirs without the rounding of 1000 products
    assert note(f"schedule {name}, share of noise", ((a - exact).abs() / (1 - exact)).max().item()) < 1e-3   # float32 betas of 1e-4
    assert note(f"schedule {name}", (a - ref.alphas_cumprod).abs().max().item()) < 2e-6


@pytest.mark.parametrize("settings, said", [
    (dict(prediction_type="v_prediction"), "prediction_type = v_prediction"), (dict(thresholding=True), "thresholding = True"),
    (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr = True"), (dict(_class_name="EulerDiscreteScheduler"), "_class_name = EulerDiscreteScheduler"),
    (dict(beta_schedule="sigmoid"), "beta_schedule = sigmoid"), (dict(predict_epsilon=False), "predict_epsilon = False"), (dict(beta_end=2), "abar must fall"),
])
def test_schedulers_that_are_refused(settings, said, tmp_path):
    (tmp_path/"scheduler_config.json").write_text(json.dumps(dict(_class_name="DDPMScheduler") | settings))
    with pytest.raises(ValueError, match=said): noise_schedule(read_scheduler(tmp_path))


def exactly(ref):
    "The same scheduler with its table in float64; its own, in float32, loses digits where 1 - abar or 1 - abar - sigma^2 is small."
    betas = dict(linear=lambda lo, hi: torch.linspace(lo, hi, 1000, dtype=torch.float64), scaled_linear=lambda lo, hi: torch.linspace(lo**.5, hi**.5, 1000, dtype=torch.float64)**2,
        squaredcos_cap_v2=lambda *_: torch.tensor([min(1 - bar((i + 1) / 1000) / bar(i / 1000), .999) for i in range(1000)], dtype=torch.float64))
    bar = lambda u: math.cos((u + .008) / 1.008 * math.pi / 2) ** 2
    ref.alphas_cumprod = (1 - betas[ref.config.beta_schedule](ref.config.beta_start, ref.config.beta_end)).cumprod(0)
    ref.final_alpha_cumprod = ref.final_alpha_cumprod.double() if ref.config.set_alpha_to_one else ref.alphas_cumprod[0]
    return ref


def walk(ref, ddim, policy, x, eta):
    "Largest difference of one step, and of the whole trajectory, relative to the size of the states."
    ref.set_timesteps(ddim.n_steps)
    assert ref.timesteps.tolist() == ddim.t.tolist()
    step, y = 0, x
    for s in denoise(policy, ddim, x, seeded("walk")):
        with torch.no_grad():
            alone = ref.step(s.eps, ddim.t[s.k], s.x, eta, variance_noise=s.z).prev_sample             # the same state
            y = ref.step(policy(y, ddim.t[s.k].expand(len(y))), ddim.t[s.k], y, eta, variance_noise=s.z).prev_sample  # its own
        step = max(step, apart(alone, s.x_next))
    return step, apart(y, s.x_next)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    net = PointPolicy().eval()
    with torch.no_grad(): net.net[-1].weight.mul_(3)
    return net


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_steps_are_those_of_diffusers(spacing, clip, betas, policy, tmp_path):
    "`sampler_from_diffusers`, for every grid, whether or not K divides T; first as it is, then with its table in float64."
    for exact in False, True:
        ref = scheduler(tmp_path, timestep_spacing=spacing, clip_sample=clip, **BETAS[betas])
        if exact: exactly(ref)
        for K in 4, 7, 10, 16, 50:
            for eta in 0., .3, 1.:
                step, path = walk(ref, sampler_from_diffusers(tmp_path, K, eta), policy, torch.randn(64, 2, generator=seeded("start")), eta)
                for what, v in dict(step=step, path=path).items(): note(f"{what} {betas} {spacing} clip {clip} K {K} eta {eta} exact {exact}", v)
                rounding = not exact and clip and betas == "squaredcos_cap_v2"          # abar_T is 2e-9 there
                assert max(step, path) < (1e-4 if rounding else 1e-5)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("clip", [None, 1., .5])
@pytest.mark.parametrize("eta", [.3, 1.])
def test_our_own_grid_is_theirs_where_k_divides_t(spacing, clip, eta, policy):
    ref = DDIMScheduler(timestep_spacing=spacing, clip_sample=bool(clip), clip_sample_range=clip or 1.)
    step, path = walk(ref, DDIM(NoiseSchedule(), 10, eta, spacing, clip_x0=clip), policy, torch.randn(64, 2, generator=seeded("start")), eta)
    assert step < 1e-5 and path < 1e-5


@pytest.mark.parametrize("offset, one, K", [(1, False, 10), (1, True, 10), (0, False, 10), (1, False, 7), (3, False, 50)])
def test_offset_and_last_level(offset, one, K, policy, tmp_path):
    ref = scheduler(tmp_path, timestep_spacing="leading", steps_offset=offset, set_alpha_to_one=one, clip_sample=False)
    step, path = walk(ref, sampler_from_diffusers(tmp_path, K, 1.), policy, torch.randn(64, 2, generator=seeded("start")), 1.)
    assert note(f"step offset {offset} to one {one} K {K}", step) < 1e-5 and path < 1e-5


def test_pictures_of_a_pipeline(tmp_path):
    "A whole pipeline: same network, same noise, same pictures."
    ref = tiny()
    (pipe := DDIMPipeline(ref, DDIMScheduler(timestep_spacing="trailing"))).save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    net, ddim = from_diffusers(tmp_path)[0], sampler_from_diffusers(tmp_path, 7, eta=0.)
    exactly(pipe.scheduler)
    theirs = pipe(batch_size=4, num_inference_steps=7, generator=torch.Generator().manual_seed(5), output_type="np").images
    ours = sample(net, ddim, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5)))
    assert note("pictures of a pipeline", apart(torch.tensor(theirs)[..., 0], (ours[:, 0] / 2 + .5).clamp(0, 1))) < 1e-5


# --- PPO with a clamped x0 -------------------------------------------------------------------------------------------------
def played(policy, clip, K=6):
    ddim = DDIM(NoiseSchedule(), K, clip_x0=clip)
    traj = rollout(policy, ddim, torch.randn(50, 2, generator=seeded("x_T")), seeded("z"))
    return ddim, traj, *traj.flat()


def test_ratio_with_clipping_against_torch(policy):
    ddim, _, k, x, eps, z = played(policy, .5)
    x_next, new = ddim.mean(k, x, eps) + at(ddim.sigma, k, x) * z, eps + .05 * torch.randn(eps.shape, generator=seeded("new"))
    normal = lambda e: Normal(ddim.mean(k, x, e), at(ddim.sigma, k, x).expand_as(x)).log_prob(x_next).sum(1)
    delta = mean_shift(ddim, k, new, eps, x)
    assert torch.allclose(log_ratio(delta, z), normal(new) - normal(eps), atol=1e-4)
    assert torch.allclose(log_prob(ddim, k, x, x_next, eps), normal(eps), atol=1e-4)
    assert mean_shift(ddim, k, eps, eps, x).abs().max() == 0
    unclipped = DDIM(NoiseSchedule(), 6)
    assert (log_ratio(mean_shift(unclipped, k, new, eps), z) - normal(new) + normal(eps)).abs().max() > .1    # without it the ratio is wrong


def test_update_with_clipping(policy):
    "Ratios start at 1, and an advantage moves the policy."
    policy = copy.deepcopy(policy)
    ddim, traj, *_ = played(policy, .5)
    opt, advantage = torch.optim.Adam(policy.parameters(), 1e-3), torch.randn(50, generator=seeded("adv"))
    stats = ppo_update(policy, copy.deepcopy(policy), opt, ddim, traj, advantage, seeded("order"))
    assert stats["ratio_error"] < 1e-4 and stats["grad_norm"] > 0
