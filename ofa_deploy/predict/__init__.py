"""Predictors of latency and accuracy: numpy, over whole populations."""
