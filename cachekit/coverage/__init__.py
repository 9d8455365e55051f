"""Which method works on which class of diffusers: tried, class by class, and written as a table."""
