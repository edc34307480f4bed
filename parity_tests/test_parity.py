"""Every registered case in every lane; see `refiners.parity.plugin`."""

PARITY_CASES = "parity_tests.cases"
