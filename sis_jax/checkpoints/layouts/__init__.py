"""Other people's layouts of weights, one family per file."""
