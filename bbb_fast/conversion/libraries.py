"""convert_state_dict: what other libraries' Bayesian layers have saved, in the names that these have."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bayesian import inverse_softplus

__all__ = ["convert_state_dict"]


class _Entry(NamedTuple):
    """What a tensor of a layer is."""

    part: str  # "weight" or "bias"
    kind: str  # "mu", "rho", "prior_mu" or "prior_sigma"


class _Library(NamedTuple):
    """What a library's layers save, by the names behind the layer's path in the model."""

    # Of two names of one entry the first counts.
    entries: dict[str, _Entry]
    # Neither posterior nor prior: the last draw's noise, the zeros of a bias that is none.
    left_out: tuple[str, ...] = ()
    # Whether the rho there is ln(sigma).
    logarithmic: bool = False


def _of_both(**names: str) -> dict[str, _Entry]:
    """The names of each kind, for weight and bias, which stand where the "*" is."""
    return {
        name.replace("*", part): _Entry(part, kind)
        for kind, several in names.items()
        for name in several.split()
        for part in ("weight", "bias")
    }


_LIBRARIES = {
    "PyTorch-BayesianCNN": _Library(
        {
            "W_mu": _Entry("weight", "mu"),
            "W_rho": _Entry("weight", "rho"),
            "bias_mu": _Entry("bias", "mu"),
            "bias_rho": _Entry("bias", "rho"),
        }
    ),
    "bayesian-torch": _Library(
        {
            **_of_both(mu="mu_*", rho="rho_*", prior_mu="prior_*_mu", prior_sigma="prior_*_sigma"),
            "mu_kernel": _Entry("weight", "mu"),
            "rho_kernel": _Entry("weight", "rho"),
        },
        left_out=("eps_weight", "eps_kernel", "eps_bias"),
    ),
    "blitz": _Library(
        # A forward draws from the samplers' parameters.
        _of_both(mu="*_sampler.mu *_mu", rho="*_sampler.rho *_rho"),
        left_out=("weight_sampler.eps_w", "bias_sampler.eps_w", "bias_zero"),
    ),
    "torchbnn": _Library(
        _of_both(mu="*_mu", rho="*_log_sigma"), left_out=("weight_eps", "bias_eps"), logarithmic=True
    ),
}
# Names that two libraries have tell neither.
_COUNTS = Counter(name for library in _LIBRARIES.values() for name in library.entries)
_TELLING = {
    label: [name for name in library.entries if _COUNTS[name] == 1] for label, library in _LIBRARIES.items()
}

# A layer's keys, by what they are.
_Layer = dict[_Entry, list[str]]


def convert_state_dict(state_dict: Mapping[str, Any], library: str = "auto") -> dict[str, Any]:
    """The ``state_dict`` of a model with another library's layers, for the same model with these.

    ``model.load_state_dict(convert_state_dict(state))`` then checks names and shapes, as ever. The model has
    its layers under the names that they have there; what belongs to no Bayesian layer keeps its name. Weights
    are laid out alike everywhere, and sigma is softplus(rho), but in torchbnn, whose ln(sigma) becomes rho.
    Noise that layers keep in buffers is left out. No tensor is changed, and those that stay are shared.

    - "PyTorch-BayesianCNN": the names are the same here.
    - "bayesian-torch": an LSTM's become those of ``BBBLSTM``; priors, if they were saved, come along.
    - "blitz": the samplers' parameters, which its forward draws from. Where the layer's own differ, as they
      do once a model was moved to another device or type and trained there, a warning says so. A
      BayesianLinear without bias has saved one nevertheless: ``load_state_dict(..., strict=False)``.
    - "torchbnn": a BayesBatchNorm2d's become those of ``WeightSpace(nn.BatchNorm2d(...))``.

    Args: ``library``, one of these, or "auto": that whose names there are.
    Raises TypeError for a ``state_dict`` that is no mapping, and for a mean or a rho that is no tensor;
    ValueError for an unknown library, where "auto" finds none or several, for means without rho or the other
    way round (all are named), and for blitz's recurrent layers, which have no twin here: one bias for both
    products, and perhaps peepholes, of which a ``state_dict`` says nothing.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"convert_state_dict: state_dict must be a mapping, got {type(state_dict).__name__}")
    if library == "auto":
        library = _told_by(state_dict)
    elif library not in _LIBRARIES:
        raise ValueError(
            f"convert_state_dict: library must be 'auto' or one of {', '.join(_LIBRARIES)}, got {library!r}"
        )
    described = _LIBRARIES[library]
    layers = _layers(state_dict, described)
    _check(state_dict, library, layers)
    differing = [
        f"{first} and not {other}"
        for layer in layers.values()
        for first, *others in layer.values()
        for other in others
        if not torch.equal(state_dict[first], state_dict[other])
    ]
    if differing:
        warnings.warn(
            f"convert_state_dict: taken is what {library}'s forward draws from, where two differ: "
            f"{', '.join(differing)}",
            stacklevel=2,
        )
    result: dict[str, Any] = {}
    done: set[str] = set()
    norms: list[str] = []
    for path, layer in layers.items():
        place = _place(path, layers, state_dict)
        if place.suffix == "":
            norms.append(path)
        for entry, keys in layer.items():
            value = state_dict[keys[0]]
            of_sigma = described.logarithmic and entry.kind == "rho"
            result[place.key(entry)] = _rho(value) if of_sigma else value
        done.update(path + name for name in (*described.entries, *described.left_out))
    for key, value in state_dict.items():
        if key not in done:
            norm = next((path for path in norms if key.startswith(path)), None)
            result[key if norm is None else f"{norm}module.{key.removeprefix(norm)}"] = value
    return result


class _Place(NamedTuple):
    """Where a layer's entries go: to a layer, or to a module in weight space."""

    path: str
    # Of the module's names, behind "weight" and "bias".
    suffix: str | None = None

    def key(self, entry: _Entry) -> str:
        part, kind = entry
        if self.suffix is not None:
            name = part + self.suffix
            inside = {"mu": f"module.{name}", "rho": f"rho.{name}"}
            return self.path + inside.get(kind, f"{kind}:{name}")
        if kind in ("mu", "rho"):
            return f"{self.path}{'W' if part == 'weight' else 'bias'}_{kind}"
        return self.path + (kind if part == "weight" else f"bias_{kind}")


def _place(path: str, layers: Mapping[str, _Layer], state_dict: Mapping[str, Any]) -> _Place:
    def shape(of: str) -> list[int]:
        return list(state_dict[layers[of][_Entry("weight", "mu")][0]].shape)

    if len(shape(path)) == 1:
        return _Place(path, "")
    # bayesian-torch's LSTM is two linear layers: of the input, and of the hidden state.
    for own in ("ih.", "hh."):
        base = _path(path, own)
        if base is not None and {base + "ih.", base + "hh."} <= layers.keys():
            of_input, of_state = shape(base + "ih."), shape(base + "hh.")
            if len(of_state) == 2 and of_state[0] == 4 * of_state[1] == of_input[0]:
                return _Place(base, f"_{own[:2]}_l0")
    return _Place(path)


def _told_by(state_dict: Mapping[str, Any]) -> str:
    """The library whose names there are."""
    found: dict[str, str] = {}
    for label, names in _TELLING.items():
        for key in state_dict:
            if any(_path(key, name) is not None for name in names):
                found.setdefault(label, key)
    if not found:
        known = "; ".join(f"{label}: {', '.join(names[:2])}" for label, names in _TELLING.items())
        raise ValueError(
            f"convert_state_dict: no key is of a Bayesian layer of these libraries ({known}), got "
            f"{', '.join(map(repr, list(state_dict)[:4])) or 'none at all'}"
        )
    if len(found) > 1:
        parts = " and ".join(f"{label} ({key!r})" for label, key in found.items())
        raise ValueError(f"convert_state_dict: there are keys of {parts}; say with library= which it is")
    return next(iter(found))


def _path(key: str, name: str) -> str | None:
    """What is before an entry's name in a key that ends with it, the dot included."""
    path = key.removesuffix(name)
    return path if path != key and (not path or path.endswith(".")) else None


def _layers(state_dict: Mapping[str, Any], library: _Library) -> dict[str, _Layer]:
    """The Bayesian layers by their paths: where a part of a weight's posterior is."""
    found: dict[str, _Layer] = {}
    for name, entry in library.entries.items():
        for key in state_dict:
            if (path := _path(key, name)) is not None:
                found.setdefault(path, {}).setdefault(entry, []).append(key)
    of_weight = {_Entry("weight", "mu"), _Entry("weight", "rho")}
    return {path: layer for path, layer in found.items() if of_weight & layer.keys()}


def _check(state_dict: Mapping[str, Any], library: str, layers: Mapping[str, _Layer]) -> None:
    for key in state_dict:
        if library == "blitz" and _path(key, "weight_hh_mu") is not None:
            raise ValueError(
                f"convert_state_dict: {key} is of a recurrent layer of blitz, which has no twin here: one "
                "bias for both products, and perhaps peepholes, of which a state_dict says nothing"
            )
    alone = []
    for layer in layers.values():
        for (part, kind), keys in layer.items():
            for key in keys:
                if not isinstance(state_dict[key], Tensor):
                    raise TypeError(
                        f"convert_state_dict: {key} must be a tensor, got {type(state_dict[key]).__name__}"
                    )
            if _Entry(part, {"mu": "rho", "rho": "mu"}.get(kind, kind)) not in layer:
                alone.append(keys[0])
    if alone:
        raise ValueError(
            "convert_state_dict: a posterior is a mean and a rho (in torchbnn ln(sigma)), got one without "
            f"the other: {', '.join(alone)}"
        )


def _rho(log_sigma: Tensor) -> Tensor:
    wide = log_sigma.double()
    # Below, rho = ln(sigma) + sigma / 2 + ..., and sigma may be 0 to every type.
    return torch.where(wide < -40, wide, inverse_softplus(wide.exp())).to(log_sigma.dtype)
