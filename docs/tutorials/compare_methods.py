# %% [markdown]
# # Four methods, one interface
#
# There are several ways to a network that knows what it does not know. They differ in what is random:
#
# - **Point estimate**: nothing. One set of weights; its softmax is all you get.
# - **MC dropout**: which units are dropped. Dropout stays on when the network predicts.
# - **LRT**: the weights. They have a Gaussian posterior, trained with the local reparameterization trick.
# - **Ensemble**: which of several networks answers. Each is trained from its own random start.
#
# Whatever is random, a draw is a function, and `predictive` averages draws. So one piece of code trains, asks
# and judges them all.
#
# The task: 800 images of the digits 0 to 7 to train on. New images of these digits measure accuracy and
# calibration, the same images turned by 30 degrees how it fares when the data change. The digits 8 and 9,
# which no network has seen, measure whether it notices.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import bbb_fast
from bbb_fast import metrics
from bbb_fast.experiments.drawing import BLUE, ORANGE

digits = load_digits()
images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
labels = torch.from_numpy(digits.target).long()
torch.manual_seed(0)
known = (labels < 8).nonzero().squeeze(-1)
known = known[torch.randperm(len(known))]
train_x, train_y = images[known[:800]], labels[known[:800]]
test_x, test_y = images[known[800:]], labels[known[800:]]
unknown_x = images[labels >= 8]


def turned(x: Tensor, degrees: float) -> Tensor:
    angle = torch.tensor(degrees).deg2rad()
    cos, sin, zero = angle.cos(), angle.sin(), torch.tensor(0.0)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero]).view(1, 2, 3).expand(len(x), -1, -1)
    return F.grid_sample(x, F.affine_grid(turn, list(x.shape), align_corners=False), align_corners=False)


turned_x = turned(test_x, 30)
print(f"{len(train_x)} images to train on, {len(test_x)} to test on, {len(unknown_x)} of unknown digits")

# %% [markdown]
# ## One network, one loop
#
# `kl_loss` is 0 for a model without Bayesian layers, so that the loss is the cross-entropy there. The KL
# counts with a weight of 0.1 ([the first tutorial](first_model.md) explains the loss).


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
        nn.Linear(128, 8),
    )


def train(model: nn.Module, number: int = 0) -> None:
    elbo = bbb_fast.ELBO(len(train_x), reduction="mean", from_logits=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        for rows in torch.randperm(len(train_x)).split(100):
            optimizer.zero_grad()
            loss = elbo(model(train_x[rows]), train_y[rows], bbb_fast.kl_loss(model), beta=0.1)
            loss.backward()
            optimizer.step()


# %% [markdown]
# ## Four models
#
# `mc_dropout` puts dropout before every layer but the first. `convert` makes the weights Gaussian.
# `train_members` makes and trains five networks and returns one `Ensemble`.

# %%
torch.manual_seed(1)
models = {
    "point estimate": make(),
    "MC dropout": bbb_fast.mc_dropout(make(), p=0.2),
    "LRT": bbb_fast.convert(make(), priors={"prior_sigma": 1.0, "posterior_rho_initial": (-4, 0.1)}),
}
for model in models.values():
    train(model)
models["ensemble"] = bbb_fast.methods.train_members(make, train, members=5, seed=2)

# %% [markdown]
# ## One judgement
#
# Twenty draws of each. (Of a point estimate they are all the same, and the ensemble's five members have four
# turns each.)
#
# - **NLL** is the mean of $-\ln p$ of the true class: lower is better. It is a *proper score*: only the true
#   probabilities minimise it.
# - **ECE** is the expected calibration error: how far confidence and accuracy are apart.
# - **AUROC** is the probability that an unknown digit has a higher entropy than a known one: 0.5 is guessing,
#   1 perfect.

# %%
scores, entropies = {}, {}
for name, model in models.items():
    seen = bbb_fast.predictive(model, test_x, samples=20, seed=0)
    changed = bbb_fast.predictive(model, turned_x, samples=20, seed=0)
    unseen = bbb_fast.predictive(model, unknown_x, samples=20, seed=0)
    entropies[name] = seen.entropy, unseen.entropy
    scores[name] = {
        "accuracy": metrics.accuracy(seen.probs, test_y),
        "NLL": metrics.nll(seen.probs, test_y),
        "ECE": metrics.ece(seen.probs, test_y),
        "NLL turned": metrics.nll(changed.probs, test_y),
        "ECE turned": metrics.ece(changed.probs, test_y),
        "AUROC": metrics.auroc(seen.entropy, unseen.entropy),
    }
print(f"{'':<14}" + "".join(f"{score:>12}" for score in scores["LRT"]))
for name, row in scores.items():
    print(f"{name:<14}" + "".join(f"{value:12.3f}" for value in row.values()))

# %%
figure, panels = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained", sharex=True, sharey=True)
bins = torch.linspace(0, 2.1, 22)
for panel, (name, (known, unknown)) in zip(panels, entropies.items(), strict=True):
    for entropy, color, label in ((known, BLUE, "known: 0 to 7"), (unknown, ORANGE, "unknown: 8 and 9")):
        share = torch.full_like(entropy, 1 / len(entropy))
        panel.hist(entropy, bins, weights=share, color=color, alpha=0.6, label=label)
    panel.set(title=name, xlabel="entropy in nats", yscale="log")
panels[0].set_ylabel("share of the images")
panels[-1].legend(fontsize=8)
plt.show()

# %%
point = scores.pop("point estimate")
for row in scores.values():
    assert row["NLL turned"] < 0.8 * point["NLL turned"]
    assert row["ECE turned"] < 0.9 * point["ECE turned"]

# %% [markdown]
# On images like those of the training all four are close. The difference comes when the data change: the
# point estimate stays sure, and each of the others is punished less for its mistakes.
#
# Do not read a ranking from one small run with one seed. Read what each costs: MC dropout is one training and
# several forwards, LRT about twice the training and several forwards, an ensemble of five is five times
# everything. Another seed moves the last columns; [Classification](../classification.md) compares the methods
# on real data with several.
