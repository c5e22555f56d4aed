"""convert: a torch.nn model becomes Bayesian; posterior_to_prior: what it has learned becomes its prior."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import is_lazy
from .._noise import RandomModule
from ..layers import WeightSpace
from ..layers.base import BayesianModule
from ..priors import resolve_priors
from ..reference import softplus
from ..routes import VarianceDtype
from . import rules

_NOT_INITIALISED = " (not initialised)"

Wanted = str | type | Callable[[str, nn.Module], bool] | Iterable[Any] | None


def convert(
    model: nn.Module,
    estimator: str = "lrt",
    *,
    priors: Mapping[str, Any] | None = None,
    moped_delta: float | None = None,
    include: Wanted = None,
    exclude: Wanted = (),
    others: str = "keep",
    variance_dtype: VarianceDtype = None,
) -> nn.Module:
    """A Bayesian copy of ``model``, whose posterior means are its weights; the original stays as it is.

    Linear and bilinear layers, convolutions and transposed convolutions get ``estimator`` ("bbb", "lrt" or
    "flipout"); embeddings, recurrent layers and attention go to weight space, and so do modules of all these
    kinds whose weights are parametrized (weight and spectral norm: the posterior is over what is trained).
    Under ``posterior_means()`` the copy equals the model. It keeps device, dtype, memory format, training
    mode, hooks, which parameters are trained, and ties: parameters that modules share are shared by their
    posteriors, count once in the KL, and are one draw under ``fixed_noise`` and in ``predict``.

    Args:
        priors: of the layers; sigma starts from ``posterior_rho_initial``, the means never do.
        moped_delta: prior N(w, (d |w|)^2) and posterior sigma d |w| instead, |w| being at least a tenth of
            its root mean square over the tensor (of zeros: 0.1). Prior mean and posterior are those of
            Krishnan, Subedar and Tickoo, "Specifying weight priors in Bayesian deep neural networks with
            empirical Bayes" (MOPED), AAAI 2020; with this width of the prior the KL starts at 0.
        include, exclude: names (fnmatch patterns, as "features.*"), module types, functions
            ``(name, module) -> bool``, modules of the model, or several of these: convert only what
            ``include`` says, by any of its names, with all below it, and nothing that ``exclude`` says, nor
            anything below that.
        others: "weights" puts every other module with parameters of its own into weight space, norms too, if
            it has a forward and nothing Bayesian in it; "keep" leaves it. A warning names the kinds that are
            left, but for norms; ``summary`` lists all.
        variance_dtype: of the lrt layers.

    Weight decay pulls rho to 0, a sigma of 0.69: give the posteriors' parameters none.

    A ``nn.TransformerEncoder`` of Bayesian layers never takes torch.nn's fast path of eval mode, which writes
    zeros for padded tokens: it has numbers there, as torch.nn has where it records gradients.

    Raises TypeError for what is no module, and for one in DataParallel, DistributedDataParallel or
    FullyShardedDataParallel, ValueError for an unknown estimator or value.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if rules.is_wrapper(module):
            raise TypeError(
                f"convert: convert the model inside {type(module).__name__} and wrap the result, so that it "
                "knows the new parameters"
            )
    if estimator not in rules.FAMILIES:
        raise ValueError(f"convert: estimator must be one of {', '.join(rules.FAMILIES)}, got {estimator!r}")
    if others not in ("keep", "weights"):
        raise ValueError(f"convert: others must be 'keep' or 'weights', got {others!r}")
    if moped_delta is not None and not 0 < float(moped_delta) < float("inf"):
        raise ValueError(f"convert: moped_delta must be > 0, got {moped_delta!r}")
    resolve_priors(priors)
    if estimator != "lrt" and variance_dtype is not None:
        raise ValueError(f"convert: variance_dtype is an option of lrt, and the estimator is {estimator}")
    wanted = None if include is None else _selected(model, _selection("include", include))
    if wanted is not None and not wanted:
        raise ValueError(f"convert: include={include!r} is none of the model's modules")
    unwanted = _selected(model, _selection("exclude", exclude))
    copied = rules.copy_of(model)
    of_original = dict(zip(model.modules(), copied.modules(), strict=True))
    work = _Conversion(
        rules.FAMILIES[estimator],
        priors,
        moped_delta,
        set(of_original.values()) if wanted is None else {of_original[m] for m in wanted},
        {of_original[m] for m in unwanted},
        others,
        variance_dtype,
    )
    return work.run(copied)


def _selected(model: nn.Module, select: rules.Select) -> set[nn.Module]:
    """The modules that are selected by any of their names, and those below them."""
    found: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in found and select(name, module):
            found.update(module.modules())
    return found


def _selection(label: str, wanted: Wanted) -> rules.Select:
    """Whether a name and a module are among what is wanted."""
    if isinstance(wanted, str):
        return lambda name, _: fnmatch.fnmatchcase(name, wanted)
    if isinstance(wanted, type):
        return lambda _, module: isinstance(module, wanted)
    if isinstance(wanted, nn.Module):
        return lambda _, module: module is wanted
    if callable(wanted):
        return lambda name, module: bool(wanted(name, module))
    if isinstance(wanted, Iterable):
        parts = [_selection(label, part) for part in wanted]
        return lambda name, module: any(part(name, module) for part in parts)
    raise TypeError(
        f"convert: {label} must be a name, a type, a function (name, module) -> bool, or several of these, "
        f"got {type(wanted).__name__}"
    )


class _Conversion:
    """One call of ``convert``, on a copy of the model."""

    def __init__(
        self,
        family: Any,
        priors: Mapping[str, Any] | None,
        moped_delta: float | None,
        included: set[nn.Module],
        excluded: set[nn.Module],
        others: str,
        variance_dtype: VarianceDtype,
    ) -> None:
        self._family, self._priors, self._moped_delta = family, priors, moped_delta
        self._included, self._excluded = included, excluded
        self._others, self._variance_dtype = others, variance_dtype
        # By the module it stands for: one that is registered twice stays one.
        self._made: dict[nn.Module, nn.Module] = {}
        # By the id of a mean: its rho.
        self._rhos: dict[int, nn.Parameter] = {}
        self._left: set[str] = set()

    def run(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, BayesianModule) and not is_lazy(module):
                self._rhos.update((id(mu), rho) for mu, rho in module.posterior())
        model = self._converted(model)
        replaced = {id(old): new for old, new in self._made.items() if new is not old}
        for module in model.modules():
            rules.point_to(module, replaced)
        if self._left:
            left = ", ".join(sorted(self._left))
            also = "" if self._others == "weights" else "others='weights' makes what it can Bayesian, "
            if _NOT_INITIALISED in left:
                also = "run a forward before convert, so that all parameters have shapes; " + also
            warnings.warn(
                f"convert: left as they are, with parameters of their own: {left}; {also}summary(model) "
                "lists what is not",
                stacklevel=3,
            )
        return model

    def _converted(self, module: nn.Module) -> nn.Module:
        """What stands for the module: itself, with what is below it converted, or a Bayesian one."""
        if module in self._made:
            return self._made[module]
        if module in self._excluded or isinstance(module, RandomModule):
            return module
        included = module in self._included
        made = self._bayesian(module) if included else None
        if made is None:
            self._made[module] = module
            reads = isinstance(module, rules.READERS)
            for name, child in list(module._modules.items()):
                if child is not None and not reads:
                    module._modules[name] = self._converted(child)
            made = self._other(module) if included else module
        self._made[module] = made
        return made

    def _bayesian(self, module: nn.Module) -> nn.Module | None:
        """The layer in the place of a module of a kind that there are layers for."""
        kind = rules.kind_of(module)
        if kind is None or is_lazy(module) or rules.is_complex(module):
            return None
        if getattr(module, "max_norm", None) is not None:
            return None
        if rules.is_parametrized(module) or kind not in rules.LAYERS:
            return self._dressed(WeightSpace(module, self._without_means()), module)
        if kind in rules.WHOLE:
            return self._dressed(rules.WHOLE[kind].of(module, self._without_means()), module)
        return self._layer(kind, module)

    def _other(self, module: nn.Module) -> nn.Module:
        """What becomes of any other module, whose children have been converted."""
        within = module.parameters(recurse=isinstance(module, rules.READERS))
        if not any(p.is_floating_point() or p.is_complex() for p in within):
            return module
        if self._others == "weights" and rules.may_be_whole(module):
            return self._dressed(WeightSpace(module, self._without_means()), module)
        if not isinstance(module, rules.NORMS):
            self._left.add(type(module).__name__ + (_NOT_INITIALISED if is_lazy(module) else ""))
        return module

    def _without_means(self) -> dict[str, Any] | None:
        """The priors for a module that keeps its means."""
        given = None if self._priors is None else dict(self._priors)
        if given is not None:
            given.pop("posterior_mu_initial", None)
        return given

    def _layer(self, kind: type[nn.Module], module: Any) -> nn.Module:
        options: dict[str, Any] = {"priors": self._priors, "device": "meta", "dtype": module.weight.dtype}
        if kind in rules.TABLES:
            layer = rules.TABLES[kind](**rules.table_options(module, kind), **options)
            named = {"W": module.weight}
        else:
            if self._variance_dtype is not None:
                options["variance_dtype"] = self._variance_dtype
            make = getattr(self._family, f"BBB{kind.__name__}")
            layer = make(**rules.product_options(module, kind), bias=module.bias is not None, **options)
            named = {"W": module.weight} | ({} if module.bias is None else {"bias": module.bias})
        for part, mean in named.items():
            setattr(layer, f"{part}_mu", mean)
            setattr(layer, f"{part}_rho", self._rho(mean))
        given = self._priors or {}
        for buffer, value in list(layer._buffers.items()):
            # Of tensors in priors, which the layer on the meta device has no numbers of.
            if value is not None:
                layer._put(buffer, given[buffer].detach().to(module.weight, copy=True))
        return self._dressed(layer, module)

    def _rho(self, mean: nn.Parameter) -> nn.Parameter:
        """The rho that belongs to a mean, wherever that is used."""
        if id(mean) not in self._rhos:
            resolved = resolve_priors(self._priors)
            with torch.no_grad():
                rho = torch.empty_like(mean).normal_(*resolved["posterior_rho_initial"])
            self._rhos[id(mean)] = nn.Parameter(rho, requires_grad=mean.requires_grad)
        return self._rhos[id(mean)]

    def _dressed(self, made: BayesianModule, module: nn.Module) -> nn.Module:
        """With what the module had besides weights, its mode and hooks; and the prior by its weights."""
        if isinstance(made, WeightSpace):
            made.rho.training = module.training
            own = made.rho._parameters
            for key, (mean, rho) in zip(list(own), made.posterior(), strict=True):
                own[key] = self._rhos.setdefault(id(mean), rho)
        else:
            rules.move_hooks(module, made)
        made.training = module.training
        if self._moped_delta is not None:
            self._moped(made, float(self._moped_delta))
        return made

    def _moped(self, made: BayesianModule, delta: float) -> None:
        with torch.no_grad():
            for mu, rho in made.posterior():
                rho.copy_(inverse_softplus(_moped_sigma(mu, delta)))
        made.set_priors([_as_prior(*pair) for pair in made.posterior()])


def _moped_sigma(mean: Tensor, delta: float) -> Tensor:
    scale = mean.double().square().mean().sqrt()
    least = torch.where(scale > 0, scale, torch.ones_like(scale)) * 0.1
    return (delta * mean.double().abs().clamp_min(least)).to(mean.dtype)


def inverse_softplus(sigma: Tensor) -> Tensor:
    """rho with ln(1 + e^rho) = sigma."""
    wide = sigma.double()
    return (wide + torch.log(-torch.expm1(-wide))).to(sigma.dtype)


def posterior_to_prior(model: nn.Module) -> nn.Module:
    """Makes each prior the posterior as it is now, in place; returns the model.

    Yesterday's posterior is today's prior (Nguyen et al., "Variational continual learning", ICLR 2018): the
    KL is 0 afterwards, and what is learned next is pulled to what is known. The priors become buffers. Raises
    TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"posterior_to_prior: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, BayesianModule):
            module.set_priors([_as_prior(*pair) for pair in module.posterior()])
    return model


@torch.no_grad()
def _as_prior(mu: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    return mu.detach().clone(), softplus(rho.double()).to(mu.dtype)
