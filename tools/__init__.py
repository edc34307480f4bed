"""The project's own checks and generators, run by `nox -s lint` and `nox -s fix`."""
