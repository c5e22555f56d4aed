# %% [markdown]
# # A first Bayesian classifier
#
# A network of `torch.nn` has one number for each weight. Many other numbers would explain the training data
# as well, and would answer differently where there were no data. A Bayesian network keeps a distribution over
# the weights instead. To predict, it draws weights several times and averages the answers. Where the draws
# disagree, it does not know.
#
# This page takes a small convolutional network from start to end: make it Bayesian, train it, ask it, and see
# what it is unsure about. The data are scikit-learn's digits, 1,797 images of 8 by 8 pixels.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import bbb_fast
from bbb_fast import metrics
from bbb_fast.experiments.drawing import BLUE, ORANGE, RED, SKY

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
labels = torch.from_numpy(digits.target).long()
order = torch.randperm(len(images))
train_x, train_y = images[order[:1000]], labels[order[:1000]]
test_x, test_y = images[order[1000:]], labels[order[1000:]]
print(f"{len(train_x)} images to train on, {len(test_x)} to test on, of shape {list(train_x.shape[1:])}")

# %% [markdown]
# ## Make it Bayesian
#
# Write the network as ever. `convert` returns a copy in which each weight has a mean $\mu$ and a standard
# deviation $\sigma$: the weight is distributed as $N(\mu, \sigma^2)$. The means start from the network's own
# weights. The prior says how large weights may be before any data are seen; here it is $N(0, 1)$.


# %%
def make() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


net = bbb_fast.convert(make(), priors={"prior_sigma": 1.0, "posterior_rho_initial": (-4, 0.1)})
print(bbb_fast.summary(net))

# %% [markdown]
# ## Train it
#
# Two things pull at the weights. The likelihood wants them to explain the data. The KL divergence wants their
# distribution to stay close to the prior, so that nothing is claimed that the data do not say. Their sum is
# the negative *evidence lower bound*:
#
# $$\text{loss} = \frac{1}{n} \sum_{i=1}^{n} -\ln p(y_i \mid x_i, w) + \frac{\beta}{N} \text{KL}(q \| p)$$
#
# for a minibatch of $n$ examples out of $N$. **Mind the scale.** The bound is that of the whole data set: one
# KL for all $N$ examples. Divided by $N$ it stands beside the mean cross-entropy, and learning rates are what
# you are used to. That is `reduction="mean"`. Forgetting to divide is the most frequent mistake: the prior
# then drowns the data.
#
# $\beta = 1$ is the exact bound. Small networks with few data often predict better with less; we take 0.1. It
# is a choice, so report it.


# %%
def train(model: nn.Module, beta: float) -> float:
    """Thirty epochs in place; returns the last loss."""
    elbo = bbb_fast.ELBO(len(train_x), reduction="mean", from_logits=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        for rows in torch.randperm(len(train_x)).split(100):
            optimizer.zero_grad()
            loss = elbo(model(train_x[rows]), train_y[rows], bbb_fast.kl_loss(model), beta)
            loss.backward()
            optimizer.step()
    return loss.item()


print(f"loss {train(net, beta=0.1):.3f}")

# %% [markdown]
# ## Ask it
#
# Each forward draws weights, in train and in eval mode. `predictive` draws 50 networks, asks each about all
# images, and keeps what they say together. The `seed` makes the answer the same each time.

# %%
answer = bbb_fast.predictive(net, test_x, samples=50, seed=0)
accuracy = metrics.accuracy(answer.probs, test_y)
print(f"accuracy {accuracy:.3f}, NLL {metrics.nll(answer.probs, test_y):.3f}")
assert accuracy > 0.95

# %% [markdown]
# ## What is it unsure about?
#
# The entropy of the mean probabilities says how unsure the model is in all. Here are the six test images with
# the highest. A bar is the mean probability of a class, dark for the true one; the line on it goes from the
# 10th to the 90th percentile of the draws. Long lines are disagreement.

# %%
unsure = answer.entropy.topk(6).indices
draws = bbb_fast.predict(net, test_x[unsure], samples=50, seed=0).softmax(-1)
low, high = draws.quantile(torch.tensor([0.1, 0.9]), dim=0)

figure, axes = plt.subplots(2, 6, figsize=(10, 3.6), layout="constrained", height_ratios=(1.3, 1))
for k, (image, bars) in enumerate(axes.T):
    image.imshow(test_x[unsure[k], 0], cmap="gray_r")
    image.set(xticks=[], yticks=[], title=f"a {test_y[unsure[k]].item()}")
    truth = test_y[unsure[k]].item()
    colors = [BLUE if c == truth else SKY for c in range(10)]
    bars.bar(range(10), answer.probs[unsure[k]], color=colors)
    bars.vlines(range(10), low[k], high[k], color="black", linewidth=1)
    bars.set(ylim=(0, 1), xticks=range(0, 10, 3), xlabel="class")
axes[1, 0].set_ylabel("probability")
for bars in axes[1, 1:]:
    bars.tick_params(labelleft=False)
plt.show()

# %% [markdown]
# Some of these are hard for people, too. Are the mistakes among such images? Then the model can leave a tenth
# of them to somebody else, and be right more often about the rest.

# %%
wrong = answer.prediction != test_y
keeps = answer.entropy <= answer.entropy.quantile(0.9)
accuracy_of_kept = metrics.accuracy(answer.probs[keeps], test_y[keeps])
print(f"accuracy on all {accuracy:.3f}, on the surest nine tenths {accuracy_of_kept:.3f}")
print(f"{(wrong & ~keeps).sum()} of {wrong.sum()} mistakes are in the tenth that it would not answer")
assert (wrong & ~keeps).sum() > 0.6 * wrong.sum()

# %% [markdown]
# ## Rotated digits
#
# Now we show it what it has never seen: the test images, turned. An ordinary network, trained by the same
# loop, stands beside it (a model without Bayesian layers has a KL of 0).


# %%
def rotated(x: Tensor, degrees: float) -> Tensor:
    angle = torch.tensor(degrees).deg2rad()
    cos, sin, zero = angle.cos(), angle.sin(), torch.tensor(0.0)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero]).view(1, 2, 3).expand(len(x), -1, -1)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


point = make()
train(point, beta=0.0)

angles = [0, 15, 30, 45, 60, 75, 90]
some, some_y = test_x[:300], test_y[:300]
asked = {
    "point estimate": [bbb_fast.predictive(point, rotated(some, a), samples=1) for a in angles],
    "Bayesian": [bbb_fast.predictive(net, rotated(some, a), samples=50, seed=0) for a in angles],
}
nll = {name: [metrics.nll(said.probs, some_y) for said in row] for name, row in asked.items()}
print(f"{'NLL at':<14}" + "".join(f"{a:>7}°" for a in angles))
for name, values in nll.items():
    print(f"{name:<14}" + "".join(f"{value:8.2f}" for value in values))
assert nll["Bayesian"][3] < 0.7 * nll["point estimate"][3]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for (name, row), color in zip(asked.items(), (RED, BLUE), strict=True):
    left.plot(
        angles, [said.probs.max(-1).values.mean() for said in row], color=color, label=f"{name}: confidence"
    )
    right_answers = [metrics.accuracy(said.probs, some_y) for said in row]
    left.plot(angles, right_answers, color=color, linestyle="--", label=f"{name}: accuracy")
left.set(xlabel="rotation in degrees", ylabel="mean over 300 images", ylim=(0, 1), xticks=angles)
left.legend(fontsize=8)
bayesian = asked["Bayesian"]
epistemic = torch.stack([said.mutual_information.mean() for said in bayesian])
aleatoric = torch.stack([said.expected_entropy.mean() for said in bayesian])
right.stackplot(
    angles,
    epistemic,
    aleatoric,
    colors=(BLUE, ORANGE),
    labels=("epistemic: draws disagree", "aleatoric: draws unsure"),
)
right.set(xlabel="rotation in degrees", ylabel="entropy in nats", xticks=angles)
right.legend(fontsize=8)
plt.show()
assert (epistemic + aleatoric)[3] > 3 * (epistemic + aleatoric)[0]

# %% [markdown]
# The point estimate is nearly as sure of what it has never seen as of what it knows. The Bayesian network
# becomes unsure as the images turn, and is punished far less for its mistakes.
#
# It is no guarantee. From 60 degrees on, the turned digits look like other digits to it (a 4, a 7), and it
# grows surer again while it is wrong. Uncertainty says that an input is unlike the training data in a way
# that matters to the network; it cannot see every way.
#
# On the right, the entropy in two parts: *epistemic* uncertainty, which more data would remove (turned digits
# in the training set, say), and *aleatoric* uncertainty, which each draw has by itself. [Two kinds of
# uncertainty](regression_uncertainty.md) explains them, and [the guide](../uncertainty.md) what else
# `predictive` tells.
