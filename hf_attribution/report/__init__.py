"""Tables and pictures of attributions: for a terminal, a notebook or a paper."""
