"""Files of metaframe's own: read under limits, checked by schema, written atomically, locked."""
