"""Speed and memory, ours beside the plain recipe and the peers' U-Nets, in one run, on random weights."""
