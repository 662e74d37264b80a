"""What demonstrates: quickstart, evidence suites, synthetic and small data sets. Nothing here is needed to train."""
