"""`report.html`: one file to look at, without a network."""
