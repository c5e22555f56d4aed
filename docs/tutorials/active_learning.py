# %% [markdown]
# # Which images are worth a label?
#
# Images are cheap, labels are not. *Active learning* trains on the few labels there are, asks the model about
# all images without one, and labels those that it would learn most from. For that a model must know what it
# does not know.
#
# **Mutual information** measures it (BALD; Houlsby et al. 2011, Gal et al. 2017). It is the entropy of the
# mean prediction minus the mean entropy of the draws:
#
# $$I(y; w) = H\left(\bar p\right) - \frac{1}{T} \sum_{t=1}^{T} H(p_t)$$
#
# It is large where each draw is sure and the draws disagree: knowing the label would settle which of them is
# right. It is small where all draws agree, and also where all say "this could be a 1 or a 7". A label tells
# little there.

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import bbb_fast
from bbb_fast import CategoricalPredictive, metrics
from bbb_fast.experiments.drawing import BLUE, RED

digits = load_digits()
images = torch.from_numpy(digits.data).float() / 16
labels = torch.from_numpy(digits.target).long()
torch.manual_seed(0)
order = torch.randperm(len(images))
pool_x, pool_y = images[order[:1000]], labels[order[:1000]]
test_x, test_y = images[order[1000:]], labels[order[1000:]]

# %% [markdown]
# ## A model for few labels
#
# With twenty labels, the cheapest doubt is dropout that stays on: `mc_dropout` puts it before the last layer,
# and each prediction draws which units are dropped. (A Gaussian posterior works, too, but needs more labels
# before it is more than its prior.)
#
# In each round a new network is trained on the labels so far. `pool_y` holds all labels, but only those of
# `labelled` are looked at.

# %%
START, STEP, END = 20, 10, 120


def trained(labelled: Tensor) -> nn.Module:
    net = bbb_fast.mc_dropout(nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)), p=0.5)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    x, y = pool_x[labelled], pool_y[labelled]
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def by_mutual_information(said: CategoricalPredictive) -> Tensor:
    return said.mutual_information


def at_random(said: CategoricalPredictive) -> Tensor:
    return torch.rand(len(said))


# %% [markdown]
# ## The loop
#
# Ask about the pool, score, leave out what has a label, take the ten highest.


# %%
def learn(score: Callable[[CategoricalPredictive], Tensor], seed: int) -> tuple[list[float], Tensor]:
    """Test accuracy after each round, and which images have a label in the end, in order."""
    torch.manual_seed(seed)
    labelled = torch.randperm(len(pool_x))[:START]
    accuracies = []
    while True:
        net = trained(labelled)
        said = bbb_fast.predictive(net, test_x, samples=20, seed=seed)
        accuracies.append(metrics.accuracy(said.probs, test_y))
        if len(labelled) == END:
            return accuracies, labelled
        scores = score(bbb_fast.predictive(net, pool_x, samples=20, seed=seed))
        scores[labelled] = -1.0
        labelled = torch.cat([labelled, scores.topk(STEP).indices])


SEEDS = (0, 1, 2)
runs = {
    "mutual information": [learn(by_mutual_information, seed) for seed in SEEDS],
    "random": [learn(at_random, seed) for seed in SEEDS],
}

# %% [markdown]
# ## What a label is worth

# %%
counts = list(range(START, END + 1, STEP))
curves = {name: torch.tensor([accuracies for accuracies, _ in found]) for name, found in runs.items()}
print("labels              " + "".join(f"{count:6}" for count in counts))
for name, curve in curves.items():
    print(f"{name:<20}" + "".join(f"{value:6.3f}" for value in curve.mean(0)))

figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
for (name, curve), color, style in zip(curves.items(), (BLUE, RED), ("o-", "s--"), strict=True):
    axes.plot(counts, curve.mean(0), style, color=color, label=f"{name}, mean of {len(SEEDS)}")
    axes.plot(counts, curve.T, color=color, linewidth=0.7, alpha=0.4)
axes.set(xlabel="labels", ylabel="test accuracy")
axes.legend()
plt.show()
gain = curves["mutual information"].mean(0) - curves["random"].mean(0)
assert gain[-3:].mean() > 0.01

# %% [markdown]
# At first nothing is gained: a model that has seen twenty images knows little, and little of what it does not
# know. Later the labels that it chose are worth more than as many at random. Three starts are few, as the
# thin lines show. [Active learning](../active.md) has five starts of four scores on MNIST, and what else
# matters there.
