"""The checks of a certificate, by what they judge; each module ends in its list."""
