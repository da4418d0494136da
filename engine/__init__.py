"""One process, one model, one block pool: blocks, sequences, batches, runner, sampler. Knows neither Ray nor Prometheus."""
