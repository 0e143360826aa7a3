"""Sampled networks: hidden weights drawn from pairs of data, readouts by one solve, and Hamiltonian systems to learn with them."""
