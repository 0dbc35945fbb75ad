"""Shrinking a user's own network to a budget, priced on the device."""
