"""How runs and sweeps look: pages of HTML and their figures."""
