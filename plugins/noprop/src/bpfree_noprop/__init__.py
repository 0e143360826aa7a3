"""NoProp: each block learns on its own to denoise a noised label, given the input."""
