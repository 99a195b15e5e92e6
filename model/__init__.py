"""The networks of a story model in Keras 3: a vision transformer, a Q-Former and a LLaMA decoder.

Only `keras.ops` is used, so they compute and train on any Keras backend; TensorFlow is the one that exports.
"""
