"""Grain, imported when it is needed and without what it does to logging."""

import logging


def import_grain():
    """It warns of a missing jax through absl, which then also installs a handler on the root
    logger."""
    absl_logger = logging.getLogger("absl")
    quiet, level = logging.NullHandler(), absl_logger.level
    logging.root.addHandler(quiet)
    absl_logger.setLevel(logging.ERROR)
    try:
        import grain
    finally:
        absl_logger.setLevel(level)
        logging.root.removeHandler(quiet)
    return grain
