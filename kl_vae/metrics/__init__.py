"""Image quality metrics and running moments."""
