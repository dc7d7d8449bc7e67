"""metaframe: one definition of a meta-learning algorithm, on PyTorch, JAX and TensorFlow."""
