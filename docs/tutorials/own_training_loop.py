# %% [markdown]
# # Your own training loop
#
# Nothing here needs a trainer. Bayesian layers are modules, the KL is a scalar, and the rest is PyTorch. This
# page writes the loop out and adds what you may want in it: several draws in a step, a KL that comes in
# slowly, a draw that can be repeated, and a checkpoint from which training goes on bit for bit.
#
# The data are scikit-learn's diabetes set: ten numbers of 442 patients, and how the disease went on a year
# later.

# %%
import tempfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import bbb_fast
from bbb_fast import metrics
from bbb_fast.experiments.drawing import BLUE, ORANGE, RED
from bbb_fast.methods import GaussianNoise, gaussian_nll

torch.manual_seed(0)
bunch = load_diabetes()
inputs, targets = torch.from_numpy(bunch.data).float(), torch.from_numpy(bunch.target).float()
order = torch.randperm(len(inputs))
train_rows, test_rows = order[:350], order[350:]
scale = targets[train_rows].std()
x = (inputs - inputs[train_rows].mean(0)) / inputs[train_rows].std(0)
y = (targets - targets[train_rows].mean()) / scale
train_x, train_y, test_x, test_y = x[train_rows], y[train_rows], x[test_rows], y[test_rows]


def make() -> nn.Module:
    """Mean and log variance of a target, [N, 2]; the variance is one number, learned."""
    torch.manual_seed(0)
    mean = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1), nn.Flatten(0))
    priors = {"prior_sigma": 0.3, "posterior_rho_initial": (-4, 0.1)}
    return nn.Sequential(bbb_fast.convert(mean, priors=priors), GaussianNoise())


# %% [markdown]
# ## Several draws in a step
#
# The loss is an expectation over the weights, and one draw is a noisy estimate of it. `multi_sample` draws S
# times in one forward and returns [S, N, ...]. For linear layers that is cheaper than S forwards: each layer
# reads its parameters once. It helps where the noise of the draws, and not that of the minibatch, holds
# training up.
#
# How much noise is it? Here is the standard deviation of the gradient of the first layer's means, on one and
# the same batch.


# %%
def loss_of(net: nn.Module, x: Tensor, y: Tensor, beta: float, samples: int) -> Tensor:
    output = bbb_fast.multi_sample(net, x, samples)  # [S, N, 2]
    nll = gaussian_nll(output.flatten(0, 1), y.repeat(samples))
    return nll + beta * bbb_fast.kl_loss(net) / len(train_x)


net = make()
counts, noise = [1, 2, 4, 8, 16], []
for samples in counts:
    gradients = []
    for _ in range(50):
        loss = loss_of(net, train_x[:50], train_y[:50], beta=1.0, samples=samples)
        gradients.append(torch.autograd.grad(loss, net[0][0].W_mu)[0])
    noise.append(torch.stack(gradients).std(0).mean().item())
    print(f"S = {samples:2}: standard deviation of a gradient {noise[-1]:.5f}")
assert noise[-1] < 0.35 * noise[0]

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(counts, [s**-0.5 for s in counts], color=ORANGE, linewidth=4, label=r"$1 / \sqrt{S}$")
axes.plot(counts, [of_s / noise[0] for of_s in noise], "o--", color=BLUE, label="measured")
axes.set(xscale="log", yscale="log", xlabel="draws in a step, S", ylabel="noise of a gradient, S = 1 is 1")
axes.set_xticks(counts, [str(s) for s in counts])
axes.set_yticks([1, 0.5, 0.25], ["1", "1/2", "1/4"])
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# ## The loop, with annealing
#
# At the start the posterior says nothing yet, and a full KL may switch units off before they have learned. So
# its weight rises from 0 to 1. `get_beta` knows the schedules of the literature; "Soenderby" is this warm-up,
# over the first quarter of the epochs. (Its first two arguments are of other schedules.)
#
# All random numbers of an epoch, the order of the rows and the layers' noise, come from PyTorch's generator.

# %%
EPOCHS = 60


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int
) -> Iterator[dict[str, float]]:
    for epoch in range(start, stop):
        beta = bbb_fast.get_beta(0, 1, "Soenderby", epoch, EPOCHS)
        for rows in torch.randperm(len(train_x)).split(50):
            optimizer.zero_grad()
            loss = loss_of(net, train_x[rows], train_y[rows], beta, samples=4)
            loss.backward()
            optimizer.step()
        yield {"beta": beta, "loss": loss.item(), "KL": bbb_fast.kl_loss(net).item()}


def new_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.01)


optimizer = new_optimizer(net)
torch.manual_seed(1)
history = list(train(net, optimizer, 0, EPOCHS))
said = bbb_fast.predictive(net, test_x, samples=100, likelihood="heteroscedastic", targets=test_y, seed=0)
blind = torch.zeros_like(test_y), torch.ones_like(test_y)  # mean and variance of all training targets
rmse, rmse_of_blind = metrics.rmse(said.mean, test_y), metrics.rmse(blind[0], test_y)
density = said.log_likelihood.mean().item()  # of the mixture of the draws
density_of_blind = metrics.gaussian_log_density(*blind, test_y).mean().item()
print(f"test RMSE {rmse * scale:.1f}, log density {density:.2f}")
print(f"without looking at the inputs: {rmse_of_blind * scale:.1f} and {density_of_blind:.2f}")
assert rmse < 0.8 * rmse_of_blind
assert density > density_of_blind + 0.1

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot([entry["beta"] for entry in history], color=RED)
left.set(xlabel="epoch", ylabel="weight of the KL")
right.plot([entry["KL"] for entry in history], color=BLUE)
right.set(xlabel="epoch", ylabel="KL in nats")
plt.show()

# %% [markdown]
# ## A draw that can be repeated
#
# `fixed_noise(seed, sample=k)` pins the weights: within it, the network is one ordinary function. It is the
# same for every batch, in every later call, on every device. `predict` with that seed has it at place k.

# %%
with torch.no_grad(), bbb_fast.fixed_noise(7, sample=3):
    whole = net(test_x)
    parts = torch.cat([net(part) for part in test_x.split(20)])
drawn = bbb_fast.predict(net, test_x, samples=5, seed=7)
torch.testing.assert_close(parts, whole)
torch.testing.assert_close(drawn[3], whole)
assert not torch.allclose(drawn[2], whole)
print("one function, in one batch, in parts, and in predict")

# %% [markdown]
# ## Stop, and go on bit for bit
#
# A checkpoint needs the model, the optimizer, the generator's state and the epoch. The noise is never stored
# anywhere: it follows from the generator. So a run that was interrupted ends with the very same bits.


# %%
def save(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
    torch.save(state | {"rng": torch.get_rng_state()}, path)


def load(path: Path) -> tuple[nn.Module, torch.optim.Optimizer, int]:
    state = torch.load(path, weights_only=True)
    net = make()
    net.load_state_dict(state["model"])
    optimizer = new_optimizer(net)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])  # last, as making the model draws numbers
    return net, optimizer, state["epoch"]


with tempfile.TemporaryDirectory() as folder:
    checkpoint = Path(folder) / "checkpoint.pt"
    interrupted = make()
    optimizer = new_optimizer(interrupted)
    torch.manual_seed(1)
    list(train(interrupted, optimizer, 0, 20))
    save(checkpoint, interrupted, optimizer, 20)
    del interrupted, optimizer
    resumed, optimizer, epoch = load(checkpoint)
list(train(resumed, optimizer, epoch, EPOCHS))
same = [torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters(), strict=True)]
print(f"{sum(same)} of {len(same)} parameters are equal, bit for bit")
assert all(same)

# %% [markdown]
# ## Compiled
#
# `torch.compile(net)` works as for any model: the ops are known to the compiler, also with `fullgraph=True`,
# and each call draws fresh noise. It may speed up what lies between the layers; the layers' own kernels are
# fused already. It is not run here, as compiling takes longer than this page.
