"""Warnings of TensorFlow about calls that users of ours did not make."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import tensorflow as tf


@contextmanager
def without_remarks(*known: str) -> Iterator[None]:
    """A block of code during which no message with one of these texts in it is logged."""

    def unknown(message: logging.LogRecord) -> bool:
        return not any(text in message.getMessage() for text in known)

    logger = tf.get_logger()
    logger.addFilter(unknown)
    try:
        yield
    finally:
        logger.removeFilter(unknown)
