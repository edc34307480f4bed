"""Why a port differs: where both sides part, and the change of the port that makes them equal."""
