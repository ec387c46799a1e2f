"""Image grids and files, the gallery page and the run report."""
