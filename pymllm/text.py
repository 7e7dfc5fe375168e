"""Words for people that commands and what they call share."""


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
