"Reinforcement-learning fine-tuning of diffusion models. `import ppo_ddpm` loads nothing; a name below is imported when it is first used."
__version__ = "0.1.0"

from importlib import import_module

# name -> module that defines it
_home = dict(
    seeded="core", set_seed="core", pick_device="core", Config="core", load_config="core", save_config="core", config_names="core",
    show_grid="core", save_grid="core", save_gif="core", Board="core", Compute="core",
    NoiseSchedule="schedule",
    UNet="unet", Engine="unet", save_weights="unet", load_weights="unet",
    Pictures="data", load_pictures="data", split="data",
    train_ddpm="ddpm", pretrained="ddpm",
    DDIM="sampling", sample="sampling", rollout="sampling",
    RewardModel="reward", RealFake="reward",
    ppo_loss="ppo", ppo_update="ppo",
    train_judge="evaluate", frechet_distance="evaluate",
)
_modules = ("core", "schedule", "unet", "data", "ddpm", "sampling", "reward", "ppo", "evaluate", "finetune", "cli")
__all__ = [*_home, *_modules]


def __getattr__(name):
    if name in _modules: return import_module(f".{name}", __name__)
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_home[name]}", __name__), name)
    return value


def __dir__(): return sorted([*globals(), *__all__])
