# %% [markdown]
# # A trained network becomes Bayesian, loses weights, and is plain again
#
# You have a trained network and would like to know how sure it is, without training from scratch. This page
# takes one through four steps: conversion around the trained weights, a short fine-tuning, pruning of the
# weights that turn out to be noise, and the way back to `torch.nn`.

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import bbb_fast
from bbb_fast import metrics
from bbb_fast.experiments.drawing import BLUE, GREEN, ORANGE, RED

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.data).float() / 16
labels = torch.from_numpy(digits.target).long()
order = torch.randperm(len(images))
train_x, train_y = images[order[:1000]], labels[order[:1000]]
test_x, test_y = images[order[1000:]], labels[order[1000:]]

# %% [markdown]
# ## The trained network


# %%
def train(model: nn.Module, epochs: int, lr: float, beta: float = 1.0) -> None:
    elbo = bbb_fast.ELBO(len(train_x), reduction="mean", from_logits=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(train_x)).split(100):
            optimizer.zero_grad()
            loss = elbo(model(train_x[rows]), train_y[rows], bbb_fast.kl_loss(model), beta)
            loss.backward()
            optimizer.step()


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


trained = make()
train(trained, epochs=40, lr=0.005)
with torch.no_grad():
    probs = trained(test_x).softmax(-1)
print(
    f"trained network: accuracy {metrics.accuracy(probs, test_y):.3f}, NLL {metrics.nll(probs, test_y):.3f}"
)

# %% [markdown]
# ## Conversion
#
# A posterior with the default prior, $N(0, 0.1^2)$ for every weight, would pull the trained weights to 0.
# MOPED (Krishnan, Subedar and Tickoo 2020) takes the prior's mean from the network instead, and starts sigma
# at $\delta |w|$ for a trained weight $w$. Here the prior is $N(w, (\delta |w|)^2)$, where the posterior
# starts. So the KL is 0 at first, and grows only as far as the data ask for it.
#
# The means are the trained weights: under `posterior_means` the copy is the network that you had.

# %%
net = bbb_fast.convert(trained, moped_delta=0.3)
with torch.no_grad(), bbb_fast.posterior_means():
    torch.testing.assert_close(net(test_x), trained(test_x))
assert abs(bbb_fast.kl_loss(net).item()) < 1e-2
print("the copy's means are the trained weights, and its KL is 0")

# %% [markdown]
# ## Fine-tuning
#
# Ten epochs at a small learning rate fit means and standard deviations to each other. Accuracy stays,
# probabilities get better, and each prediction comes with what it is worth: a wrong one usually has a
# higher entropy than a right one (the AUROC is the probability of that).

# %%
train(net, epochs=10, lr=0.002)
answer = bbb_fast.predictive(net, test_x, samples=100, seed=0)
accuracy, nll = metrics.accuracy(answer.probs, test_y), metrics.nll(answer.probs, test_y)
wrong = answer.prediction != test_y
found = metrics.auroc(answer.entropy[~wrong], answer.entropy[wrong])
print(f"Bayesian: accuracy {accuracy:.3f}, NLL {nll:.3f}, AUROC of mistakes {found:.3f}")
assert accuracy > metrics.accuracy(probs, test_y) - 0.01
assert nll < metrics.nll(probs, test_y) + 0.01
assert found > 0.85

# %% [markdown]
# ## Which weights are noise?
#
# A weight whose standard deviation is larger than itself could as well be 0. Its *signal to noise*, $|\mu| /
# \sigma$, says so; `summary` has the mean of each layer in its last column.

# %%
print(bbb_fast.summary(net))

# %% [markdown]
# Here it tells nothing: all are near $1 / \delta$. The MOPED prior believes in each trained weight, so no
# weight is called noise. To find out which the data need, take a prior that believes in none: $N(0, 0.3^2)$
# for all. Training starts from the trained weights again. Weights that the data do not hold on to go to the
# prior, to mean 0 and a large $\sigma$.

# %%
net = bbb_fast.convert(trained, priors={"prior_sigma": 0.3, "posterior_rho_initial": (-4, 0.1)})
train(net, epochs=40, lr=0.005, beta=0.1)
print(bbb_fast.summary(net))


# %%
def signal_to_noise(layer: nn.Module) -> Tensor:
    return (layer.W_mu.abs() / F.softplus(layer.W_rho)).detach().flatten()


ratios = {f"layer {k}": signal_to_noise(net[k]) for k in (0, 2, 4)}
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
bins = torch.logspace(-3, 2, 60)
for (name, ratio), color in zip(ratios.items(), (BLUE, ORANGE, GREEN), strict=True):
    axes.hist(
        ratio, bins, weights=torch.ones(len(ratio)) / len(ratio), histtype="step", color=color, label=name
    )
axes.set(xscale="log", xlabel="signal to noise of a weight", ylabel="share of the layer's weights")
axes.legend()
plt.show()

# %% [markdown]
# ## Pruning
#
# `prune` sets to 0 all weights whose $\ln(\sigma^2 / \mu^2)$ is above a threshold, which is a signal to noise
# below $e^{-\text{threshold}/2}$. We take the threshold that removes a given share, and, for comparison,
# remove as many weights of each layer at random.

# %%
everything = torch.cat(list(ratios.values()))


def pruned(share: float) -> nn.Module:
    smaller = copy.deepcopy(net)
    bbb_fast.prune(smaller, threshold=-2 * math.log(everything.quantile(share).item()))
    return smaller


def pruned_at_random(like: nn.Module) -> nn.Module:
    smaller = copy.deepcopy(net)
    with torch.no_grad():
        for k in (0, 2, 4):
            mask = (like[k].W_mu == 0).flatten()
            smaller[k].W_mu.flatten()[mask[torch.randperm(len(mask))]] = 0
    return smaller


def accuracy_of_means(model: nn.Module) -> float:
    with torch.no_grad(), bbb_fast.posterior_means():
        return metrics.accuracy(model(test_x).softmax(-1), test_y)


shares = [0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]
smaller = [pruned(share) for share in shares]
by_ratio = [accuracy_of_means(model) for model in smaller]
at_random = [accuracy_of_means(pruned_at_random(model)) for model in smaller]
print("pruned " + "".join(f"{share:>8.0%}" for share in shares))
print("by S/N " + "".join(f"{value:8.3f}" for value in by_ratio))
print("random " + "".join(f"{value:8.3f}" for value in at_random))

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.plot(shares, by_ratio, "o-", color=BLUE, label="lowest signal to noise")
axes.plot(shares, at_random, "s--", color=RED, label="as many at random")
axes.axhline(accuracy_of_means(net), color="0.5", linewidth=1, linestyle=":", label="none")
axes.set(xlabel="share of weights set to 0", ylabel="test accuracy", ylim=(0, 1))
axes.legend()
plt.show()
half = shares.index(0.5)
assert by_ratio[half] > accuracy_of_means(net) - 0.01
assert by_ratio[shares.index(0.7)] > at_random[shares.index(0.7)] + 0.05

# %% [markdown]
# ## Back to torch.nn
#
# `to_deterministic` returns modules of `torch.nn`, which hold the means. Nothing of bbb_fast is left: the
# weights load into the network that you started from, half of them 0.

# %%
point = bbb_fast.to_deterministic(smaller[half])
print(point)
fresh = make()
fresh.load_state_dict(point.state_dict())
zeros = (torch.cat([fresh[k].weight.flatten() for k in (0, 2, 4)]) == 0).float().mean().item()
with torch.no_grad():
    final = metrics.accuracy(fresh(test_x).softmax(-1), test_y)
print(f"{zeros:.0%} of the weights are 0, accuracy {final:.3f}")
assert type(point[0]) is nn.Linear and abs(zeros - 0.5) < 0.01 and final == by_ratio[half]
