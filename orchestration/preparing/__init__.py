"""From raw data to prepared data: the passes over records and images, on Ray Data."""
