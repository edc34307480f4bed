"""What the framework costs: suites of figures with limits, and the engine that measures them (docs/benchmarks.md)."""
