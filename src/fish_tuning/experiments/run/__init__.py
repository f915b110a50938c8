"""Running: plan, arms, learning rates, engines and loggers. The top room: it uses all others, none uses it."""
