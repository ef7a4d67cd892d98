"The shipped digits model is what its card says."
import re
from importlib import resources

import torch

from ppo_ddpm.core import seeded
from ppo_ddpm.data import load_pictures, split
from ppo_ddpm.ddpm import pretrained
from ppo_ddpm.evaluate import evaluate, floor, train_judge
from ppo_ddpm.sampling import DDIM, sample


def test_distance_of_the_shipped_model():
    splits, (model, schedule), g = split(load_pictures("digits")), pretrained(), seeded(0, "shipped")
    judge = train_judge(splits.judge)
    x0 = sample(model, DDIM(schedule, 20), torch.randn(400, 1, 8, 8, generator=g), g)
    fd = evaluate(judge, x0, splits, "test", auc=False)["fd"]
    real = floor(judge, splits, 400, "test", auc=False)["fd"]
    noise = evaluate(judge, torch.rand(400, 1, 8, 8, generator=g) * 2 - 1, splits, "test", auc=False)["fd"]
    assert real < fd < 1.5 < noise            # 20 steps are near the floor; an untrained model is not


def test_card_names_what_made_it():
    card = (resources.files("ppo_ddpm") / "weights" / "README.md").read_text()
    for fact in ("digits", "seed", "seconds", "train-ddpm"): assert fact in card, fact
    assert re.search(r"\d\.\d", card)
