"""Every bound that a numeric test allows, in one place, each with its reason.

A bound is on the largest absolute difference, relative to the largest expected value if that is over one.
"""

BOUNDS: dict[str, float] = {
    # One layer in float32, against torch: sums of some dozens of products in another order, 1.2e-7 each.
    "layer": 2e-6,
    # A whole network of random weights, against torch: the rounding of a few layers piles up.
    "network": 1e-5,
    # A resize matrix in float64, against torch, which computes its taps in float32.
    "resize": 1e-5,
    # cos and sin of up to 128 radians: torch computes the angle in float32, which there is spaced by 7.6e-6.
    "rope": 1e-5,
    # The same numbers through the same kernels, in another batch or in a traced graph.
    "same_maths": 2e-6,
    # The same weights on another Keras backend, through the whole story model.
    "backend": 1e-5,
    # Against a float64 NumPy reference of the same formulas.
    "numpy_reference": 1e-5,
    # A root mean square that the mean sets; the spread of a tenth adds half a percent, and chance as much.
    "rms": 2e-2,
    # cos and sin, computed in float64 and rounded once: half of float32's spacing below one is 3.0e-8.
    "rotation": 3.1e-8,
    # The exported decoder in float32 against float64: the worst of all steps was 7e-6 on AVX2.
    "decoder_graph": 3e-5,
    # 30 layers of pretrained weights, in float32 against torch: 1.4e-6 measured.
    "pretrained_logits": 1e-5,
    # 12 blocks of pretrained weights in float32 against torch: 2.5e-6 measured.
    "pretrained_features": 1e-5,
    # Keras in float32 with a mask against float64 without: loud weights, and logits of some dozens.
    "streaming_reference": 3e-5,
    # Copied, not computed.
    "exact": 0.0,
}
