# %% [markdown]
# # First steps
#
# A model that is sure of what it has seen, and says so where it has seen nothing. The layer is linear in bumps
# that lie side by side along the input, so that each weight speaks for one place.

# %%
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional as F

import bbb_fast
from bbb_fast.layers import BBB_LRT_Linear

torch.manual_seed(0)
x = torch.cat([torch.rand(60) * 2 - 3, torch.rand(60) * 2 + 1])
y = torch.sin(2 * x) + 0.1 * torch.randn(120)
centres = torch.linspace(-4, 4, 33)


def bumps(x: Tensor) -> Tensor:
    return torch.exp(-(((x[:, None] - centres) / 0.3) ** 2) / 2)


layer = BBB_LRT_Linear(33, 1, bias=False, priors={"prior_sigma": 1.0})

# %% [markdown]
# The loss is that of one example: the mean negative log likelihood, here of a Gaussian whose standard deviation
# is 0.1, and the KL divided by the number of training examples.

# %%
optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
for _ in range(400):
    optimizer.zero_grad()
    nll = F.gaussian_nll_loss(layer(bumps(x)).squeeze(-1), y, torch.full_like(y, 0.1**2))
    loss = nll + bbb_fast.kl_loss(layer) / len(x)
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.2f}")

# %% [markdown]
# `predictive` draws the weights many times. Where the draws disagree the model does not know: epistemic
# uncertainty is larger in the gap than among the data.

# %%
grid = torch.linspace(-4, 4, 200)
answer = bbb_fast.predictive(layer, bumps(grid), samples=100, likelihood="gaussian", noise_std=0.1, seed=0)
mean, std = answer.mean.squeeze(-1), answer.epistemic.squeeze(-1).sqrt()
gap, among = std[grid.abs() < 0.5].mean(), std[(grid - 2).abs() < 0.5].mean()
print(f"epistemic standard deviation: {gap:.2f} in the gap, {among:.2f} among the data")
assert gap > 3 * among

figure, axes = plt.subplots()
axes.fill_between(grid, mean - 2 * std, mean + 2 * std, alpha=0.25, label="two standard deviations")
axes.plot(grid, mean, label="mean")
axes.plot(x, y, "k.", markersize=3, label="data")
axes.legend()
plt.show()
