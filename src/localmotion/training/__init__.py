"""Training loops, one for each source of data, and what they share: updates, optimisers, checks, transfer, studies."""
