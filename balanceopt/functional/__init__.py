"""The papers' update rules as pure functions: tensors in, tensors out.

Names outside `__all__` are for the rest of the package.
"""

from balanceopt.functional._blending import blend_weights
from balanceopt.functional._clustering import KMeansResult, kmeans, minmax_scale, purity
from balanceopt.functional._coefficients import CoefficientForm as CoefficientForm
from balanceopt.functional._coefficients import (
    adaptive_coefficient,
    balance_coefficient,
    drop_probability,
    modulation_coefficient,
    priority_coefficients,
)
from balanceopt.functional._competition import derangement as derangement
from balanceopt.functional._competition import permutation_divergence
from balanceopt.functional._correlation import CorrelationSums as CorrelationSums
from balanceopt.functional._correlation import check_class_indices as check_class_indices
from balanceopt.functional._correlation import correlation_sums as correlation_sums
from balanceopt.functional._correlation import total_correlation as total_correlation
from balanceopt.functional._correlation import total_correlation_loss
from balanceopt.functional._dropout import kept_but_one, kept_modalities
from balanceopt.functional._dtypes import wide as wide
from balanceopt.functional._dtypes import without_autocast as without_autocast
from balanceopt.functional._gradients import combined_gradient as combined_gradient
from balanceopt.functional._gradients import gradient_products as gradient_products
from balanceopt.functional._gradients import min_norm_weight, mixed_gradient, pareto_gradient
from balanceopt.functional._gradients import pareto_coefficients as pareto_coefficients
from balanceopt.functional._kept_predictions import KeptPredictions as KeptPredictions
from balanceopt.functional._kept_predictions import StepLosses as StepLosses
from balanceopt.functional._kept_predictions import centred_predictions
from balanceopt.functional._labels import INVALID as INVALID
from balanceopt.functional._labels import recover_labels, recover_scale
from balanceopt.functional._losses import AnswerKind as AnswerKind
from balanceopt.functional._losses import Loss as Loss
from balanceopt.functional._losses import LossFunction as LossFunction
from balanceopt.functional._losses import SampleLosses as SampleLosses
from balanceopt.functional._losses import as_loss as as_loss
from balanceopt.functional._losses import likelihood_score
from balanceopt.functional._masks import check_clamp as check_clamp
from balanceopt.functional._masks import keep_ratio, kept_units, unit_importance
from balanceopt.functional._regulation import check_threshold as check_threshold
from balanceopt.functional._regulation import in_prime_window, regulation_strength
from balanceopt.functional._reinit import reinit_strength, soft_reinit_
from balanceopt.functional._sampling import (
    inclusion_probabilities,
    inclusion_probabilities_padded,
    sample_units,
    sample_units_padded,
    systematic_sample,
    systematic_sample_padded,
)
from balanceopt.functional._scores import RatioReduction as RatioReduction
from balanceopt.functional._scores import (
    discrepancy_ratio,
    feature_entropy,
    linear_logits,
    modal_significance,
    significance_from_baseline,
    true_class_score,
)
from balanceopt.functional._scores import row_scores as row_scores
from balanceopt.functional._signals import agreement, effective_rank
from balanceopt.functional._target_classes import (
    LabelSetClasses,
    QuantileClasses,
    label_set_classes,
    quantile_classes,
)
from balanceopt.functional._targets import Targets as Targets
from balanceopt.functional._targets import as_targets as as_targets
from balanceopt.functional._vote import VoteKind as VoteKind
from balanceopt.functional._vote import vote

__all__ = [
    "KMeansResult",
    "LabelSetClasses",
    "QuantileClasses",
    "adaptive_coefficient",
    "agreement",
    "balance_coefficient",
    "blend_weights",
    "centred_predictions",
    "discrepancy_ratio",
    "drop_probability",
    "effective_rank",
    "feature_entropy",
    "in_prime_window",
    "inclusion_probabilities",
    "inclusion_probabilities_padded",
    "keep_ratio",
    "kept_but_one",
    "kept_modalities",
    "kept_units",
    "kmeans",
    "label_set_classes",
    "likelihood_score",
    "linear_logits",
    "min_norm_weight",
    "minmax_scale",
    "mixed_gradient",
    "modal_significance",
    "modulation_coefficient",
    "pareto_gradient",
    "permutation_divergence",
    "priority_coefficients",
    "purity",
    "quantile_classes",
    "recover_labels",
    "recover_scale",
    "regulation_strength",
    "reinit_strength",
    "sample_units",
    "sample_units_padded",
    "significance_from_baseline",
    "soft_reinit_",
    "systematic_sample",
    "systematic_sample_padded",
    "total_correlation_loss",
    "true_class_score",
    "unit_importance",
    "vote",
]
