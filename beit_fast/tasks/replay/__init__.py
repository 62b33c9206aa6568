"""A step of a finished or broken run again, to see in which module it goes bad."""
