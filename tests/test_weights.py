"The shipped digits model is what its card says."
import re
from importlib import resources

import torch

from ppo_ddpm.data import digits, seeded, split
from ppo_ddpm.ddpm import pretrained
from ppo_ddpm.evaluate import evaluate, floor
from ppo_ddpm.judge import train_judge
from ppo_ddpm.sampling import DDIM, sample


def test_distance_of_the_shipped_model():
    splits, (model, schedule), g = split(digits()), pretrained(), seeded(0, "shipped")
    judge = train_judge(splits.judge)
    distance = lambda x0: evaluate(judge, x0, splits, with_auc=False)["fd"]
    x0 = sample(model, DDIM(schedule, 20), torch.randn(400, 1, 8, 8, generator=g), g)
    real = floor(judge, splits, 400, with_auc=False)["fd"]
    noise = distance(torch.rand(400, 1, 8, 8, generator=g) * 2 - 1)
    assert real < distance(x0) < 1.5 < noise # 20 steps are near the floor; an untrained model is not


def test_card_names_what_made_it():
    card = (resources.files("ppo_ddpm") / "weights" / "README.md").read_text()
    for fact in ("digits", "seed", "seconds", "train-ddpm"): assert fact in card, fact
    assert re.search(r"\d\.\d", card)
