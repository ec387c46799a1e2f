"""The same numbers faster or in less memory: replaces the classes of a finished model's modules."""
