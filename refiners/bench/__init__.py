"""What benchmarks have measured, to be looked at: files of figures become one page, or the tables of a document."""
