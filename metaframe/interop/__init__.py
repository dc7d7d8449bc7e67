"""Other libraries' containers and array classes, understood wherever metaframe takes a structure.

Nothing here is called by users: an adapter is found when its library is imported, and metaframe
imports none of them.
"""
