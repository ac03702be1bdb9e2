"""What an experiment needs and costs, counted from its settings alone."""
