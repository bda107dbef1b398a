"""What every benchmark shares: settings, presets, aggregation, logs, output, options, plots."""
