"""Uni-modal scores of a model in training, computed by hooks."""

from balanceopt.monitor._columns import as_rows
from balanceopt.monitor._features import samples_first
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._labels import LabelSource
from balanceopt.monitor._logits import UnimodalLogits, check_layout
from balanceopt.monitor._module_hooks import WeakHook
from balanceopt.monitor._monitor import ModalityMonitor, flags_by_modality, require_scores
from balanceopt.monitor._outputs import detached_copy, is_differentiable, map_tensors, tensors_in
from balanceopt.monitor._recovery import off_residual, two_classes
from balanceopt.monitor._refusals import enter, leave, refuse_company, refuse_model
from balanceopt.monitor._replay import State, evaluate, keep_random_states, without_gradients
from balanceopt.monitor._scores import ScoreBuffer, Scores
from balanceopt.monitor._silence import COMPILED, CallWatch, compiled_before

__all__ = [
    "COMPILED",
    "CallWatch",
    "LabelSource",
    "ModalityMonitor",
    "Pass",
    "ScoreBuffer",
    "Scores",
    "State",
    "UnimodalLogits",
    "WeakHook",
    "as_rows",
    "check_layout",
    "compiled_before",
    "detached_copy",
    "enter",
    "evaluate",
    "flags_by_modality",
    "is_differentiable",
    "keep_random_states",
    "leave",
    "map_tensors",
    "off_residual",
    "refuse_company",
    "refuse_model",
    "require_scores",
    "samples_first",
    "tensors_in",
    "two_classes",
    "without_gradients",
]
