"""A package, so that what others install as `tests` does not stand before it."""
