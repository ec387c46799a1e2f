"""Fast paths: each gives the numbers of the plain way, and can be deleted."""
