"""Settings of Keras, which computes with any framework: what a layer made or called now goes by."""

from __future__ import annotations

import sys
from collections.abc import Hashable


def keras_settings() -> Hashable:
    """The settings that its operations and layers look up; None where Keras is not imported.

    >>> import sys
    >>> keras_settings() is None or "keras" in sys.modules
    True
    """
    keras = sys.modules.get("keras")
    config = getattr(keras, "config", None)  # None while Keras itself is being imported
    if config is None:
        return None
    policy = config.dtype_policy().name
    return config.floatx(), policy, config.epsilon(), config.image_data_format()
