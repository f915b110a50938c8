"""Where training starts from: adapters that are set by what the data says."""
