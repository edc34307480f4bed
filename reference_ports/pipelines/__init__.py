"""Compositions that users call: encoders, a denoiser, an autoencoder and a solver that make pictures together."""
