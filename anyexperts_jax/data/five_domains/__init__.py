"""The five domains of the paper's tables, built from real signals in installed packages, so they work offline."""
