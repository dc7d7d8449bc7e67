"""Tests of meta-learning code: the backend matrix for pytest, assertions, the gradient doctor."""
