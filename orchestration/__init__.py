"""What knows about runs and machines: an experiment's file becomes data, models and reports."""
