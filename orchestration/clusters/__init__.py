"""Work carried to clusters, and whether they can carry it."""
