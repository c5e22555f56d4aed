# %% [markdown]
# # Two kinds of uncertainty
#
# A prediction can be uncertain for two reasons. The model may not have seen enough: *epistemic* uncertainty,
# which more data remove. Or the data may be noisy: *aleatoric* uncertainty, which no amount of data removes.
# They call for different actions. The first says "measure here". The second says "measuring again will not
# help".
#
# In one dimension we can look at both. The points below have a gap in the middle, and more noise on the right
# than on the left.

# %%
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import bbb_fast
from bbb_fast import GaussianPredictive, metrics
from bbb_fast.experiments.drawing import BLUE, ORANGE, RED, SKY
from bbb_fast.methods import gaussian_nll


def truth(x: Tensor) -> Tensor:
    return torch.sin(1.8 * x) + 0.3 * x


def noise_std(x: Tensor) -> Tensor:
    return torch.where(x < 0, 0.1, 0.4)


def measure(points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Half of the points in [-3, -1], half in [1, 3]."""
    generator = torch.Generator().manual_seed(seed)
    x = 1 + 2 * torch.rand(points, generator=generator)
    x[::2] -= 4
    return x, truth(x) + noise_std(x) * torch.randn(points, generator=generator)


x, y = measure(200, seed=0)
grid = torch.linspace(-4.5, 4.5, 181)
on_data = (grid.abs() >= 1) & (grid.abs() <= 3)
gap, outside = grid.abs() < 0.5, grid.abs() > 4

# %% [markdown]
# ## A model with two outputs
#
# For each input, the model returns a mean and the logarithm of a variance. The variance is the noise that it
# expects in the data: the aleatoric part. `gaussian_nll` is the loss of such outputs:
#
# $$\frac{1}{2} \left( \ln 2\pi + s + (y - m)^2 e^{-s} \right)$$
#
# with $m$ the mean and $s$ the log variance. A large variance makes errors cheap, but costs $s/2$ itself. So
# the model calls noise what it cannot explain, and no more.
#
# The epistemic part comes from the weights of the mean. The mean is a sum of 41 bumps side by side, each with
# a weight: a weight speaks for one place. The noise is a small ordinary network.


# %%
class Bumps(nn.Module):
    """[N, 1] to [N, 41]: how near x is to each of 41 places."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.linspace(-5, 5, 41))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-0.5 * ((x - self.places) / 0.3) ** 2)


class Model(nn.Module):
    """[N, 1] to [N, 2], mean and log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(Bumps(), nn.Linear(41, 1))
        self.noise = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mean(x), self.noise(x)], -1)


# %% [markdown]
# ## Training
#
# `convert` makes the layers of the mean Bayesian, with the *local reparameterization trick* ("lrt", the
# default): instead of noisy weights, each layer draws the noise of its outputs, which makes the gradients
# less noisy. The prior of each weight is $N(0, 1)$.
#
# The loss is the exact evidence lower bound, per example: the mean NLL plus KL divided by the number of
# points.


# %%
def train(x: Tensor, y: Tensor, steps: int = 2000) -> nn.Module:
    torch.manual_seed(0)
    net = bbb_fast.convert(Model(), "lrt", include="mean", priors={"prior_sigma": 1.0})
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (100,))
        loss = gaussian_nll(net(x[rows, None]), y[rows]) + bbb_fast.kl_loss(net) / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


net = train(x, y)

# %% [markdown]
# ## The picture
#
# One draw of the weights is one function. On the left are twenty of them. They agree where there are data and
# go their own ways elsewhere. On the right is what `predictive` makes of 200 draws, by the law of total
# variance:
#
# $$\text{Var}(y) = \text{Var}_w(m) + \text{E}_w(e^{s})$$
#
# The first term, the variance of the means, is epistemic. The second, the mean of the variances, is
# aleatoric.


# %%
def ask(net: nn.Module, x: Tensor) -> GaussianPredictive:
    return bbb_fast.predictive(net, x[:, None], samples=200, likelihood="heteroscedastic", seed=0)


def draw_data(axes: Axes, x: Tensor, y: Tensor) -> None:
    axes.plot(grid, truth(grid), color="0.35", linestyle="--", linewidth=1, label="true function")
    axes.plot(x, y, ".", color="black", markersize=3, label="data")
    axes.set(xlabel="x", xlim=(-4.5, 4.5), ylim=(-4, 4))


answer = ask(net, grid)
functions = bbb_fast.predict(net, grid[:, None], samples=20, seed=0)[..., 0]
epistemic, total = answer.epistemic.sqrt(), answer.variance.sqrt()

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
left.plot(grid, functions.T, color=BLUE, linewidth=0.8, alpha=0.5)
draw_data(left, x, y)
left.set(title="twenty draws of the weights", ylabel="y")
for std, color, label in ((total, SKY, "all: ± 2 standard deviations"), (epistemic, BLUE, "epistemic part")):
    low, high = answer.mean - 2 * std, answer.mean + 2 * std
    right.fill_between(grid, low, high, color=color, alpha=0.5, linewidth=0, label=label)
right.plot(grid, answer.mean, color=RED, label="mean")
draw_data(right, x, y)
right.set(title="what 200 draws say together")
figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
plt.show()

# %% [markdown]
# The epistemic band is narrow on the data and wide off them. The rest of the light band is the noise: narrow
# on the left, wide on the right. In numbers:

# %%
aleatoric = answer.aleatoric.sqrt()
left_side, right_side = on_data & (grid < 0), on_data & (grid > 0)
print("mean standard deviation")
for name, where in (("on the data", on_data), ("in the gap", gap), ("outside", outside)):
    print(f"  epistemic {name:<12} {epistemic[where].mean():.3f}")
for name, where in (("left", left_side), ("right", right_side)):
    print(f"  aleatoric {name:<12} {aleatoric[where].mean():.3f}, true {noise_std(grid[where]).mean():.3f}")
assert epistemic[gap].mean() > 3 * epistemic[on_data].mean()
assert epistemic[outside].mean() > 3 * epistemic[on_data].mean()
assert aleatoric[right_side].mean() > 2 * aleatoric[left_side].mean()

# %% [markdown]
# **How far to trust this.** The bumps make it easy: where a weight has no data, its posterior is the prior.
# In a network of several layers all weights speak for all places, and a factorized Gaussian is often surer in
# a gap than it should be ([Regression](../regression.md) shows by how much, for seven methods). A band says
# where the mean is not to be trusted, not how wrong it is. And off the data, the noise is a function like any
# other, with nothing to learn from.
#
# On fresh points from where the data are, the whole band can be checked: of 95 % intervals, about 95 % should
# hold.

# %%
new_x, new_y = measure(2000, seed=1)
said = ask(net, new_x)
covered = metrics.picp(said.mean, said.variance, new_y)
print(f"95 % intervals hold {covered:.1%} of new points")
assert 0.88 < covered < 0.995

# %% [markdown]
# ## Which part do more data remove?
#
# That is the test of the two words. We train again with ten times the points.

# %%
more = train(*measure(2000, seed=2))
answers = {"200 points": answer, "2,000 points": ask(more, grid)}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
for (name, said), color in zip(answers.items(), (SKY, BLUE), strict=True):
    left.plot(grid, said.epistemic.sqrt(), color=color, label=name)
    right.plot(grid[left_side], said.aleatoric.sqrt()[left_side], color=color, label=name)
    right.plot(grid[right_side], said.aleatoric.sqrt()[right_side], color=color)
for side in (left_side, right_side):
    title = "true noise" if side is left_side else None
    right.plot(grid[side], noise_std(grid[side]), color=ORANGE, linestyle="--", label=title)
left.set(title="epistemic", xlabel="x", ylabel="standard deviation", ylim=(0, None))
right.set(title="aleatoric, where there are data", xlabel="x")
for axes in (left, right):
    axes.legend(fontsize=8)
plt.show()

# %%
for name, said in answers.items():
    epistemic, aleatoric = said.epistemic.sqrt()[on_data].mean(), said.aleatoric.sqrt()[right_side].mean()
    print(f"{name:>12}: epistemic on the data {epistemic:.3f}, aleatoric on the right {aleatoric:.3f}")
few, many = answers.values()
assert many.epistemic.sqrt()[on_data].mean() < 0.7 * few.epistemic.sqrt()[on_data].mean()
assert 0.34 < many.aleatoric.sqrt()[right_side].mean() < 0.46

# %% [markdown]
# The epistemic part falls; the aleatoric part is the true noise and stays. [Regression](../regression.md) has
# the same picture for networks, and tables on real data; `HeteroscedasticHead` is a last layer with both
# outputs.
