"""Where LA-ACIQ meets other libraries. Each module imports its own; importing this package imports none of them."""
