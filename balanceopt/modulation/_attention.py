"""Attention heads of models that make attention from linear layers, as units."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from balanceopt.modulation._units import MaskUnits

# What attention's own submodules are called in transformers, timm and diffusers.
_SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
)
_FUSED = ("qkv", "c_attn", "in_proj", "query_key_value")
_OUTPUT = ("out_proj", "o_proj", "out_lin", "to_out", "o", "proj", "c_proj", "dense")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")


def attention_heads(model: nn.Module) -> dict[nn.Module, MaskUnits]:
    """Heads as units of every attention in `model` that is made of linear layers, as those of Hugging Face's models.

    Such an attention is a module that knows its number of heads and has its projections as submodules with one of the
    usual names. Each projection is masked by itself: query, key and value by rows, the output projection by columns.
    `nn.MultiheadAttention` is known without this.

    Args:
        model: an encoder, or the whole model.

    Returns:
        For `AMSS(units=...)`. Add what it does not know: `{**attention_heads(model), layer: MaskUnits(8)}`.

    Raises:
        ValueError: if there is no such attention, or its number of heads is not to be found.

    Example:
        >>> class Attention(nn.Module):
        ...     num_heads = 2
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.query, self.key, self.value, self.out_proj = (nn.Linear(4, 4) for _ in range(4))
        >>> [(units.count, units.dim) for units in attention_heads(Attention()).values()]
        [(2, 0), (2, 0), (2, 0), (2, 1)]

    Reference:
        Masks by attention head: Yang et al., AMSS (TPAMI 2024), and its published code for BERT.
    """
    found: dict[nn.Module, MaskUnits] = {}
    for parent in model.modules():
        found.update(_of_attention(parent, parent))
        for child in parent.children():
            output = getattr(
                parent, "output", None
            )  # BERT and ViT: the output projection stands beside the attention
            if isinstance(output, nn.Module) and not _projections(child, _OUTPUT):
                found.update(_of_attention(child, output))
    if not found:
        raise ValueError(
            f"`model` should hold attention made of linear layers. Found none in {type(model).__name__}: give "
            "AMSS(units={layer: MaskUnits(heads), ...}) by hand."
        )
    return found


def _of_attention(module: nn.Module, holder: nn.Module) -> dict[nn.Module, MaskUnits]:
    """Units of the attention `module`, whose output projection is in `holder`; none if it is no attention."""
    separate = next((names for names in _SEPARATE if len(_projections(module, names)) == len(names)), ())
    projections = _projections(module, separate) or _projections(module, _FUSED)[:1]
    if not projections:
        return {}
    heads = _number_of_heads(module)
    output = {
        layer: MaskUnits(heads, dim=1 - _output_dim(layer)) for layer in _projections(holder, _OUTPUT)[:1]
    }
    if not separate:
        layer = projections[0]
        # The heads of GPT-NeoX, BLOOM and Falcon each have their query, key and value side by side.
        parts = 1 if layer is getattr(module, "query_key_value", None) else 3
        return {layer: MaskUnits(heads, dim=_output_dim(layer), parts=parts), **output}
    width = _outputs(projections[0]) // heads
    # Keys and values have fewer heads in grouped-query attention.
    own = {layer: MaskUnits(_outputs(layer) // width, dim=_output_dim(layer)) for layer in projections}
    return {**own, **output}


def _number_of_heads(module: nn.Module) -> int:
    for source in (module, getattr(module, "config", None)):
        for name in _HEADS:
            heads = getattr(source, name, None)
            if isinstance(heads, int):
                return heads
    raise ValueError(
        f"{type(module).__name__} does not tell its number of heads. Give AMSS(units={{layer: MaskUnits(heads), ...}})."
    )


def _projections(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The submodules of these names that have a matrix for a weight, in the order of the names."""
    found = [getattr(module, name, None) for name in names]
    return [
        layer
        for layer in found
        if isinstance(layer, nn.Module)
        and isinstance(layer.weight if hasattr(layer, "weight") else None, Tensor)
    ]


def _output_dim(layer: nn.Module) -> int:
    """Which dimension of the weight the outputs are: the second in transformers' `Conv1D`."""
    return 0 if isinstance(layer, nn.Linear) else 1


def _outputs(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[_output_dim(layer)]
