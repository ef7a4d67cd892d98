"""Settings from a YAML file and from the command line."""
import argparse
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import yaml

from ppo_ddpm.engine.settings import Config, describe, flat, make_config, nested, unknown

class Loader(yaml.SafeLoader):
    "YAML without keys that are written twice."
    def construct_mapping(self, node, deep=False):
        keys = [k.value for k, _ in node.value]
        if twice := [k for k in keys if keys.count(k) > 1]:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice[0]} is written twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

def config_names()->list[str]:
    "Names of the configurations inside the package."
    folder = resources.files("ppo_ddpm").joinpath("configs")
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))

def read_settings(
    name_or_path, # A shipped name or a YAML file
)->dict:          # Dotted keys
    "What a file says, unchecked; FileNotFoundError or ValueError if it cannot be read."
    path = Path(name_or_path).expanduser()
    if str(name_or_path) in config_names():
        path = resources.files("ppo_ddpm").joinpath("configs", f"{name_or_path}.yaml")
    if not path.is_file():
        raise FileNotFoundError(
            f"no configuration {name_or_path}: give a YAML file or one of {', '.join(config_names())}")
    try: d = yaml.load(path.read_bytes(), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        line = getattr(getattr(e, "problem_mark", None), "line", -1) + 1
        why = getattr(e, "problem", None) or "it cannot be read"
        raise ValueError(f"{name_or_path} is not valid YAML: {why}{f' (line {line})' if line else ''}") from None
    if not isinstance(d, dict) or not d:
        raise ValueError(f"{name_or_path} holds no settings; write lines such as 'seed: 0'")
    return flat(d)

def load_config(
    name_or_path="digits", # A shipped name (see `config_names`) or a YAML file
    overrides:dict=None,   # Settings that win over the file's: {"finetune.lr": 1e-4}
)->Config:
    "Settings from a file; ValueError or FileNotFoundError in one sentence."
    settings = read_settings(name_or_path) | flat(overrides or {})
    real = str(settings.get("path.real_img", "digits"))
    known = real.lower() in ("digits", "fashionmnist", "cifar10", "celeba")
    if not known and not any(k.startswith(("data.", "model.")) for k in settings): # the original's files
        default = read_settings("default")
        settings |= {k: v for k, v in default.items() if k.startswith(("data.", "model."))}
    return make_config(settings, str(name_or_path))

def save_config(cfg:Config, path)->Path: # The path
    "Write settings so that `load_config` reads the same."
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in flat(asdict(cfg)).items()}
    Path(path).write_text(yaml.safe_dump(nested(plain), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Path(path)

def value(words:list): # What stood behind an option
    "A setting as YAML reads it; several words make a list."
    read = lambda word: yaml.safe_load(word) if word else ""
    try: return read(words[0]) if len(words) == 1 else [read(w.rstrip(",")) for w in words]
    except yaml.YAMLError: return words[0] # a text that YAML takes for something else

def add_options(
    parser:argparse.ArgumentParser,
    cfg:Config,      # Shown as defaults in --help
):
    "An option for every setting."
    now = flat(asdict(cfg))
    for key, (_, _, comment) in describe().items():
        shown = " ".join(map(str, now[key])) if isinstance(now[key], tuple) else now[key]
        shown = {None: "null", True: "true", False: "false"}.get(shown, shown)
        parser.add_argument(f"--{key}", nargs="+", metavar="X", help=f"{comment} [{shown}]".replace("%", "%%"))

def read_options(
    parser:argparse.ArgumentParser, # With `add_options`
    args:list,                      # Words of the command line
)->tuple[argparse.Namespace, dict]: # Its own options; settings by dotted key
    "Parse the command line; ValueError names an unknown option and the nearest known one."
    args = [a if not a.startswith("--") else a.replace("-", "_").replace("__", "--", 1) for a in args]
    seen, rest = parser.parse_known_args(args)
    if rest: raise unknown(rest[0].removeprefix("--").partition("=")[0], "the command line")
    seen = vars(seen)
    settings = {k: value(v) for k, v in seen.items() if k in describe() and v is not None}
    return argparse.Namespace(**{k: v for k, v in seen.items() if k not in describe()}), settings
