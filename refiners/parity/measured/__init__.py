"""What the constants of the verifier rest on: right programs and wrong ones, run and counted."""
