"Reinforcement-learning fine-tuning of diffusion models. `import ppo_ddpm` loads nothing; a name below is imported when it is first used."
__version__ = "0.1.0"

from importlib import import_module

# module -> names that it lends to the package
_names = {
    "data": "seeded Pictures digits quantize split show_grid",
    "schedule": "NoiseSchedule",
    "unet": "UNet",
    "ddpm": "train_ddpm pretrained",
    "sampling": "DDIM sample rollout",
    "realfake": "RealFake",
    "reward": "RewardModel",
    "ppo": "ppo_loss ppo_update",
    "judge": "train_judge",
    "evaluate": "frechet_distance",
    "engine.settings": "set_seed pick_device Config Compute",
    "engine.options": "load_config save_config config_names",
    "engine.pictures": "load_pictures",
    "engine.weights": "save_weights load_weights load_unet",
    "engine.board": "Board save_grid save_gif",
    "engine.fast": "Engine",
    "engine.hub": "from_diffusers to_diffusers sampler_from_diffusers "
                  "save_pretrained from_pretrained push_to_hub",
}
_home = {name: module for module, names in _names.items() for name in names.split()}
_modules = ("layers", "kinds", "finetune", "engine", *(m for m in _names if "." not in m))
__all__ = [*_home, *_modules]


def __getattr__(name):
    if name in _modules: return import_module(f".{name}", __name__)
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_home[name]}", __name__), name)
    return value


def __dir__(): return sorted([*globals(), *__all__])
