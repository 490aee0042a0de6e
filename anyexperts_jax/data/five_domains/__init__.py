"""The five domains of the paper's tables, built on real signals that ship in packages: everything runs offline."""
