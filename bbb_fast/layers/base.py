"""What all Bayesian layers share: parameters, priors, the KL, and the choice of the draw. The estimators:
``estimators.py``, the shapes: ``shapes.py``; a layer is one of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import _backend, functional, routes
from .._checks import FLOAT_DTYPES, factory
from .._layer_functions import ESTIMATORS
from .._noise import FREE, RandomModule, draw_rng, rank_offset
from ..priors import BIAS_KEYS, DEFAULT_PRIORS, Prior, PriorValue, empirical_sigma, resolve_priors
from ..routes import VarianceDtype

# W_mu, W_rho, bias_mu, bias_rho.
_Parameters = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class DrawnAtEachForward:
    """What ``layer.weight`` and ``layer.bias`` are: a tensor's shape, dtype and device, and no numbers.

    torch.nn's transformer layers hand their sublayers' weights to one fused call in eval mode, if those are
    tensors alone; as these are not, they call the sublayers. Any other use of them raises TypeError.
    """

    def __init__(self, name: str, mean: Tensor) -> None:
        self._name = name
        self.shape, self.dtype, self.device = mean.shape, mean.dtype, mean.device
        self.requires_grad = mean.requires_grad

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"{self._name} has no numbers, each forward draws them: call the layer, or take the "
            "parameters of its posterior (W_mu and W_rho, bias_mu and bias_rho)"
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> NoReturn:
        pending = [*args, *(kwargs or {}).values()]
        while not isinstance(found := pending.pop(0), cls):
            pending += found if isinstance(found, (tuple, list)) else ()
        found._refuse()

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        # Whoever looks for a protocol shall not find one.
        if name.startswith("_"):
            raise AttributeError(name)
        self._refuse()

    def __repr__(self) -> str:
        return f"<{self._name} {list(self.shape)}, drawn at each forward>"


class Term(NamedTuple):
    """One tensor's part in a KL: its posterior and its prior."""

    mu: Tensor
    rho: Tensor
    prior_mu: float | Tensor
    prior_sigma: PriorValue
    prior: Prior | None = None  # another kind, in the place of the two


def is_freed(module: nn.Module, name: str) -> bool:
    """Whether a parameter is one that FullyShardedDataParallel (use_orig_params=False) holds elsewhere.

    It leaves an attribute without memory in its place; with use_orig_params, a flat piece.
    """
    t = module.__dict__.get(name)
    return t is not None and t.numel() > 0 and t.untyped_storage().size() == 0


class BayesianModule(RandomModule):
    """A module with a posterior over weights, q(w) = N(mu, softplus(rho)^2), and a prior."""

    # Of how it draws, for repr and summaries.
    estimator: str
    posterior_mu_initial: tuple[float, float]
    posterior_rho_initial: tuple[float, float]
    # Of another kind than N(prior_mu, prior_sigma^2).
    prior: Prior | None = None
    # What the help of a layer says of its arguments, its input and its output; of a shape.
    _help: str

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # What it is, in its own words; how it is drawn, in the estimator's; what it takes, in the shape's.
        own = vars(cls).get("__doc__")
        draws = next((vars(base).get("__doc__") for base in cls.__mro__ if "estimator" in vars(base)), None)
        if own and draws and own is not draws and hasattr(cls, "_help"):
            cls.__doc__ = "\n\n".join((inspect.cleandoc(own), inspect.cleandoc(draws), cls._help))

    def posterior(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The (mu, rho) pairs of the module itself."""
        raise NotImplementedError

    def terms(self) -> list[Term]:
        """The posterior's pairs, each with its prior: what the KL sums over."""
        raise NotImplementedError

    def set_priors(self, priors: Sequence[tuple[PriorValue, PriorValue]]) -> None:
        """Gives each pair of :meth:`posterior` a prior (mu, sigma) of numbers or of tensors of its shape.

        Tensors become buffers: they move with the module, and are in its ``state_dict``.
        """
        raise NotImplementedError

    def kl_loss(self) -> Tensor:
        """KL(q || p), summed over the module's weights and biases: a differentiable scalar.

        Always that of the parameters as they are now. On the native kernels, a backward that goes through
        it and through the last output of a layer forms both gradients in one pass over the parameters.
        """
        return kl_of_terms(self.terms())

    def _in_pieces(self) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__}: FullyShardedDataParallel has the parameters in pieces here; ask for "
            "the KL within the forward of the wrapped module, or use fully_shard"
        )

    def set_flag(self, name: str, value: Any) -> None:
        """Sets attribute ``name`` to ``value``, as ``ModuleWrapper.set_flag`` does for a whole model."""
        setattr(self, name, value)

    def _put(self, name: str, value: Any) -> None:
        """An attribute that is a buffer if it is a tensor."""
        self.__dict__.pop(name, None)
        self._buffers.pop(name, None)
        if isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            self.__dict__[name] = value

    def _prior_names(self) -> list[str]:
        """The attributes that may hold a prior."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of a module whose priors were tensors brings them along.
        for name in self._prior_names():
            value = state_dict.get(prefix + name)
            mine = self._buffers.get(name)
            if isinstance(value, Tensor) and (mine is None or mine.dim() == 0):
                like = self.posterior()[0][0]
                self._put(name, torch.empty_like(value, device=like.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class BayesianLayer(BayesianModule):
    """A layer whose weights have the posterior q(w) = N(mu, softplus(rho)^2), elementwise.

    Parameters: ``W_mu``, ``W_rho`` (shaped as torch.nn shapes the weight), ``bias_mu``, ``bias_rho``
    (None without bias). A subclass says what the layer computes with given weights (``_mean_output``) and
    with its posterior under an estimator (``_draw_output``).

    ``recompute_weight`` (estimators "bbb" and "flipout"): the drawn weight is not kept for backward but drawn
    again there.
    ``variance_dtype`` (estimator "lrt"): the type of the variance product, as in
    :func:`bbb_fast.functional.lrt_linear`; torch.bfloat16 is faster where the CPU or GPU multiplies it
    faster, "auto" chooses it there. Both are keyword arguments of the layers and may be set later.
    """

    bias_mu: nn.Parameter | None
    bias_rho: nn.Parameter | None
    prior_mu: float | Tensor
    prior_sigma: PriorValue
    bias_prior_mu: float | Tensor | None
    bias_prior_sigma: PriorValue | None
    # On the class too, for layers that were pickled before there were such options.
    recompute_weight: bool = False
    variance_dtype: VarianceDtype = None
    # What the layer's functions are called behind the estimator's name.
    _shape_name: str
    # Whether the product with a drawn weight is one that sparse inputs have too.
    _takes_any_layout: bool = False
    # What the last forward left for the KL's backward (csrc/layer_calls.h); keeps nothing alive.
    _trace: Any = None

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias_features: int | None,
        priors: Mapping[str, Any] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        recompute_weight: bool,
        variance_dtype: VarianceDtype,
    ) -> None:
        super().__init__()
        resolved = resolve_priors(priors)
        own = ESTIMATORS[self.estimator].option.name
        for name, value in (("recompute_weight", recompute_weight), ("variance_dtype", variance_dtype)):
            if value and name != own:
                owners = " and ".join(e.name for e in ESTIMATORS.values() if e.option.name == name)
                raise ValueError(
                    f"{type(self).__name__}: {name} is an option of {owners}, and this layer's estimator is "
                    f"{self.estimator}"
                )
        if variance_dtype not in (None, "auto", *FLOAT_DTYPES):
            raise TypeError(
                f"{type(self).__name__}: variance_dtype must be float32, float64, bfloat16, float16 or "
                f"'auto', got {variance_dtype}"
            )
        factory(type(self).__name__, device, dtype)
        self.recompute_weight = recompute_weight
        self.variance_dtype = variance_dtype
        self.prior = resolved["prior"]
        self.posterior_mu_initial = resolved["posterior_mu_initial"]
        self.posterior_rho_initial = resolved["posterior_rho_initial"]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.W_mu = parameter(*weight_shape)
        self.W_rho = parameter(*weight_shape)
        if bias_features is None:
            self.register_parameter("bias_mu", None)
            self.register_parameter("bias_rho", None)
        else:
            self.bias_mu = parameter(bias_features)
            self.bias_rho = parameter(bias_features)
        for name in self._prior_names():
            prior = resolved[name]
            if isinstance(prior, Tensor):
                prior = prior.to(self.W_mu.device, self.W_mu.dtype, copy=True)
            self._put(name, prior)
        self._start(tuple(weight_shape), (bias_features or 0,))

    def _start(self, weight_shape: tuple[int, ...], bias_shape: tuple[int, ...]) -> None:
        """The end of the construction, when the shapes are known: looks at the priors' and draws."""
        self._check_priors(weight_shape, bias_shape)
        self.reset_parameters()

    def _check_priors(self, weight_shape: tuple[int, ...], bias_shape: tuple[int, ...]) -> None:
        for name in self._prior_names():
            value, shape = getattr(self, name), bias_shape if name in BIAS_KEYS else weight_shape
            if isinstance(value, Tensor) and value.shape not in ((), shape):
                raise ValueError(
                    f"{type(self).__name__}: priors[{name!r}] must have shape {list(shape)}, got "
                    f"{list(value.shape)}"
                )

    def reset_parameters(self) -> None:
        """Draws mu and rho anew from ``posterior_mu_initial`` and ``posterior_rho_initial``."""
        with torch.no_grad():
            for mu, rho in self.posterior():
                mu.normal_(*self.posterior_mu_initial)
                rho.normal_(*self.posterior_rho_initial)

    def posterior(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The layer's (mu, rho) pairs: of the weight and, if there is one, of the bias.

        Under ``fully_shard`` they are DTensors outside a forward. Raises RuntimeError where
        FullyShardedDataParallel has them in pieces.
        """
        self._check_whole()
        pairs = [(self.W_mu, self.W_rho)]
        if self.bias_mu is not None and self.bias_rho is not None:
            pairs.append((self.bias_mu, self.bias_rho))
        return pairs

    @property
    def weight(self) -> DrawnAtEachForward:
        """No tensor: its shape, dtype and device may be read, its numbers may not.

        So ``hasattr(layer, "weight")`` says True, and an initialisation that goes by it raises TypeError: a
        posterior is initialised by ``priors`` and ``reset_parameters``.
        """
        return DrawnAtEachForward(f"{type(self).__name__}.weight", self.W_mu)

    @property
    def bias(self) -> DrawnAtEachForward | None:
        """As ``weight``; None in a layer without bias."""
        return (
            None if self.bias_mu is None else DrawnAtEachForward(f"{type(self).__name__}.bias", self.bias_mu)
        )

    def _check_whole(self) -> None:
        if self.W_mu.dim() < 2 or is_freed(self, "W_mu"):
            raise self._in_pieces()

    def _parameters_in_order(self) -> _Parameters:
        # Past nn.Module's __getattr__, which takes half a microsecond each; but not for a parameter that
        # something (torch.nn.utils.parametrize, FSDP) has put elsewhere.
        own: dict[str, Any] = self._parameters
        try:
            return own["W_mu"], own["W_rho"], own["bias_mu"], own["bias_rho"]
        except KeyError:
            return self.W_mu, self.W_rho, self.bias_mu, self.bias_rho

    def _drawn_parameters(self) -> Sequence[Tensor]:
        means = (self._parameters.get(name) for name in ("W_mu", "bias_mu"))
        return [mean for mean in means if mean is not None]

    def _prior_names(self) -> list[str]:
        return ["prior_mu", "prior_sigma", *BIAS_KEYS]

    def _bias_prior(self) -> tuple[float | Tensor, PriorValue]:
        """The bias's prior: its own, or the weight's numbers, or the defaults beside a weight's tensor."""
        mu, sigma = self.bias_prior_mu, self.bias_prior_sigma
        if mu is None:
            mu = DEFAULT_PRIORS["prior_mu"] if isinstance(self.prior_mu, Tensor) else self.prior_mu
        if sigma is None:
            sigma = (
                DEFAULT_PRIORS["prior_sigma"] if isinstance(self.prior_sigma, Tensor) else self.prior_sigma
            )
        return mu, sigma

    def _prior_numbers(self) -> tuple[float, float] | None:
        """The prior of weight and bias, if it is one and of numbers."""
        mu, sigma = self.prior_mu, self.prior_sigma
        own = self.bias_prior_mu is None and self.bias_prior_sigma is None and self.prior is None
        if own and not isinstance(mu, Tensor) and not isinstance(sigma, (Tensor, str)):
            return mu, sigma
        return None

    def terms(self) -> list[Term]:
        priors = [(self.prior_mu, self.prior_sigma), self._bias_prior()]
        pairs = zip(self.posterior(), priors, strict=False)
        return [Term(*pair, *numbers, self.prior) for pair, numbers in pairs]

    def set_priors(self, priors: Sequence[tuple[PriorValue, PriorValue]]) -> None:
        self.prior = None
        for name, (mu, sigma) in zip(("prior", "bias_prior"), priors, strict=False):
            self._put(f"{name}_mu", mu)
            self._put(f"{name}_sigma", sigma)

    def kl_loss(self) -> Tensor:
        return kl_of_layers([self])

    kl_loss.__doc__ = BayesianModule.kl_loss.__doc__

    def __getstate__(self) -> dict[str, Any]:
        # A trace belongs to one layer's forward, and can be neither copied nor pickled.
        return {**self.__dict__, "_trace": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch gives it no types
        for name in BIAS_KEYS:
            # Of a layer that was pickled before there were such.
            if name not in self._buffers:
                self.__dict__.setdefault(name, None)

    def extra_repr(self) -> str:
        """The shape, the estimator, and what is not a default."""
        parts = [self._shape_repr(), f"estimator={self.estimator!r}"]
        for name, default in (("recompute_weight", False), ("variance_dtype", None)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        for name, default in {"prior": None, **DEFAULT_PRIORS, **dict.fromkeys(BIAS_KEYS)}.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                parts.append(f"{name}=[{', '.join(map(str, value.shape))}]")
            elif value != default:
                parts.append(f"{name}={value}")
        return ", ".join(parts)

    def _shape_repr(self) -> str:
        """What ``repr`` says of the arguments that torch.nn's layer has too."""
        raise NotImplementedError

    def _checked_size(self, name: str, value: Any) -> int:
        """A size that an argument gives."""
        raise NotImplementedError

    def _mean_output(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def _function(self, estimator: str) -> Callable[..., Any]:
        """The function of ``bbb_fast.functional`` that draws the layer's output under an estimator."""
        function: Callable[..., Any] = getattr(functional, f"{estimator}_{self._shape_name}")
        return function

    def _draw_output(
        self, estimator: str, input: Tensor, parameters: _Parameters, rng: Tensor, **options: Any
    ) -> Tensor:
        output: Tensor = self._function(estimator)(input, *parameters, rng, **options)
        return output

    def _draw_at_once(self, native: Any, input: Tensor) -> tuple[Tensor, Any] | None:
        """The output and what ``_trace`` shall be, by one call of the extension; None if it declines."""
        raise NotImplementedError

    def _call_native(
        self, native: Any, input: Tensor, geometry: tuple[Any, ...] | None
    ) -> tuple[Tensor, Any] | None:
        # A KL with another prior than two numbers is not formed with the output's gradient.
        prior_mu, prior_sigma = self._prior_numbers() or (0.0, 1.0)
        drawn: tuple[Tensor, Any] | None = native.draw(
            self.estimator,
            input,
            *self._parameters_in_order(),
            rank_offset(),
            geometry,
            prior_mu,
            prior_sigma,
            self.recompute_weight,
            routes.variance_dtype(self.variance_dtype, self.W_mu, input),
        )
        return drawn

    def _options(self, estimator: str) -> dict[str, Any]:
        option = ESTIMATORS[estimator].option.name
        return {option: getattr(self, option)}

    def forward(self, input: Tensor, sample: bool = True) -> Tensor:
        """The layer's output for one draw of the noise, in train and in eval mode alike.

        ``sample=False`` uses the posterior means instead and draws nothing.
        """
        return self._output(input, sample)

    def _output(self, input: Tensor, sample: bool, **shape: Any) -> Tensor:
        """``forward``; ``shape`` is what its arguments say of the shape's."""
        draw = self.wanted_draw() if sample else None
        if draw is FREE and type(input) is Tensor and not is_compiling():
            native = _backend.native_module()
            drawn = None if native is None else self._draw_at_once(native, input, **shape)
            if drawn is not None:
                # Past nn.Module's own bookkeeping, which takes microseconds and has no part in this.
                output, self.__dict__["_trace"] = drawn
                return output
        if not isinstance(input, Tensor):
            raise TypeError(f"{type(self).__name__}: input must be a tensor, got {type(input).__name__}")
        if draw is None or draw.means:
            dtype = self._weight_dtype(input)
            bias = None if self.bias_mu is None else self.bias_mu.to(dtype)
            return self._mean_output(input, self.W_mu.to(dtype), bias, **shape)
        if draw.pinned is None:
            rng, estimator = draw_rng(input.device), self.estimator
        else:
            # Only in weight space is one draw one function.
            estimator = "bbb" if draw.pinned.draw == "weights" else self.estimator
            if draw.pinned.at_once:
                rng = draw.pinned.rngs(self, input.device)
                once = draw.pinned.once(input)
                if once is not None:
                    input, rng = once, rng.unsqueeze(1)
            elif estimator == "bbb" and self._drawn_parameters():
                rng, streams = draw.pinned.rng_and_streams(self, input.device)
                if streams != tuple(range(len(streams))):
                    return self._output_of_shared(input, rng, streams, shape)
            else:
                rng = draw.pinned.rng(self, input.device)
        if input.is_nested or input.layout is not torch.strided:
            if estimator == "bbb" and rng.dim() == 1 and self._takes_any_layout and not input.is_nested:
                return self._mean_output(input, *self._drawn_weights(input, rng))
            kind = "nested" if input.is_nested else str(input.layout)
            raise TypeError(f"{type(self).__name__}: input must be a dense tensor, got a {kind} one")
        return self._draw_output(
            estimator, input, self._parameters_in_order(), rng, **shape, **self._options(estimator)
        )

    def _weight_dtype(self, input: Tensor) -> torch.dtype:
        """Float32 parameters follow a narrower input; any other pair of types torch.nn will judge."""
        own = self.W_mu.dtype
        narrow = own == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
        return input.dtype if narrow else own

    def _drawn_weights(self, input: Tensor, rng: Tensor) -> list[Tensor]:
        """The weight and, if there is one, the bias that ``rng`` draws, for a product with ``input``.

        Of several draws, [S, ...].
        """
        mu, rho = zip(*self.posterior(), strict=True)
        return functional.sample_weights(mu, rho, rng, dtype=self._weight_dtype(input))[0]

    def _output_of_shared(
        self, input: Tensor, rng: Tensor, streams: Sequence[int], shape: dict[str, Any]
    ) -> Tensor:
        """The output of a weight or a bias that is another layer's too, and has the draw it has there."""
        weights = []
        for (mu, rho), stream in zip(self.posterior(), streams, strict=True):
            own = rng + torch.tensor([0, stream], device=rng.device)
            (weight,), _ = functional.sample_weights([mu], [rho], own, dtype=self._weight_dtype(input))
            weights.append(weight)
        return self._mean_output(input, *weights, **shape)


def kl_of_layers(layers: Sequence[BayesianLayer]) -> Tensor:
    """The sum of the KLs of layers (one or more) whose parameters have one device and dtype, in one call."""
    native = None if is_compiling() else _backend.native_module()
    if native is not None:
        with_priors = [(layer, layer._prior_numbers()) for layer in layers]
        of_numbers = [
            (*layer._parameters_in_order(), *prior, layer._trace)
            for layer, prior in with_priors
            if prior is not None
        ]
        if len(of_numbers) == len(layers):
            kl: Tensor | None = native.kl(of_numbers)
            if kl is not None:
                return kl
    return kl_of_terms([term for layer in layers for term in layer.terms()])


def kl_of_terms(terms: Sequence[Term]) -> Tensor:
    """The sum of their KLs: one call for all tensors of a device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Term]] = {}
    parts = []
    for term in terms:
        if term.prior is not None:
            parts.append(term.prior.kl(term.mu, term.rho))
            continue
        if isinstance(term.prior_sigma, str):
            term = term._replace(prior_sigma=empirical_sigma(term.mu, term.rho, term.prior_mu))
        groups.setdefault((term.mu.device, term.mu.dtype), []).append(term)
    for group in groups.values():
        mu, rho, prior_mu, prior_sigma, _ = zip(*group, strict=True)
        parts.append(functional.kl_divergence(mu, rho, prior_mu, prior_sigma))
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
