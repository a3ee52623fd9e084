"""The command `inspect`: what is measured of a dataset, what of it somebody should know, and how it is shown."""
