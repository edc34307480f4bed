"""`refiners parity new`: the files of a port, drafted from the upstream model."""
