"""Tables measured by us: one JSON file a board, in the format of ``tuning.document``."""
