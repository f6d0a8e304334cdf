"""Stateless attention primitives: pure, jitted functions of arrays.

`from layers import dot_attention` works for every public primitive; the module names group them by mechanism.
"""

from layers.activations import (
    gelu,
)
from layers.coresets import (
    attention_coreset,
    attention_gram,
    coreset_error,
    halve,
)
from layers.delta import (
    delta_rule,
    delta_rule_step,
)
from layers.dropout import (
    dropout,
    dropout_mask,
)
from layers.ema import (
    damped_ema,
    damped_ema_step,
)
from layers.gated_linear import (
    gated_linear_attention,
    gated_linear_attention_step,
    retention_log_decays,
)
from layers.latent import (
    agent_attention,
    gather_representatives,
    latent_read,
)
from layers.linear import (
    LinearAttentionState,
    dot_attention,
    favor_features,
    linear_attention,
    linear_attention_step,
    orthogonal_projection,
)
from layers.localization import (
    epanechnikov_log_kernel,
    gaussian_log_kernel,
    hopfield_retrieve,
    local_linear_regression,
    local_mean,
    mean_shift,
    nearest_log_kernel,
    reconstruction_weights,
)
from layers.masks import (
    BlockMask,
    CausalMask,
    DenseMask,
    FullMask,
    KeyMask,
    LengthMask,
    Mask,
    PrefixMask,
    SegmentMask,
    ShiftedMask,
    WindowMask,
    as_mask,
)
from layers.memory import (
    NeuralMemoryState,
    neural_memory,
    neural_memory_step,
)
from layers.quantum import (
    apply_cnot,
    apply_gate,
    encoding_layer,
    entangling_layer,
    pauli_z_expectations,
    query_observables,
    rotation_gate,
    unitary_recurrence,
    zero_state,
)
from layers.recurrence import (
    causal_depthwise_conv,
    causal_depthwise_conv_step,
    linear_recurrence,
    pairwise_decay,
)
from layers.ridge import (
    kernel_ridge_attention,
    kernel_ridge_values,
)
from layers.series import (
    InstanceStatistics,
    SeasonalTrend,
    instance_denormalize,
    instance_normalize,
    moving_average,
    series_decomposition,
)
from layers.softmax import (
    KeyValueCache,
    attend,
    concatenate_streams,
    decode_step,
    dot_product_attention,
    empty_cache,
    extend_cache,
    masked_normalize,
    normalize_heads,
)
from layers.ssm import (
    selective_scan,
    selective_scan_step,
    state_space_dual,
    state_space_dual_step,
)

__all__ = [
    "BlockMask",
    "CausalMask",
    "DenseMask",
    "FullMask",
    "InstanceStatistics",
    "KeyMask",
    "KeyValueCache",
    "LengthMask",
    "LinearAttentionState",
    "Mask",
    "NeuralMemoryState",
    "PrefixMask",
    "SeasonalTrend",
    "SegmentMask",
    "ShiftedMask",
    "WindowMask",
    "agent_attention",
    "apply_cnot",
    "apply_gate",
    "as_mask",
    "attend",
    "attention_coreset",
    "attention_gram",
    "causal_depthwise_conv",
    "causal_depthwise_conv_step",
    "concatenate_streams",
    "coreset_error",
    "damped_ema",
    "damped_ema_step",
    "decode_step",
    "delta_rule",
    "delta_rule_step",
    "dot_attention",
    "dot_product_attention",
    "dropout",
    "dropout_mask",
    "empty_cache",
    "encoding_layer",
    "entangling_layer",
    "epanechnikov_log_kernel",
    "extend_cache",
    "favor_features",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "gather_representatives",
    "gaussian_log_kernel",
    "gelu",
    "halve",
    "hopfield_retrieve",
    "instance_denormalize",
    "instance_normalize",
    "kernel_ridge_attention",
    "kernel_ridge_values",
    "latent_read",
    "linear_attention",
    "linear_attention_step",
    "linear_recurrence",
    "local_linear_regression",
    "local_mean",
    "masked_normalize",
    "mean_shift",
    "moving_average",
    "nearest_log_kernel",
    "neural_memory",
    "neural_memory_step",
    "normalize_heads",
    "orthogonal_projection",
    "pairwise_decay",
    "pauli_z_expectations",
    "query_observables",
    "reconstruction_weights",
    "retention_log_decays",
    "rotation_gate",
    "selective_scan",
    "selective_scan_step",
    "series_decomposition",
    "state_space_dual",
    "state_space_dual_step",
    "unitary_recurrence",
    "zero_state",
]
