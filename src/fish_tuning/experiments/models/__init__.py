"""The models: their targets, their PEFT configurations, and building them."""
