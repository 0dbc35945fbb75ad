"""Training a supernet; needs torch."""
