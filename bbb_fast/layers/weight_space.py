"""Any module with a posterior over its weights: one draw of all of them a forward."""

from __future__ import annotations

import contextlib
import operator
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.func import functional_call

from .. import functional
from .._checks import is_lazy
from .._copies import Copies, NotCopiedError
from .._noise import draw_rng
from ..priors import PriorValue, resolve_priors
from .base import BayesianModule, DrawnAtEachForward, Term, is_freed

__all__ = ["Around", "WeightSpace"]


class WeightSpace(BayesianModule):
    """A module whose floating-point parameters have posteriors, drawn at each forward in weight space.

    ``module``'s own parameters are the means: they keep their values, ties and names (``module.<name>``), and
    checkpoints of the plain module load into ``.module``. ``rho`` holds the other half under the same names,
    with ":" for ".". A forward draws w = mu + sigma * eps of all of them (one call for those of a dtype) and
    runs the module with these; what it stores in buffers stays. So whatever there is no layer for can still
    be Bayesian.

    ``priors`` as in the layers, for all parameters alike; the means are initialised anew only where it has a
    ``posterior_mu_initial``. The module's other attributes can be read here; its parameters cannot
    (``DrawnAtEachForward``). Raises TypeError for what is no module, ValueError for one without
    floating-point parameters, or with Bayesian layers in it.

    Blundell et al., "Weight uncertainty in neural networks", ICML 2015.
    """

    estimator = "bbb"

    def __init__(self, module: nn.Module, priors: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: module must be a torch.nn.Module, got {type(module).__name__}")
        if any(isinstance(m, BayesianModule) for m in module.modules()):
            raise ValueError(f"{name}: the module has Bayesian layers, which draw by themselves")
        names = [n for n, p in module.named_parameters() if p.is_floating_point()]
        if not names:
            raise ValueError(f"{name}: the module has no floating-point parameters")
        if is_lazy(module):
            raise ValueError(
                f"{name}: the module is lazy; run it once first, so that its parameters have shapes"
            )
        resolved = resolve_priors(priors)
        self.module = module
        self.posterior_mu_initial = resolved["posterior_mu_initial"]
        self.posterior_rho_initial = resolved["posterior_rho_initial"]
        self._means_from_module = priors is None or "posterior_mu_initial" not in priors
        # Not read off rho's parameters: FullyShardedDataParallel takes them out of there.
        self._shapes = {n: module.get_parameter(n).shape for n in names}
        self.rho = nn.Module()
        with torch.no_grad():
            for n in names:
                mu = module.get_parameter(n)
                rho = torch.empty_like(mu).normal_(*self.posterior_rho_initial)
                self.rho.register_parameter(_key(n), nn.Parameter(rho, requires_grad=mu.requires_grad))
                if not self._means_from_module:
                    mu.normal_(*self.posterior_mu_initial)
        for kind in ("mu", "sigma"):
            value = resolved[f"prior_{kind}"]
            if isinstance(value, Tensor) and value.dim():
                raise ValueError(
                    f"{name}: priors['prior_{kind}'] must be a number, as it is of all parameters, got a "
                    f"tensor {list(value.shape)}; set_priors takes one for each"
                )
        self.set_priors([(resolved["prior_mu"], resolved["prior_sigma"])] * len(names))
        self.prior = resolved["prior"]

    def reset_parameters(self) -> None:
        """Draws rho anew, and the means from ``posterior_mu_initial``, or as the module itself does."""
        with torch.no_grad():
            for _, rho in self.posterior():
                rho.normal_(*self.posterior_rho_initial)
            if not self._means_from_module:
                for mu, _ in self.posterior():
                    mu.normal_(*self.posterior_mu_initial)
                return
        for module in self.module.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is not None:
                reset()

    def posterior(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        pairs = []
        for name, shape in self._shapes.items():
            key = _key(name)
            # Not get_parameter: within torch.func and in replicas they are plain tensors.
            pairs.append((operator.attrgetter(name)(self.module), getattr(self.rho, key)))
            if pairs[-1][1].shape != shape or is_freed(self.rho, key):
                raise self._in_pieces()
        return pairs

    def _drawn_parameters(self) -> list[Tensor]:
        return [mu for mu, _ in self.posterior()]

    def _prior_names(self) -> list[str]:
        return [f"prior_{kind}:{_key(name)}" for name in self._shapes for kind in ("mu", "sigma")]

    def terms(self) -> list[Term]:
        values = [getattr(self, name) for name in self._prior_names()]
        return [
            Term(*pair, mu, sigma, self.prior)
            for pair, mu, sigma in zip(self.posterior(), values[::2], values[1::2], strict=True)
        ]

    def set_priors(self, priors: Sequence[tuple[PriorValue, PriorValue]]) -> None:
        self.prior = None
        names = iter(self._prior_names())
        for (mean, _), prior in zip(self.posterior(), priors, strict=True):
            for value in prior:
                own = value.to(mean, copy=True) if isinstance(value, Tensor) else value
                self._put(next(names), own)

    def draw(self, rng: Tensor, streams: Sequence[int] | None = None) -> dict[str, Tensor]:
        """All weights by name, drawn with ``rng``: the k-th of stream ``rng[1] + streams[k]`` (or k)."""
        names, pairs = list(self._shapes), self.posterior()
        streams = range(len(names)) if streams is None else streams
        drawn: dict[str, Tensor] = {}
        k = 0
        while k < len(names):
            # As many in one call as have a type, a device, and streams behind each other.
            where, first = (pairs[k][0].device, pairs[k][0].dtype), streams[k]
            stop = k + 1
            while (
                stop < len(names)
                and (pairs[stop][0].device, pairs[stop][0].dtype) == where
                and streams[stop] == first + stop - k
            ):
                stop += 1
            mus, rhos = zip(*pairs[k:stop], strict=True)
            own = rng + torch.tensor([0, first], device=rng.device) if first else rng
            weights, _ = functional.sample_weights(mus, rhos, own.to(where[0]))
            drawn.update(zip(names[k:stop], weights, strict=True))
            k = stop
        return drawn

    def forward(self, *args: Any, sample: bool = True, **options: Any) -> Any:
        """The module's forward with drawn weights; with its means where ``sample`` is False."""
        return self._run("__call__", args, options, sample)

    def _run(self, method: str, args: tuple[Any, ...], options: dict[str, Any], sample: bool = True) -> Any:
        draw = self.wanted_draw() if sample else None
        if draw is None or draw.means:
            return getattr(self.module, method)(*args, **options)
        device = self.posterior()[0][0].device
        if draw.pinned is None:
            weights = self.draw(draw_rng(device))
        else:
            weights = self.draw(*draw.pinned.rng_and_streams(self, device))
        if is_compiling():
            return functional_call(self.module, weights, args, options)
        return self._run_with(weights, method, args, options)

    def _run_with(
        self, weights: dict[str, Tensor], method: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        # On copies of the module objects: threads do not see each other's weights, a state_dict has the means
        # at any time, and a checkpoint within finds the same weights again in backward.
        tensors = {id(mu): weights[n] for n, (mu, _) in zip(self._shapes, self.posterior(), strict=True)}
        try:
            copies = Copies(self.module, tensors)
        except NotCopiedError:
            with _one_at_a_time, _in_place(self.module, weights):
                return getattr(self.module, method)(*args, **options)
        result = getattr(copies.model, method)(*args, **options)
        copies.keep_what_was_stored()
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            # A protocol of the module (__deepcopy__, say) is not this object's.
            if module is None or name.startswith("__") or not hasattr(module, name):
                raise
        value = getattr(module, name)
        if isinstance(value, nn.Parameter):
            return DrawnAtEachForward(f"{type(self).__name__}.{name}", value)
        if isinstance(value, types.MethodType) and value.__self__ is module:
            # A method of the module runs with a draw, as its forward does.
            return lambda *args, **options: self._run(name, args, options)
        return value

    def extra_repr(self) -> str:
        return f"estimator={self.estimator!r}" + ("" if self.prior is None else f", prior={self.prior}")


class Around(WeightSpace):
    """One draw of all weights a forward, shared by the batch (Blundell et al., ICML 2015)."""

    estimator = "bbb"
    _help = """\
Args:
    *args, **options: as in torch.nn, device and dtype (float32, float64, bfloat16 or float16) among them.
    priors: a mapping, see :func:`bbb_fast.priors.resolve_priors`, for all parameters alike; None: the
        defaults. The means start as torch.nn's weights, unless it has a ``posterior_mu_initial``.

All floating-point inputs have the parameters' dtype, as in torch.nn. With ``sample=False`` (a keyword) a
forward uses the posterior means. Raises what torch.nn's module raises, ValueError for priors out of range or
given as tensors, TypeError for what is no mapping."""
    # What is built with those arguments.
    kind: type[nn.Module]

    def __init__(self, *args: Any, priors: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(self.kind(*args, **options), priors)

    @classmethod
    def of(cls, module: nn.Module, priors: Mapping[str, Any] | None = None) -> Around:
        """The layer around a module that is there."""
        layer = object.__new__(cls)
        WeightSpace.__init__(layer, module, priors)
        return layer


# Modules that are not copied get the weights into their parameters' place while they run.
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def _in_place(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    with torch.nn.utils.stateless._reparametrize_module(module, weights, tie_weights=True):
        yield


def _key(name: str) -> str:
    # A parameter's name has no dot; ":" is in no attribute's name.
    return name.replace(".", ":")
