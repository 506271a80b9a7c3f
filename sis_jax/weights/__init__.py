"""Files to pytrees and back: the only place that knows other people's layouts."""
