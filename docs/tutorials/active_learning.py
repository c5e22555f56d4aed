# %% [markdown]
# # Which images are worth a label?
#
# Images are cheap, labels are not. *Active learning* trains on the few labels there are, asks the model about all images
# without one, and labels those that it would learn most from. For that a model must know what it does not know.
#
# **Mutual information** measures it (BALD; Houlsby et al. 2011, Gal et al. 2017). It is the entropy of the mean prediction
# minus the mean entropy of the draws:
#
# $$I(y; w) = H\left(\bar p\right) - \frac{1}{T} \sum_{t=1}^{T} H(p_t)$$
#
# It is large where each draw is sure and the draws disagree: knowing the label would settle which of them is right. It is
# small where all draws agree, and also where all say "this could be a 1 or a 7". A label tells little there.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

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
# In each round a new network is trained on the labels so far. `pool_y` holds all labels, but only those of `labelled` are
# looked at.

# %%
START, STEP, END = 20, 10, 120


def trained(labelled: Tensor, steps: int = 120) -> nn.Module:
    plain = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    net = bbb_fast.convert(plain, priors={"prior_sigma": 0.5, "posterior_rho_initial": (-3, 0.1)})
    elbo = bbb_fast.ELBO(len(labelled), reduction="mean", from_logits=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    x, y = pool_x[labelled], pool_y[labelled]
    for _ in range(steps):
        optimizer.zero_grad()
        elbo(net(x), y, bbb_fast.kl_loss(net), beta=0.05).backward()
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
def learn(score, seed: int) -> tuple[list[float], Tensor]:
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
