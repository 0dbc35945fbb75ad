"""Writing a plan with its weights in the formats that runtimes read."""
