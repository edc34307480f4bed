"""The proof: every port beside its upstream. Only this room and `benchmarks` import upstream."""
