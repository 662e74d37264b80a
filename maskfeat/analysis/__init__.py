"""After training: probes, visualization, plots."""
