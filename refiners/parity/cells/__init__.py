"""Changes that change nothing: what must hold of a port, whatever it computes."""
