"""Files and layouts of weights: state dicts in, state dicts out."""
