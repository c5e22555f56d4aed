"""Any module with a posterior over its weights: one draw of all of them a forward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.func import functional_call

from .. import functional
from .._noise import STREAMS_A_BLOCK, draw_rng
from ..priors import PriorValue, resolve_priors
from .base import BayesianModule, DrawnAtEachForward, Term

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
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
            raise ValueError(
                f"{name}: the module is lazy; run it once first, so that its parameters have shapes"
            )
        resolved = resolve_priors(priors)
        self.module = module
        self.posterior_mu_initial = resolved["posterior_mu_initial"]
        self.posterior_rho_initial = resolved["posterior_rho_initial"]
        self._means_from_module = priors is None or "posterior_mu_initial" not in priors
        self.rho = nn.ParameterDict()
        with torch.no_grad():
            for n in names:
                mu = module.get_parameter(n)
                rho = torch.empty_like(mu).normal_(*self.posterior_rho_initial)
                self.rho[_key(n)] = nn.Parameter(rho, requires_grad=mu.requires_grad)
                if not self._means_from_module:
                    mu.normal_(*self.posterior_mu_initial)
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

    def _names(self) -> list[str]:
        return [key.replace(":", ".") for key in self.rho]

    def posterior(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(self.module.get_parameter(key.replace(":", ".")), rho) for key, rho in self.rho.items()]

    def _prior_names(self) -> list[str]:
        return [f"prior_{kind}:{key}" for key in self.rho for kind in ("mu", "sigma")]

    def terms(self) -> list[Term]:
        values = [getattr(self, name) for name in self._prior_names()]
        return [
            Term(*pair, mu, sigma, self.prior)
            for pair, mu, sigma in zip(self.posterior(), values[::2], values[1::2], strict=True)
        ]

    def set_priors(self, priors: Sequence[tuple[PriorValue, PriorValue]]) -> None:
        self.prior = None
        names = iter(self._prior_names())
        for mu, sigma in priors:
            self._put(next(names), mu)
            self._put(next(names), sigma)

    @property
    def _stream_blocks(self) -> int:
        return -(-len(self.rho) // STREAMS_A_BLOCK)

    def draw(self, rng: Tensor) -> dict[str, Tensor]:
        """All weights by name, drawn with ``rng``, each with a stream of its own from ``rng[1]`` on."""
        groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        pairs = dict(zip(self._names(), self.posterior(), strict=True))
        for name, (mu, _) in pairs.items():
            groups.setdefault((mu.device, mu.dtype), []).append(name)
        drawn: dict[str, Tensor] = {}
        for (device, _), names in groups.items():
            mus, rhos = zip(*(pairs[name] for name in names), strict=True)
            own = rng + torch.tensor([0, len(drawn)], device=rng.device) if drawn else rng
            weights, _ = functional.sample_weights(mus, rhos, own.to(device))
            drawn.update(zip(names, weights, strict=True))
        return drawn

    def forward(self, *args: Any, sample: bool = True, **options: Any) -> Any:
        """The module's forward with drawn weights; with its means where ``sample`` is False."""
        draw = self.wanted_draw() if sample else None
        if draw is None or draw.means:
            return self.module(*args, **options)
        device = self.posterior()[0][0].device
        rng = draw_rng(device) if draw.pinned is None else draw.pinned.rng(self, device)
        weights = self.draw(rng)
        with self._alone():
            return functional_call(self.module, weights, args, options)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        # functional_call puts the weights into the module's place for parameters while it runs.
        if is_compiling():
            yield
            return
        lock = self.__dict__.get("_lock")
        if lock is None:
            lock = self.__dict__.setdefault("_lock", threading.RLock())
        with lock:
            yield

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

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
        return value

    def extra_repr(self) -> str:
        return f"estimator={self.estimator!r}" + ("" if self.prior is None else f", prior={self.prior}")


class Around(WeightSpace):
    """A torch.nn module of one kind in weight space, made with that kind's arguments and ``priors``."""

    kind: type[nn.Module]

    def __init__(self, *args: Any, priors: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(self.kind(*args, **options), priors)

    @classmethod
    def of(cls, module: nn.Module, priors: Mapping[str, Any] | None = None) -> Around:
        """The layer around a module that is there."""
        layer = object.__new__(cls)
        WeightSpace.__init__(layer, module, priors)
        return layer


def _key(name: str) -> str:
    # A ParameterDict takes no dot; ":" is in no attribute's name.
    return name.replace(".", ":")
