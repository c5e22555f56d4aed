"""Proper scores, calibration, selective prediction, uncertainty, out-of-distribution, regression.

Words used throughout:

- ``probs``: floating tensor ``[N, C]``, one row per example, each row a distribution over C
  classes.
- ``labels``: int64 tensor ``[N]`` of true classes, ``0 <= label < C``, on the device of ``probs``.
- ``sample_probs``: floating tensor ``[T, N, C]``, ``probs`` for each of T posterior draws.
- ``scores_in``, ``scores_out``: floating tensors ``[N_in]`` and ``[N_out]``, one score per example
  of the in-distribution and of the out-of-distribution set; **a higher score says "more likely
  out"**.
- ``mean``, ``variance``, ``y``: floating tensors of one shape, ``[N]``, or ``[N, D]`` for D targets:
  the mean and variance of a Gaussian predicted for each target, and the true value. A variance is
  that of the observation, the noise included, and above 0. The D targets of a row are independent.

Conventions that hold for every function here:

- Inputs may be float16, bfloat16, float32 or float64, on any device, of any memory layout. All
  arithmetic is float64. Scalars come back as python floats; per-example values as float64 tensors
  on the input's device (on the CPU for MPS tensors, since MPS has no float64).
- Logarithms are natural: entropies and likelihoods are in nats.
- Results are deterministic: the same input on the same device gives the same bits.
- Nothing is differentiable: the results carry no gradient.
- Rows are used as they come, without renormalising. A row must sum to 1 within 1e-3 (within 2**-7
  for bfloat16, whose rounding alone moves a sum by up to 2**-8); a value that this tolerance lets
  exceed 1 counts as 1.
- What is not a tensor raises ``TypeError``. A wrong rank, shape, dtype or device, an empty tensor,
  NaN, infinity, a negative probability, a row that does not sum to 1, a variance
  that is not positive, a label out of range or an option out of range raises ``ValueError`` that
  names the offending value and what is allowed.
"""

from .calibration import Reliability, adaptive_ece, calibrated_ece, classwise_ece, ece, mce, reliability
from .classification import accuracy, brier, classification_report, nll
from .decomposition import (
    Decomposition,
    decompose,
    expected_entropy,
    mutual_information,
    predictive_entropy,
    to_probs,
    uncertainty,
)
from .detection import aupr, auroc, fpr_at_tpr, ood_report
from .regression import (
    RegressionCalibration,
    crps_gaussian,
    crps_samples,
    gaussian_log_density,
    interval_width,
    picp,
    regression_calibration,
    regression_report,
    rmse,
)
from .selective import RiskCoverage, aurc, excess_aurc, risk_coverage

__all__ = [
    "Decomposition",
    "RegressionCalibration",
    "Reliability",
    "RiskCoverage",
    "accuracy",
    "adaptive_ece",
    "aupr",
    "aurc",
    "auroc",
    "brier",
    "calibrated_ece",
    "classification_report",
    "classwise_ece",
    "crps_gaussian",
    "crps_samples",
    "decompose",
    "ece",
    "excess_aurc",
    "expected_entropy",
    "fpr_at_tpr",
    "gaussian_log_density",
    "interval_width",
    "mce",
    "mutual_information",
    "nll",
    "ood_report",
    "picp",
    "predictive_entropy",
    "regression_calibration",
    "regression_report",
    "reliability",
    "risk_coverage",
    "rmse",
    "to_probs",
    "uncertainty",
]
