"""Entry points that are run by themselves, and the manifests that carry work to a cluster."""
