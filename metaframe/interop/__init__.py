"""Other libraries' containers and array classes, understood wherever metaframe takes a structure.

An adapter is found when its library has been imported; metaframe imports none of them by itself.
"""

from metaframe.interop.ivy import import_ivy as import_ivy
