"""Cases, as data: one module a family, each with a sequence `CASES`. Nothing runs on import."""
