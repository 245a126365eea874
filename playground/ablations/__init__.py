"""Small experiments on the embedded data: the paper's comparisons in miniature."""
