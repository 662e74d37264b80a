"""Published data sets, as they are downloaded, made into what training reads."""
