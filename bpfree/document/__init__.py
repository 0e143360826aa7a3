"""Documents and their charts: study reports, certificates, and the plots of a run."""
