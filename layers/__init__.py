"""Stateless attention primitives: pure, jitted functions of arrays.

`from layers import dot_attention` works for every public primitive; the module names group them by mechanism. Modules
are imported when one of their names is first asked for, so that `import layers` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layers.activations import *
    from layers.clifford import *
    from layers.convolution import *
    from layers.coresets import *
    from layers.curves import *
    from layers.delta import *
    from layers.diffusion import *
    from layers.ema import *
    from layers.gated_linear import *
    from layers.gates import *
    from layers.graph import *
    from layers.homography import *
    from layers.hyperbolic import *
    from layers.hypergraph import *
    from layers.images import *
    from layers.latent import *
    from layers.linear import *
    from layers.localization import *
    from layers.low_rank import *
    from layers.masks import *
    from layers.memory import *
    from layers.neighborhood import *
    from layers.parallel import *
    from layers.patches import *
    from layers.points import *
    from layers.positions import *
    from layers.quantization import *
    from layers.quantum import *
    from layers.recurrence import *
    from layers.regularization import *
    from layers.relative import *
    from layers.resampling import *
    from layers.ridge import *
    from layers.roi import *
    from layers.rope import *
    from layers.rotations import *
    from layers.scan_orders import *
    from layers.serialization import *
    from layers.series import *
    from layers.softmax import *
    from layers.sparse import *
    from layers.spectral import *
    from layers.spiking import *
    from layers.splatting import *
    from layers.ssm import *
    from layers.transport import *
    from layers.triangular import *
    from layers.walks import *
    from layers.wavelets import *
    from layers.windows import *

_MODULES = {
    "activations": ("gelu",),
    "clifford": (
        "pga_attention",
        "pga_distance_features",
        "pga_dual",
        "pga_embed_plane",
        "pga_embed_point",
        "pga_embed_rotation",
        "pga_embed_translation",
        "pga_extract_point",
        "pga_gated_gelu",
        "pga_geometric_product",
        "pga_grade",
        "pga_inner_product",
        "pga_join",
        "pga_layer_norm",
        "pga_linear",
        "pga_outer_product",
        "pga_reverse",
        "pga_sandwich",
    ),
    "convolution": ("conv_general_dilated",),
    "coresets": (
        "attention_coreset",
        "attention_gram",
        "coreset_error",
        "halve",
    ),
    "curves": (
        "hilbert_decode",
        "hilbert_encode",
        "morton_decode",
        "morton_encode",
        "quantize_coordinates",
        "sort_by_code",
    ),
    "delta": (
        "delta_rule",
        "delta_rule_step",
    ),
    "diffusion": (
        "add_noise",
        "classifier_free_guidance",
        "ddim_step",
        "ddpm_step",
        "diffusion_schedule",
        "diffusion_timesteps",
        "flow_pair",
        "integrate_flow",
        "logit_normal_times",
        "prediction_target",
        "renoise",
        "shift_times",
        "split_prediction",
    ),
    "ema": (
        "damped_ema",
        "damped_ema_step",
    ),
    "gated_linear": (
        "gated_linear_attention",
        "gated_linear_attention_step",
        "retention_log_decays",
    ),
    "gates": (
        "bottleneck_gate",
        "cbam",
        "channel_convolution",
        "channel_gate",
        "convolutional_gate",
        "efficient_channel_gate",
        "energy_channel_gate",
        "gated_linear_unit",
        "gated_pool",
        "mean_map_gate",
        "mean_max_maps",
        "pfcasa",
        "simam_gate",
        "spatial_gate",
        "squeeze_excitation_gate",
    ),
    "graph": (
        "block_cosine_similarity",
        "dense_gated_graph_aggregate",
        "dense_graph_aggregate",
        "dense_graph_attention",
        "dense_graph_attention_v2",
        "dense_graph_convolution",
        "dense_graph_readout",
        "dense_to_edges",
        "edges_to_dense",
        "gated_graph_aggregate",
        "graph_aggregate",
        "graph_attention",
        "graph_attention_v2",
        "graph_convolution",
        "graph_laplacian",
        "graph_readout",
        "hop_distances",
        "laplacian_encoding",
        "normalized_adjacency",
        "random_walk_encoding",
        "segment_reduce",
        "segment_softmax",
        "similarity_graph",
        "tree_adjacency",
    ),
    "homography": (
        "homography_from_points",
        "project_points",
        "ransac_homography",
        "warp_homography",
    ),
    "hyperbolic": (
        "klein_to_lorentz",
        "klein_to_poincare",
        "lorentz_attention",
        "lorentz_centroid",
        "lorentz_distance",
        "lorentz_exp",
        "lorentz_exp_origin",
        "lorentz_inner",
        "lorentz_log",
        "lorentz_log_origin",
        "lorentz_project",
        "lorentz_scores",
        "lorentz_to_klein",
        "lorentz_to_poincare",
        "lorentz_transport",
        "poincare_add",
        "poincare_distance",
        "poincare_exp",
        "poincare_exp_origin",
        "poincare_log",
        "poincare_log_origin",
        "poincare_midpoint",
        "poincare_project",
        "poincare_to_klein",
        "poincare_to_lorentz",
    ),
    "hypergraph": (
        "hyperedge_gather",
        "hyperedge_read",
        "hypergraph_attention",
        "hypergraph_convolution",
    ),
    "images": (
        "adaptive_instance_norm",
        "dilate",
        "erode",
        "gaussian_blur",
        "gaussian_density_map",
        "match_color_statistics",
        "morphological_close",
        "morphological_open",
        "otsu_threshold",
        "sobel",
        "ssim",
        "von_mises_filters",
    ),
    "latent": (
        "agent_attention",
        "gather_representatives",
        "latent_read",
    ),
    "linear": (
        "LinearAttentionState",
        "dot_attention",
        "favor_features",
        "linear_attention",
        "linear_attention_step",
        "orthogonal_projection",
    ),
    "localization": (
        "epanechnikov_log_kernel",
        "gaussian_log_kernel",
        "hopfield_retrieve",
        "local_linear_regression",
        "local_mean",
        "mean_shift",
        "nearest_log_kernel",
        "reconstruction_weights",
    ),
    "low_rank": (
        "gated_low_rank_linear",
        "lora_linear",
        "lora_merge",
        "lora_mixture",
        "principal_subspace",
        "top_k_gates",
    ),
    "masks": (
        "BlockMask",
        "CausalMask",
        "DenseMask",
        "FullMask",
        "KeyMask",
        "LengthMask",
        "Mask",
        "PrefixMask",
        "SegmentMask",
        "ShiftedMask",
        "WindowMask",
        "as_mask",
    ),
    "memory": (
        "NeuralMemoryState",
        "neural_memory",
        "neural_memory_step",
    ),
    "neighborhood": (
        "neighborhood_attention_1d",
        "neighborhood_attention_2d",
        "neighborhood_mask",
    ),
    "parallel": (
        "preceding_state",
        "ring_attention",
    ),
    "patches": (
        "blend_tiles",
        "fold",
        "patchify",
        "tile_starts",
        "unfold",
        "unpatchify",
    ),
    "points": (
        "apply_similarity",
        "ball_query",
        "chamfer_distance",
        "edge_features",
        "expansion_penalty",
        "farthest_point_sampling",
        "gather_points",
        "inverse_distance_interpolation",
        "nearest_points",
        "pca_frames",
        "pool_points",
        "procrustes_rotation",
        "similarity_alignment",
    ),
    "positions": (
        "axial_sinusoidal_encoding",
        "cumulative_coordinates",
        "cyclic_encoding",
        "fourier_encoding",
        "grid_coordinates",
        "hexagonal_projections",
        "sinusoidal_encoding",
    ),
    "quantization": (
        "CodebookState",
        "code_perplexity",
        "commitment_loss",
        "residual_quantize",
        "update_codebook",
        "vector_quantize",
    ),
    "quantum": (
        "apply_cnot",
        "apply_gate",
        "encoding_layer",
        "entangling_layer",
        "pauli_z_expectations",
        "query_observables",
        "rotation_gate",
        "unitary_recurrence",
        "zero_state",
    ),
    "recurrence": (
        "causal_depthwise_conv",
        "causal_depthwise_conv_step",
        "linear_recurrence",
        "pairwise_decay",
    ),
    "regularization": (
        "dropout",
        "dropout_mask",
        "reverse_gradient",
    ),
    "relative": (
        "alibi_bias",
        "alibi_slopes",
        "clipped_relative_bias",
        "distance_bias",
        "gaussian_spectrum",
        "hop_band_weights",
        "laplace_spectrum",
        "lookup_bias",
        "radial_basis",
        "radial_basis_bias",
        "relative_position_bias",
        "relative_position_index",
        "skewed_relative_logits",
        "spectral_linear_attention",
        "t5_relative_bias",
        "t5_relative_buckets",
        "tree_hops",
        "tree_relations",
        "walk_reachability",
    ),
    "resampling": (
        "adaptive_avg_pool",
        "adaptive_max_pool",
        "avg_pool",
        "flow_warp",
        "grid_sample",
        "max_pool",
        "pixel_shuffle",
        "pixel_unshuffle",
        "resize",
        "sample_pixels",
    ),
    "ridge": (
        "KernelRidgeCache",
        "empty_kernel_ridge_cache",
        "kernel_ridge_attention",
        "kernel_ridge_step",
        "kernel_ridge_values",
    ),
    "roi": (
        "box_iou",
        "convert_boxes",
        "non_maximum_suppression",
        "paired_box_iou",
        "paste_masks",
        "roi_align",
    ),
    "rope": (
        "apply_rope",
        "axial_rope_angles",
        "dynamic_ntk_rope_frequencies",
        "fourier_rope",
        "fourier_rope_frequencies",
        "hexagonal_rope_angles",
        "interval_rope",
        "llama3_rope_frequencies",
        "longrope_attention_factor",
        "longrope_frequencies",
        "multimodal_rope_angles",
        "ntk_rope_frequencies",
        "rerotate_keys",
        "rope_angles",
        "rope_frequencies",
        "rotate_pairs",
        "yarn_attention_factor",
        "yarn_rope_frequencies",
    ),
    "rotations": (
        "angle_between",
        "bone_offsets",
        "forward_kinematics",
        "matrix_to_quaternion",
        "matrix_to_rotation_6d",
        "quaternion_conjugate",
        "quaternion_multiply",
        "quaternion_rotate",
        "quaternion_slerp",
        "quaternion_to_matrix",
        "rotation_6d_to_matrix",
        "rotation_distance",
        "se3_apply",
        "se3_exp",
        "se3_inverse",
        "se3_log",
        "skew_matrix",
        "so3_exp",
        "so3_log",
        "sphere_tangent",
    ),
    "scan_orders": (
        "cross_scan_orders",
        "interleaved_order",
        "inverse_order",
        "local_scan_orders",
        "merge_scans",
        "polygon_scan_orders",
        "raster_order",
        "ring_order",
        "scan_sequences",
        "snake_order",
        "window_order",
    ),
    "serialization": (
        "CodeClusters",
        "cluster_by_code",
        "pool_clusters",
        "serialized_attention",
        "serialized_patches",
        "submanifold_convolution",
        "unpool_clusters",
        "voxel_neighbors",
    ),
    "series": (
        "InstanceStatistics",
        "SeasonalTrend",
        "instance_denormalize",
        "instance_normalize",
        "moving_average",
        "series_decomposition",
    ),
    "softmax": (
        "KeyValueCache",
        "attend",
        "concatenate_streams",
        "decode_step",
        "dot_product_attention",
        "empty_cache",
        "extend_cache",
        "masked_normalize",
        "normalize_heads",
    ),
    "sparse": (
        "StridedMask",
        "TypeMask",
        "attention_received",
        "block_sparse_attention",
        "block_top_p_mask",
        "cache_deviation",
        "compact_tokens",
        "compressed_block_attention",
        "heavy_hitter_scores",
        "pool_blocks",
        "select_top_fraction",
        "select_top_k",
        "select_top_p",
        "sparse_gather_attention",
        "top_window_attention",
    ),
    "spectral": (
        "adaptive_low_pass_mask",
        "analytic_signal",
        "band_power",
        "bandpass_filterbank",
        "box_low_pass_mask",
        "constant_q_transform",
        "demon_spectrum",
        "exchange_frequencies",
        "fourier_channels",
        "hilbert_envelope",
        "inverse_fourier_channels",
        "inverse_short_time_fourier",
        "nonuniform_fourier_sum",
        "nonuniform_fourier_values",
        "power_spectral_density",
        "radial_low_pass_mask",
        "short_time_fourier",
        "spectral_amplitude_loss",
        "spectral_window",
        "split_frequencies",
        "third_order_spectrum",
        "variational_modes",
    ),
    "spiking": (
        "CurrentBasedState",
        "current_based_step",
        "integrate_and_count",
        "leaky_integrate_fire",
        "surrogate_spike",
    ),
    "splatting": (
        "composite_gaussians",
        "densify_gaussians",
        "gaussian_color",
        "gaussian_covariance",
        "gaussian_tiles",
        "project_gaussians",
        "project_gaussians_equirectangular",
        "spherical_harmonics",
    ),
    "ssm": (
        "selective_scan",
        "selective_scan_step",
        "state_space_dual",
        "state_space_dual_step",
    ),
    "transport": (
        "event_transport_loss",
        "sinkhorn_cost",
        "sinkhorn_normalize",
        "sinkhorn_plan",
    ),
    "triangular": ("solve_lower",),
    "walks": (
        "heat_kernel",
        "quantum_walk_probabilities",
        "quantum_walk_propagator",
        "walk_hamiltonian",
    ),
    "wavelets": (
        "WaveletCoefficients",
        "continuous_wavelet_transform",
        "inverse_wavelet_transform",
        "inverse_wavelet_transform_2d",
        "scalogram",
        "wavelet_filters",
        "wavelet_transform",
        "wavelet_transform_2d",
    ),
    "windows": (
        "TokenWindows",
        "axial_from_doubled",
        "fit_window",
        "hex_distance",
        "hex_window",
        "hex_windows",
        "merge_windows",
        "pad_to_windows",
        "partition_windows",
        "token_window_attention",
        "window_attention",
        "window_relative_bias",
        "window_relative_index",
        "window_shift_mask",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'layers' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"layers.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
