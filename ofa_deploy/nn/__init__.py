"""Networks as torch modules: the supernet for training, a plan as a plain module."""
